"""A teacher's features on disk, near which the encoder is held while it learns: learning without forgetting.

The teacher is the encoder as the run starts, and its features those of the tiles as they were read, without
augmentation; the student's are of the tiles as it sees them. Rows are found by coordinate, so that a step may draw any
tiles of a slide, on any rank.

Source: Li and Hoiem, "Learning without Forgetting" (2016); on features, as Big-Layers' second paper has it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ds_wsi.bags.bag import Bag
from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.features import FeatureFileError, find_features, read_about, read_features, read_shape
from ds_wsi.bags.problems import condensed
from ds_wsi.evaluation.made_with import (
    encoder_words,
    in_todays_words,
    normalisation_words,
    tiles_words,
    without_precision,
)
from ds_wsi.models import ModelConfig, SlideModel
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.words import counted
from ds_wsi.slides.fingerprint import slide_fingerprint
from ds_wsi.training.settings import TrainSettings

REMEDY = "ds-wsi features, with the encoder, weights and tiles of this run and no --model, writes such a folder"


@dataclass(frozen=True)
class Teacher:
    """Features of every training slide's tiles.

    Attributes:
        paths: row of the cohort -> file.
        digest: what tells these features from others.
        weight: factor of the loss.
        kind: "mse" or "cosine".
    """

    paths: Mapping[int, Path]
    digest: str
    weight: float
    kind: str
    cohort: Cohort = field(repr=False)

    def of_bag(self, bag: Bag) -> Tensor:
        """The features of a bag's tiles, float32 [n, D], in the order of its tiles.

        Raises:
            ValueError: a tile that the student could read has none; names slide and tile.
        """
        grid = self.cohort.tile_grids[bag.slide]
        features, coords = read_features(self.paths[bag.slide])
        assert coords is not None
        if not len(bag.kept):
            return features[:0]
        there, asked = _keys(coords.numpy()), _keys(np.asarray(grid.coords)[bag.kept.numpy()])
        order = there.argsort()
        matched = order[np.searchsorted(there, asked, sorter=order).clip(max=len(there) - 1)]
        missing = np.flatnonzero(there[matched] != asked)
        if len(missing):
            x, y = (int(value) for value in grid.coords[int(bag.kept[missing[0]])])
            raise ValueError(
                f"--distill must hold features of every tile, got none of {counted(len(missing), 'tile')} of slide "
                f"{grid.slide_id}, the first at ({x}, {y}) ({self.paths[bag.slide]}). HINT: delete the file and "
                "extract it again: the tile could not be read then."
            )
        return features[torch.from_numpy(matched)]


def _keys(coords: np.ndarray) -> np.ndarray:
    """One number for each (x, y)."""
    whole = coords.astype(np.int64)
    keys: np.ndarray = whole[:, 0] * (1 << 32) + whole[:, 1]
    return keys


def require_teachable(settings: TrainSettings) -> None:
    """Refuse settings that leave a teacher nothing to hold, before an engine is started.

    Raises:
        ValueError: names the option that contradicts it.
    """
    if settings.optim.distill is None:
        return
    if settings.data.features_dir is not None:
        raise ValueError(
            f"--distill must be given with slides, got --features_dir {settings.data.features_dir}, which trains no "
            "encoder. HINT: leave out one of them."
        )
    if settings.model.freeze_encoder:
        raise ValueError(
            "--distill must be given with an encoder that is trained, got --freeze_encoder. HINT: leave out one of "
            "them; --freeze_encoder_epochs 1 rests it at first."
        )
    if settings.policies.stacking.framework == "sampling":
        raise ValueError(
            '--distill must be given with bags of their own tiles, got stacking.framework "sampling", which draws '
            "others. HINT: --tiles_per_slide draws tiles that a teacher knows."
        )
    if settings.data.joined_by:
        raise ValueError(
            f"--distill must be given with bags of one slide at one magnification, got "
            f"{settings.data.joined_by}. HINT: leave out one of them."
        )


def open_teacher(settings: TrainSettings, cohort: Cohort, config: ModelConfig, module: SlideModel) -> Teacher | None:
    """The teacher of a run whose model has just been built; None where none is wanted.

    Raises:
        ValueError: lists the files that are missing, of another encoder, weights, normalisation, tiles or slide.
    """
    folder = settings.optim.distill
    if folder is None:
        return None
    expected = {"encoder": encoder_words(module, config), "mean_and_std": normalisation_words(config)}
    paths, problems, short, digest = {}, [], [], hashlib.sha256()
    for row in cohort.rows("train"):
        entry, grid = cohort.manifest.slides[row], cohort.tile_grids[row]
        of_slide = {"tiles": tiles_words(grid), "slide": str(slide_fingerprint(entry.path))}
        try:
            path = find_features(folder, entry.slide_id)
            about = in_todays_words(read_about(path)) if path.suffix == ".safetensors" else {}
            n_rows, width = read_shape(path)
        except FeatureFileError as error:
            problems.append(str(error))
            continue
        problem = _differs(about, {**expected, **of_slide}, path)
        if problem is None and width != module.encoder.num_features:
            problem = f"features must be of width {module.encoder.num_features}, got {width} ({path})"
        if problem is not None:
            problems.append(problem)
            continue
        if n_rows < len(grid):
            short.append(f"{entry.slide_id} ({len(grid) - n_rows})")
        paths[row] = path
        digest.update(json.dumps([about, n_rows], sort_keys=True).encode())
    if problems:
        lines = "\n".join(f"  {number}. {line}" for number, line in enumerate(condensed(problems), 1))
        raise ValueError(
            f"--distill must hold features of the starting encoder and of every training slide's tiles, got "
            f"{counted(len(problems), 'file')} that are not:\n{lines}\nHINT: {REMEDY}."
        )
    if short:
        logger.warning(
            "%s: tiles that could not be read have no features: %s. A step that can read one of them is refused",
            *(folder, ", ".join(short)),
        )
    optim = settings.optim
    logger.info("teacher: %s, %s, weight %g", folder, optim.distill_loss, optim.distill_weight)
    return Teacher(paths, digest.hexdigest()[:16], optim.distill_weight, optim.distill_loss, cohort)


def _differs(about: Mapping[str, str], expected: Mapping[str, str], path: Path) -> str | None:
    """What a file says of itself that is not expected; None where it fits."""
    if not about:
        return f"features must be a file that `ds-wsi features` wrote, got another ({path})"
    for name, words in expected.items():
        present = about.get(name, "none")
        if name == "encoder":
            present = without_precision(present)
        if name == "slide" and name not in about:  # files of an earlier version
            continue
        if present != words:
            return f"{name} must be {words}, got {present} ({path})"
    return None
