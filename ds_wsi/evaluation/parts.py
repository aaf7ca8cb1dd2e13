"""Each slide's prediction in a file: several processes share them, and a stopped evaluation goes on with them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_wsi.bags.bag import FailureLog
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.evaluation.predict import SlidePrediction
from ds_wsi.runtime.files import atomic_path
from ds_wsi.runtime.own_files import require_ours
from ds_wsi.runtime.tensor_file import write_tensors
from ds_wsi.runtime.tensor_seal import opened, sealed

FOLDER = "predictions"
FORMAT, VERSION = "ds_wsi.prediction", "1"
HEAD_BYTES = 2**12


class Parts:
    """The files of an evaluation's slides, `<slide_id>.safetensors`.

    Args:
        folder: theirs.
        slides: the cohort's, row by row.
        made_of: what decides each row's prediction: a file with another is written anew.
        failures: the tiles that could not be read, which a file tells too.

    Raises:
        ValueError: a file of something else is in the way.
    """

    def __init__(
        self, folder: Path, slides: Sequence[SlideEntry], made_of: Sequence[str], failures: FailureLog
    ) -> None:
        self.folder, self._slides, self._made_of, self._failures = folder, slides, made_of, failures
        self._slide_ids = [slide.slide_id for slide in slides]
        for row in range(len(slides)):
            require_ours(self.path(row), _is_ours, "--output_dir")

    def path(self, row: int) -> Path:
        """The file of a slide."""
        return self.folder / f"{self._slide_ids[row]}.safetensors"

    def write(self, prediction: SlidePrediction) -> None:
        """Write a slide's prediction and its failures, atomically."""
        row = prediction.slide
        of_members = bool(self._slides[row].members)
        names = {slide.slide_id for slide in self._slides[row].slides}
        failed = [
            [x, y, why, *([name] if of_members else [])]
            for (name, x, y), why in self._failures.reasons.items()
            if name in names
        ]
        tensors = {"logits": prediction.run_logits, "kept": prediction.kept}
        if prediction.attention is not None:
            tensors["attention"] = prediction.attention
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "slide_id": self._slide_ids[row],
            "made_of": self._made_of[row],
            "unreadable": json.dumps(sorted(failed)),  # behind the format, by which the head is known
        }
        with atomic_path(self.path(row), sum(tensor.nbytes for tensor in tensors.values())) as temporary:
            write_tensors(
                temporary, tensors, sealed(metadata, {name: value.numpy() for name, value in tensors.items()})
            )

    def read(self, row: int) -> SlidePrediction | None:
        """A slide's prediction, whose failures are recorded; None where none is there that is whole and of the same."""
        if not self.path(row).is_file():
            return None
        try:
            with safe_open(str(self.path(row)), framework="pt") as file:
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about: dict[str, Any] = opened(
                    file.metadata() or {}, {name: value.numpy() for name, value in tensors.items()}
                )
        except (SafetensorError, OSError, TypeError, ValueError):  # torn, or damaged: written anew
            return None
        known_by = (about.get("version"), about.get("slide_id"), about.get("made_of"))
        if known_by != (VERSION, self._slide_ids[row], self._made_of[row]):
            return None
        for x, y, why, *member in json.loads(about["unreadable"]):
            (name,) = member or [self._slide_ids[row]]
            self._failures.reasons[name, x, y] = why
        return SlidePrediction(row, tensors["logits"], tensors.get("attention"), tensors["kept"])


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(HEAD_BYTES)
