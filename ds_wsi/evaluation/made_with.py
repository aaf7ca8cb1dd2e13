"""What features on disk were made with, in words: two files of the same words hold the same features."""

import json
import re
import zlib
from dataclasses import asdict
from typing import Any

import torch

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.models import ModelConfig, SlideModel
from ds_wsi.models.lora import without_adapters
from ds_wsi.slides.fingerprint import slide_fingerprint
from ds_wsi.slides.policy import TilingPolicy, stored_tiling
from ds_wsi.slides.tile_store import StoredSlide, store_path
from ds_wsi.slides.tiling import TileGrid


def about_features(model: SlideModel, config: ModelConfig, cohort: Cohort, policy: ReadPolicy) -> list[dict[str, str]]:
    """What each slide's file says of how it was made, in the cohort's order."""
    made_with = {"encoder": encoder_words(model, config), "mean_and_std": normalisation_words(config)}
    return [
        {
            "slide_id": grid.slide_id,
            **made_with,
            "tiles": tiles_words(grid),
            "slide": str(slide_fingerprint(entry.path)),
            "pixels": _pixels_words(policy, grid.slide_id),
        }
        for entry, grid in zip(cohort.manifest.slides, cohort.tile_grids, strict=True)
    ]


def normalisation_words(config: ModelConfig) -> str:
    """The channels' statistics."""
    return f"{config.mean}, {config.std}"


def in_todays_words(about: dict[str, str]) -> dict[str, str]:
    """What a file says of itself, with the policy of its tiles as `tiles_words` writes it now."""
    tiles, _, policy = about.get("tiles", "").partition(", {")
    try:
        today = asdict(TilingPolicy(**stored_tiling(json.loads("{" + policy))))
    except (TypeError, ValueError):  # no policy that is known: it will differ
        return about
    return {**about, "tiles": f"{tiles}, {json.dumps(today, sort_keys=True)}"}


def encoder_words(model: SlideModel, config: ModelConfig) -> str:
    """The encoder's name, what leaves it, a checksum of its weights, its precision: of one set features can differ."""
    options = json.dumps(config.encoder_options, sort_keys=True) if config.encoder_options else ""
    leaves = "" if config.encoder_features == "pooled" else config.encoder_features
    checksum = 0
    for _, value in sorted(without_adapters(model.encoder.state_dict()).items()):
        octets: Any = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(memoryview(octets), checksum)
    norms = "norms over each slide" if config.norm_evaluation == "bag" else ""
    norms += f" but {len(config.fixed_norms)}" if norms and config.fixed_norms else ""
    precision = "" if model.evaluation_precision == "no" else f"in {model.evaluation_precision}"
    words = (config.encoder, leaves, options, norms, f"with weights {checksum:08x}", precision)
    return " ".join(word for word in words if word)


def without_precision(words: str) -> str:
    """What `encoder_words` said, but for the precision that was computed in."""
    return re.sub(r" in \w+$", "", words)


def _pixels_words(policy: ReadPolicy, slide_id: str) -> str:
    """Where tiles are read: those of a store that were encoded anew differ by a grey level."""
    if not policy.tile_store:
        return "of the slide"
    with StoredSlide(store_path(policy.tile_store, slide_id)) as stored:
        return f"of a tile store, JPEG quality {stored.header['quality']}"


def tiles_words(grid: TileGrid) -> str:
    """How the slide was tiled, and a checksum of its tiles' coordinates."""
    coords = zlib.crc32(grid.coords.tobytes())
    return f"{len(grid)} at coords {coords:08x}, {json.dumps(asdict(grid.policy), sort_keys=True)}"
