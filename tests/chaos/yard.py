"""Where cases are tried: cohorts, uninterrupted runs to compare with, and files of others that must stay."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_runs import SLIDES, listing, write_cohort, write_table

from ds_wsi.slides.pyramid import write_pyramid
from ds_wsi.training.checkpoint import list_checkpoints, verify
from ds_wsi.training.run_folder import MARK

from .case import LEFT, STRANGER, TORN, Outcome
from .engines import options_of
from .launch import start, wait

EPOCHS = 3
DROPOUT = ("--dropout", "0.3")
TIMED = ("tiles_per_second", "peak_memory_bytes")
_NAMES: tuple[str, ...] = (
    ".env.tmpl",
    ".x.tmp",
    ".checkpoint-2.tmp",
    "checkpoint-old",
    ".checkpoint-99.tmp.pt",
    "run.json~",
)
_NAMES += ("notes.csv", "with blank .txt", "übung € 漢字.txt", "-rf", "*", "new\nline", "S1.2")
_FOLDERS = ("checkpoint-old.d", ".ds_wsi-0123456789abcdef0123456789abcdef.tmp", "node.tmp.d")


@dataclass(frozen=True)
class Yard:
    """Folders of the campaign.

    Args:
        root: the folder of all cases: cohorts, and runs to compare with.
        place: the folder of this case.
        timeout_s: time on the clock after which a run hangs.
    """

    root: Path
    place: Path
    timeout_s: float

    @property
    def run(self) -> Path:
        """The output folder of the run that is hit."""
        return self.place / "runs" / "run"

    @property
    def logs(self) -> Path:
        """What its ranks print."""
        return self.place / "logs"

    def words(self, output: Path, engine: str, *more: object, cohort: str = "cohort") -> list[str]:
        """The command line of a run of some seconds on features."""
        folder = self.cohort(cohort)
        words: list[object] = ["train", "--features_dir", folder / "features", "--manifest", folder / "m.csv"]
        words += ["--output_dir", output, "--aggregator", "abmil", "--num_train_epochs", EPOCHS]
        words += ["--dataloader_num_workers", 0, "--disable_tqdm", *options_of(engine, self.root), *more]
        return [str(word) for word in words]

    def cohort(self, name: str) -> Path:
        """A cohort's folder, made where it is not there yet."""
        folder = self.root / name
        if not folder.exists():
            making = folder.with_name(f"{name}.making")
            shutil.rmtree(making, ignore_errors=True)
            {"cohort": write_cohort, "wide": _write_wide, "slides": _write_slides}[name](making)
            making.rename(folder)
        return folder

    def whole(self, words: list[str], output: Path, engine: str, ranks: int, name: str) -> Path:
        """The folder of the same run without a fault; made once.

        Args:
            words: the command, that writes to `output`.
            output: the command's folder.
            engine, ranks: what the command runs under.
            name: all that decides the run's bits, as a name.
        """
        folder = self.root / "whole" / f"{name}-{engine}-{ranks}"
        if not (folder / "run.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
            here = [str(folder) if word == str(output) else word for word in words]
            ended = wait(start(here, engine, ranks, folder.parent / f"{folder.name}-logs"), 2 * self.timeout_s)
            if set(ended.codes) != {0}:
                raise RuntimeError(f"a run without a fault must end with 0, got {ended.codes}: {ended.words[-2000:]}")
        return folder


def _write_wide(folder: Path) -> Path:
    """Bags of 20 MB: two fill a /dev/shm of 16 MB and more."""
    write_cohort(folder)
    for number, name in enumerate(SLIDES):
        features = torch.randn(5000, 1024, generator=torch.Generator().manual_seed(number)) + number % 2
        save_file({"features": features}, folder / "features" / f"{name}.safetensors")
    return folder


def _write_slides(folder: Path) -> Path:
    """Six slides of some tiles, and their table."""
    for number in range(6):
        noise = np.random.default_rng(number).integers(-8, 8, (160 + 2 * number, 160, 1))
        image = np.full((192 + 2 * number, 192, 3), 243, dtype=np.uint8)
        image[32:, 32:] = noise + np.array([200, 110, 160])
        write_pyramid(folder / "slides" / f"{SLIDES[number]}.tiff", image, mpp=0.5)
    rows = [(SLIDES[k], f"slides/{SLIDES[k]}.tiff", "ab"[k % 2], ("train", "test")[k // 4]) for k in range(6)]
    write_table(folder / "slides.csv", rows, ("slide_id", "path", "label", "split"))
    return folder


class Strangers:
    """Files, folders and links of others, of awkward names, in and beside what a run writes."""

    def __init__(self, place: Path) -> None:
        self.outside = place / "outside"
        self.outside.mkdir(parents=True, exist_ok=True)
        (self.outside / "kept.txt").write_text("outside")
        self.planted: list[Path] = []
        self.before: dict[str, Any] = {}

    def plant(self, folder: Path) -> None:
        """Put some into a folder; what is there from now on must stay."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _NAMES:
            (folder / name).write_text(f"the user's {name}")
        for name in _FOLDERS:
            (folder / name).mkdir()
            (folder / name / ".inside.tmp").write_text("the user's")
        for name, target in {".link.tmp": self.outside / "kept.txt", "linked": self.outside}.items():
            (folder / name).symlink_to(target)
        self.planted.append(folder)
        self.before = self._state()

    def _state(self) -> dict[str, Any]:
        state = listing(self.outside)
        for folder in self.planted:
            whole = listing(folder)
            names = [str(folder / name) for name in (*_NAMES, *_FOLDERS, ".link.tmp", "linked")]
            names += [str(folder / name / ".inside.tmp") for name in _FOLDERS]
            state |= {name: whole.get(name) for name in names}
        return state

    def check(self, outcome: Outcome, when: str) -> None:
        """Note each that is not as it was."""
        after = self._state()
        changed = sorted(path for path in {*self.before, *after} if self.before.get(path) != after.get(path))
        outcome.require(not changed, STRANGER, f"{when} changed {changed[:3]}")


def is_marked(folder: Path) -> bool:
    """Whether a run has begun there: its folder may hold other files then."""
    return (folder / MARK).is_file()


def steps_kept(folder: Path) -> int:
    """Optimizer steps of the newest checkpoint; 0 where there is none."""
    checkpoints = list_checkpoints(folder)
    return int(checkpoints[0].name.split("-")[1]) if checkpoints else 0


def check_checkpoints(outcome: Outcome, folder: Path, when: str) -> None:
    """Every checkpoint that has a checkpoint's name is whole."""
    for checkpoint in list_checkpoints(folder):
        problem = verify(checkpoint)
        outcome.require(problem is None, TORN, f"{when} {checkpoint.name}: {problem}")


def check_nothing_left(outcome: Outcome, folder: Path) -> None:
    """No temporary folder and no lock of a run that has ended, but what others named alike."""
    strangers = set(_FOLDERS)
    left = [path.name for path in folder.rglob(".ds_wsi-*") if path.name not in strangers]
    left += [path.name for path in folder.glob("pending-*")]
    outcome.require(not left, LEFT, f"left in the folder: {left}")


def differences(folder: Path, whole: Path) -> list[str]:
    """The files in which two runs' results differ: weights, predictions, and history but for its times."""
    differing = []
    for name in ("model.safetensors", "predictions.csv"):
        if not (folder / name).is_file() or (folder / name).read_bytes() != (whole / name).read_bytes():
            differing.append(name)
    if not (folder / "history.json").is_file() or history_of(folder) != history_of(whole):
        differing.append("history.json")
    return differing


def history_of(folder: Path) -> list[dict[str, Any]]:
    """A run's history without what is timed."""
    history = json.loads((folder / "history.json").read_text())
    return [{name: value for name, value in entry.items() if name not in TIMED} for entry in history]


def bytes_of(folder: Path) -> int:
    """Bytes that a folder takes on a disk of pages."""
    size = 0
    for parent, folders, files in os.walk(folder):
        size += 4096 * len(folders)
        size += sum(-(-Path(parent, name).lstat().st_size // 4096) * 4096 for name in files)
    return size
