"""Tile coordinates on disk: our format (safetensors), and CLAM's and TRIDENT's h5 files as export and import."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ds_wsi.runtime.files import atomic_path, require_file
from ds_wsi.runtime.fingerprint import Fingerprint
from ds_wsi.runtime.h5_files import member, number_attributes, numbers, opened_h5
from ds_wsi.runtime.own_files import require_ours
from ds_wsi.runtime.tensor_seal import in_order, opened, sealed
from ds_wsi.slides.policy import TilingPolicy, stored_tiling
from ds_wsi.slides.slide import Slide, SlideError
from ds_wsi.slides.tiling import TileGrid, TissueFound, plan_level

FORMAT, VERSION = "ds_wsi.TileGrid", "1"
# (um/px below which a slide has it, magnification), as TRIDENT names them.
MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))
SAME_RATIO = 0.01  # levels of one file differ by a factor of 2 or more, rounding by far less
WRITTEN_BY = "written_by"
CLAM_ATTRIBUTES = ("patch_size", "patch_level")
TRIDENT_ATTRIBUTES = ("patch_size", "patch_size_level0")
OTHER_ATTRIBUTES = ("downsample", "level0_width", "level0_height")  # compared with the slide's, where they are there
MAX_TILE_PX = 2**16
H5_HEAD = b"\x89HDF\r\n\x1a\n"


def write_grid(grid: TileGrid, path: str | Path, slide: Fingerprint | None = None) -> None:
    """Write a grid atomically: `coords` as a tensor, everything else as JSON in the metadata.

    Args:
        grid: the grid that is written.
        path: where the file is written.
        slide: fingerprint of the slide's file, by which the grid is known again.
    """
    apart = ("coords", "policy", "tissue")
    values = {field.name: getattr(grid, field.name) for field in fields(grid) if field.name not in apart}
    values["tissue"] = None if grid.tissue is None else asdict(grid.tissue)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "grid": json.dumps(values),
        "policy": json.dumps(asdict(grid.policy)),
        **({} if slide is None else {"slide": json.dumps(slide._asdict())}),
    }
    tensors = {"coords": np.ascontiguousarray(grid.coords)}
    with atomic_path(path, tensors["coords"].nbytes) as temporary:
        save_file(tensors, temporary, sealed(metadata, tensors))
        in_order(temporary)


def read_grid(path: str | Path) -> TileGrid:
    """Read a grid that `write_grid` wrote.

    Raises:
        SlideError: a torn file, or one of another format or version.
    """
    try:
        require_file(path)
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            coords = file.get_tensor("coords") if "coords" in file.keys() else None  # noqa: SIM118
            opened(metadata, {} if coords is None else {"coords": coords})
    # safetensors raises TypeError or ValueError on some heads of foreign files.
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise SlideError(
            f"tile grid must be a whole safetensors file, got {error} ({path}). HINT: delete it."
        ) from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION or coords is None:
        got = f"{metadata.get('format')} {metadata.get('version')}"
        raise SlideError(f"tile grid must be of format {FORMAT} {VERSION}, got {got} ({path}). HINT: delete it.")
    try:
        policy, values = stored_tiling(json.loads(metadata["policy"])), json.loads(metadata["grid"])
        policy["grey_range"] = tuple(policy["grey_range"])
        stored = values.pop("tissue", None)
        tissue = None if stored is None else TissueFound(**stored)
        return TileGrid(coords=coords, policy=TilingPolicy(**policy), tissue=tissue, **values)
    except (KeyError, TypeError, ValueError) as error:
        raise SlideError(
            f"tile grid must have the fields of {FORMAT}, got {error!r} ({path}). HINT: delete it."
        ) from error


def read_slide_fingerprint(path: str | Path) -> Fingerprint | None:
    """The fingerprint of the slide file that a stored grid was made of; None where an earlier version wrote it.

    Raises:
        SlideError: it is written there, and torn.
    """
    text = None
    try:
        with safe_open(path, framework="numpy") as file:
            text = opened(file.metadata() or {}).get("slide")
        return None if text is None else Fingerprint(**json.loads(text))
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise SlideError(
            f"tile grid must tell its slide's fingerprint, got {text!r} ({path}). HINT: delete it."
        ) from error


def export_clam(grid: TileGrid, path: str | Path) -> None:
    """Write CLAM's patches h5: `coords` int64 [N, 2] level-0 px, patch_size in px of patch_level."""
    downsample = grid.tile_size_level0_px / grid.read_size_px
    # CLAM writes the level's size under both names.
    level_dim = np.array([round(grid.slide_width_px / downsample), round(grid.slide_height_px / downsample)])
    attributes = {
        "patch_size": grid.read_size_px,
        "patch_level": grid.level,
        "downsample": np.array([downsample, downsample]),
        "downsampled_level_dim": level_dim,
        "level_dim": level_dim,
        "name": grid.slide_id,
        "save_path": str(Path(path).parent),
    }
    _write_h5(grid, path, attributes)


def export_trident(grid: TileGrid, path: str | Path) -> None:
    """Write TRIDENT's patches h5: `coords` int64 [N, 2] level-0 px, patch_size at the target magnification.

    TRIDENT reads squares of patch_size times level0_magnification / target_magnification: the two are written in that
    proportion, the first as TRIDENT itself names the slide's.
    """
    magnification = _magnification(grid.slide_mpp)
    attributes = {
        "patch_size": grid.tile_size_px,
        "patch_size_level0": round(grid.tile_size_level0_px),
        "level0_magnification": magnification,
        "target_magnification": _whole(magnification * grid.tile_size_px / grid.tile_size_level0_px),
        "overlap": 0,
        "name": grid.slide_id,
        "level0_width": grid.slide_width_px,
        "level0_height": grid.slide_height_px,
    }
    _write_h5(grid, path, attributes)


def _magnification(slide_mpp: float) -> float:
    return next((magnification for below, magnification in MAGNIFICATIONS if slide_mpp < below), _whole(10 / slide_mpp))


def _whole(value: float) -> float:
    """The whole number that is meant (19.995 is 20) as an int, else the value."""
    nearest = round(value)
    return nearest if nearest and abs(value / nearest - 1) < SAME_RATIO else value


def _write_h5(grid: TileGrid, path: str | Path, attributes: dict[str, Any]) -> None:
    require_ours(Path(path), _is_exported, "the folder of exported coordinates")
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        coords = file.create_dataset("coords", data=grid.coords.astype(np.int64))
        coords.attrs.update(attributes)
        file.attrs[WRITTEN_BY] = "ds_wsi"


def _is_exported(path: Path) -> bool:
    """Whether an h5 file, no link, is an export of ours; those of earlier versions do not tell."""
    if path.is_symlink() or not path.is_file():
        return False
    content = path.read_bytes()  # HDF5 ends the process where a damaged file has text
    return content.startswith(H5_HEAD) and WRITTEN_BY.encode() in content and b"ds_wsi" in content


def import_clam(path: str | Path, slide: Slide) -> TileGrid:
    """Read CLAM's patches h5 for an open slide: tiles of patch_size px, as they are at patch_level.

    Raises:
        SlideError: no such file, an attribute missing, or coordinates that are not this slide's.
    """
    coords, attributes = _read_h5(path, CLAM_ATTRIBUTES)
    level, size = int(attributes["patch_level"]), int(attributes["patch_size"])
    if not 0 <= level < len(slide.level_downsamples):
        raise SlideError(f"patch_level must be a level of slide {slide.slide_id}, got {level} ({path})")
    downsample = slide.level_downsamples[level]
    written = np.atleast_1d(attributes.get("downsample", downsample)).astype(np.float64)
    if (np.abs(written / downsample - 1) > SAME_RATIO).any():
        raise SlideError(
            f"downsample must be {downsample:g}, as of level {level} of slide {slide.slide_id}, got {written.tolist()} "
            f"({path}). HINT: is it the file of another slide?"
        )
    return _imported(slide, coords, "clam", path, size, size, level, size * slide.level_downsamples[level])


def import_trident(path: str | Path, slide: Slide) -> TileGrid:
    """Read TRIDENT's patches h5 for an open slide: tiles of patch_size px that cover patch_size_level0 at level 0.

    Raises:
        SlideError: as `import_clam`.
    """
    coords, attributes = _read_h5(path, TRIDENT_ATTRIBUTES)
    size, size_level0 = int(attributes["patch_size"]), int(attributes["patch_size_level0"])
    for name, size_px in (("level0_width", slide.width_px), ("level0_height", slide.height_px)):
        if int(attributes.get(name, size_px)) != size_px:
            raise SlideError(
                f"{name} must be {size_px}, as of slide {slide.slide_id}, got {attributes[name]} ({path}). "
                "HINT: is it the file of another slide?"
            )
    plan = plan_level(slide.mpp, slide.level_downsamples, slide.mpp * size_level0 / size, size)
    return _imported(slide, coords, "trident", path, size, plan.read_size_px, plan.level, plan.tile_size_level0_px)


def _read_h5(path: str | Path, required: tuple[str, ...]) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        with opened_h5(path) as file:
            dataset = member(file, "coords")
            if dataset is None:
                raise SlideError(f"coordinates must be in a dataset `coords`, got {list(file)} ({path})")
            coords, names = numbers(dataset), (*required, *OTHER_ATTRIBUTES)
            attributes = number_attributes(file, names) | number_attributes(dataset, names)
    except SlideError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise SlideError(f"coordinates must be in an h5 file, got {error} ({path})") from error
    missing = [name for name in required if name not in attributes]
    if missing:
        raise SlideError(f"coordinates must have the attributes {required}, got none of {missing} ({path})")
    for name in required:
        if name.startswith("patch_size") and not 1 <= attributes[name] <= MAX_TILE_PX:
            raise SlideError(f"{name} must be in [1, {MAX_TILE_PX}] px, got {attributes[name]} ({path})")
    if coords.ndim != 2 or coords.shape[1] != 2 or not np.issubdtype(coords.dtype, np.integer) or not len(coords):
        raise SlideError(f"coordinates must be integers [N, 2], got {coords.dtype} {list(coords.shape)} ({path})")
    return coords.astype(np.int64), attributes


def _imported(
    slide: Slide,
    coords: np.ndarray,
    source: str,
    path: str | Path,
    tile_size_px: int,
    read_size_px: int,
    level: int,
    tile_size_level0_px: float,
) -> TileGrid:
    last = coords.max(axis=0)
    if coords.min() < 0 or last[0] >= slide.width_px or last[1] >= slide.height_px:
        raise SlideError(
            f"coordinates must lie on slide {slide.slide_id} ({slide.width_px} x {slide.height_px} px), got up to "
            f"({last[0]}, {last[1]}) ({path}). HINT: is it the file of another slide?"
        )
    mpp = slide.mpp * tile_size_level0_px / tile_size_px
    return TileGrid(
        slide_id=slide.slide_id,
        coords=coords,
        tile_size_px=tile_size_px,
        tile_size_level0_px=tile_size_level0_px,
        level=level,
        read_size_px=read_size_px,
        mpp=mpp,
        slide_mpp=slide.mpp,
        slide_width_px=slide.width_px,
        slide_height_px=slide.height_px,
        policy=TilingPolicy(tile_size_px=tile_size_px, mpp=mpp, min_tissue_fraction=0.0),
        source=source,
    )
