"""A user's files, of every awkward name, in and beside each folder that is written to: the same after, every byte."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_runs import SLIDES, evaluate, listing, train, write_cohort, write_table

from ds_wsi.cli import main
from ds_wsi.runtime.log import logger
from ds_wsi.slides.pyramid import write_pyramid
from runs import ROOT, environment

pytestmark = pytest.mark.launch
NAMES = (
    *(".env.tmpl", ".x.tmp", "x.tmp", ".s00.abc.tmp.arrow", ".s00.123.tmp.safetensors", "S1.2", ".S1.2.tmp", ".tmp"),
    *(".checkpoint-2.tmp", "checkpoint-old", ".checkpoint-99.tmp.pt", "checkpoint-x", ".ds_wsi-notes.tmp", "run.json~"),
    *(
        "übung € 漢字.txt",
        "with blank .txt",
        "new\nline",
        "-rf",
        "*",
        ".hidden",
        "notes.csv",
        "labels.xlsx",
        "~$labels.xlsx",
    ),
)
FOLDERS = (".cache.tmp", "checkpoint-old.d", ".ds_wsi-0123456789abcdef0123456789abcdef.tmp", "node.tmp.d")


def plant(folder, outside):
    """Put files, folders and links into a folder; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    planted = []
    for name in NAMES:
        (folder / name).write_text(f"the user's {name}")
        planted.append(folder / name)
    for name in FOLDERS:
        (folder / name).mkdir()
        (folder / name / ".inside.tmp").write_text("the user's")
        planted += [folder / name, folder / name / ".inside.tmp"]
    for name, target in {
        ".link.tmp": outside / "kept.txt",
        "linked": outside,
        ".linked.tmp": outside,
        "dangling.tmp": outside / "none",
        ".ds_wsi-fedcba9876543210fedcba9876543210.tmp": outside,
    }.items():
        (folder / name).symlink_to(target)
        planted.append(folder / name)
    return planted


@pytest.fixture
def place(tmp_path):
    """A cohort of features, one of slides, another run, and the folder outside that links lead to."""
    root = write_cohort(tmp_path / "root")
    outside = tmp_path / "outside"
    (outside / "tiles").mkdir(parents=True)
    for name in ("kept.txt", ".env.tmpl", "tiles/.s00.1.tmp"):
        (outside / name).write_text("outside")
    for number in range(6):
        noise = np.random.default_rng(number).integers(-8, 8, (160 + 2 * number, 160, 1))
        image = np.full((192 + 2 * number, 192, 3), 243, dtype=np.uint8)
        image[32:, 32:] = noise + np.array([200, 110, 160])
        write_pyramid(root / "slides" / f"{SLIDES[number]}.tiff", image, mpp=0.5)
    rows = [(SLIDES[k], f"slides/{SLIDES[k]}.tiff", "ab"[k % 2], ("train", "test")[k // 4]) for k in range(6)]
    write_table(root / "slides.csv", rows, ("slide_id", "path", "label", "split"))
    assert train(root, root / "other", epochs=1) == 0
    logger.handlers.clear()  # the next command's messages go to where the test looks
    logger.propagate = True
    return root, outside


class Watched:
    """What must stay as it is."""

    def __init__(self, root, outside):
        self.root, self.outside, self.planted = root, outside, []
        self.before = {}

    def plant(self, *folders):
        for folder in folders:
            self.planted += plant(self.root / folder if folder else self.root, self.outside)
        self.before = self.state()

    def state(self):
        of_folders = [listing(self.outside)]
        of_folders += [listing(self.root / name) for name in ("features", "slides", "other")]
        whole = listing(self.root)
        of_planted = {str(path): whole.get(str(path)) for path in self.planted}
        return {path: state for states in (*of_folders, of_planted) for path, state in states.items()}

    def check(self, what):
        after = self.state()
        changed = [path for path in {*self.before, *after} if self.before.get(path) != after.get(path)]
        assert not changed, f"{what} changed {changed}"


def killed_in_the_middle(root, output):
    """Start a run of many epochs, and kill it a moment after its second checkpoint."""
    options = ["--features_dir", root / "features", "--manifest", root / "m.csv", "--output_dir", output]
    options += ["--aggregator", "abmil", "--num_train_epochs", 500, "--dataloader_num_workers", 0, "--save_steps", 1]
    command = [sys.executable, "launch/train.py", *map(str, options), "--resume_from_checkpoint"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), **quiet)
    deadline = time.monotonic() + 120
    n_before = len(list(output.glob("checkpoint-[0-9]*")))
    first = {path.name for path in output.glob("checkpoint-[0-9]*")}
    while len({path.name for path in output.glob("checkpoint-[0-9]*")} - first) < 2:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, f"no new checkpoint beside {n_before}"
        time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_training_leaves_a_users_files_alone(place, capfd):
    root, outside = place
    watched = Watched(root, outside)
    killed_in_the_middle(root, root / "run")
    watched.plant("", "run", "run/tiles", "runs", "full")
    neighbour = root / "neighbour"
    neighbour.mkdir()
    killed_in_the_middle(root, root / "run")
    watched.check("a run that was killed")
    left = sorted((root / "run").glob(".ds_wsi-*.tmp/checkpoint-*"))
    killed_in_the_middle(root, neighbour)
    of_neighbour = listing(neighbour)
    killed_in_the_middle(root, root / "run")
    watched.check("a run that went on")
    assert not [path for path in left if path.exists()], "what the killed run left was not removed"
    assert listing(neighbour) == of_neighbour, "a run touched the one beside it"
    assert train(root, root / "run", "--save_steps", "1", "--seed", "1", "--resume_from_checkpoint", epochs=500) == 2
    assert train(root, root / "full") == 2
    assert "must be a new folder, an empty one or a run's own" in capfd.readouterr().err
    assert train(root, root / "full", "--dry_run") == 2
    watched.check("a run that was refused")
    assert train(root, root / "runs" / "new", epochs=1) == 0
    assert train(root, root / "runs" / "new", "--resume_from_checkpoint", epochs=1) == 0
    watched.check("a run, finished twice")


def test_a_dry_run_writes_nothing(place, monkeypatch):
    root, outside = place
    plant(root, outside)
    grids = ("--manifest", root / "slides.csv", "--output_dir", root / "tiles")
    assert main(["tile", *map(str, (*grids, "--tile_size_px", 64))]) == 0
    plant(root / "tiles", outside)
    home = root.parent / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(root)
    before = listing(root.parent)
    options = ("--manifest", root / "slides.csv", "--tiles_dir", root / "tiles", "--encoder", "resnet10t")
    for size in (64, 32):  # the grids that are there, and others
        more = ("--tile_size_px", size, "--output_dir", root / "new", "--dataloader_num_workers", 0)
        assert main(["train", *map(str, (*options, *more)), "--dry_run"]) == 0
        assert listing(root.parent) == before
    assert train(root, root / "new", "--tiles_dir", root / "tiles", "--dry_run") == 0
    assert listing(root.parent) == before


def test_tile_store_features_and_evaluate_leave_a_users_files_alone(place):
    root, outside = place
    watched = Watched(root, outside)
    watched.plant("", "tiles", "store", "maps", "extracted", "extracted/tiles", "evaluated", "evaluated/heatmaps")
    shutil.rmtree(root / "evaluated" / "heatmaps")  # the name is an evaluation's: see the test of its folder
    watched.planted = [path for path in watched.planted if "heatmaps" not in path.parts]
    watched.before = watched.state()
    slides = ("--manifest", root / "slides.csv", "--tile_size_px", 64)
    for workers in (1, 2):
        pack = ("--output_dir", root / "tiles", "--store", root / "store", "--workers", workers, "--export", "clam")
        assert main(["tile", *map(str, (*slides, *pack)), "--verify"]) == 0
        watched.check("tile --store")
        more = ("--encoder", "resnet10t", "--output_dir", root / "extracted", "--device", "cpu")
        assert main(["features", *map(str, (*slides, *more, "--dataloader_num_workers", 0))]) == 0
        watched.check("features")
        assert evaluate(root, root / "other", root / "evaluated") == 0
        watched.check("evaluate")
    assert evaluate(root, root / "other", root / "other") == 2
    assert main(["report", str(root / "other"), "--output_dir", str(root / "maps")]) == 0
    watched.check("report")


def test_files_that_have_the_names_of_ours_are_refused(place, capfd):
    root, outside = place
    watched = Watched(root, outside)
    for name in (
        "tables/results.md",
        "compared/comparison.json",
        "planned/plan.png",
        "demo/manifest.csv",
        "new.csv",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("# Results\n")
        watched.planted.append(root / name)
    clam = root / "tiles" / "clam" / "patches" / "s00.h5"
    clam.parent.mkdir(parents=True)
    clam.write_bytes(b"\x89HDF of CLAM")
    watched.planted.append(clam)
    watched.plant("")
    slides = ("--manifest", root / "slides.csv", "--tile_size_px", 64, "--output_dir", root / "tiles")
    custom = ("--data_dir", root / "slides", "--labels", root / "slides.csv", "--slide_column", "slide_id")
    for command in (
        ("report", root / "other", "--output_dir", root / "tables"),
        ("compare", root / "other", root / "other", "--output_dir", root / "compared"),
        ("plan", "--tiles", 4, "--output_dir", root / "planned", "--device", "cpu"),
        ("demo", "--demo_dir", root / "demo"),
        ("tile", *slides, "--export", "clam"),
        ("manifest", "custom", *custom, "--label_column", "label", "--output", root / "new.csv"),
    ):
        assert main([str(word) for word in command]) == 2, command
        printed = capfd.readouterr().err
        assert "files of other programs" in printed, printed
    watched.check("a command that was refused")


def test_a_protocol_leaves_a_users_files_alone(place, capfd):
    root, outside = place
    watched = Watched(root, outside)
    shutil.copy(root / "slides.csv", root / "labels.csv")
    watched.plant("", "protocol", "protocol/manifests", "protocol/tiles")
    options = ("--data_dir", root / "slides", "--labels", root / "labels.csv", "--slide_column", "slide_id")
    options += ("--label_column", "label", "--split_column", "split", "--output_dir", root / "protocol")
    options += ("--tile_size_px", 64, "--encoder", "resnet10t", "--num_train_epochs", 1, "--dataloader_num_workers", 0)
    options += ("--seeds", 1, "--freeze_encoder")
    names = [name for name in os.listdir(root / "protocol")]
    assert main(["protocol", "custom", *map(str, options), "--dry_run"]) == 0
    watched.check("protocol --dry_run")
    assert os.listdir(root / "protocol") == names
    for _ in range(2):
        assert main(["protocol", "custom", *map(str, options)]) == 0
        watched.check("protocol")
    assert "is finished: skipped" in capfd.readouterr().err
    (run,) = (root / "protocol").glob("official_seed*")
    watched.planted += plant(run, outside)
    watched.before = watched.state()
    assert main(["protocol", "custom", *map(str, options)]) == 0
    watched.check("protocol")
    (root / "protocol" / "results.csv").write_text("theirs")
    assert main(["protocol", "custom", *map(str, options)]) == 2
    assert (root / "protocol" / "results.csv").read_text() == "theirs"
