"""Tissue masks from outside and to it: GeoJSON as QuPath reads and writes it, and PNG of any scale."""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import label

from ds_wsi.runtime.files import atomic_path
from ds_wsi.runtime.log import logger
from ds_wsi.slides.errors import SlideError
from ds_wsi.slides.slide import Slide

SUFFIXES = (".geojson", ".png")
SAME_SHAPE = 0.01  # of width over height, of a PNG and its slide
TISSUE = {"name": "Tissue", "color": [60, 160, 60]}
NOT_TISSUE = ("ignore", "artifact", "artefact", "background", "exclude", "pen")
DRAWN = ("annotation", "tmacore")  # object types that are regions; cells, tiles and detections are results
NAMESPACE = uuid.UUID("9a3c1f5e-5a0b-4f0e-9d7a-5d3f6f0b7c11")  # of the ids of our annotations
Ring = np.ndarray  # float64 [K, 2], corners (x, y)


class MaskFile(NamedTuple):
    """A file that says where a slide's tissue is.

    Attributes:
        path: `.geojson` or `.png`.
        in_bounds: places count from the scanned area's corner, as in QuPath, and not from level 0's. The two differ
            where a file names its scanned area (MRXS, SCN).
    """

    path: Path
    in_bounds: bool = False

    @property
    def name(self) -> str:
        """The file's name and a checksum of what is in it: grids made with another mask are another's."""
        words = f"{self.path.name} {hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]}"
        return f"{words} in bounds" if self.in_bounds else words


def find_mask(folder: str | Path, slide_id: str) -> Path | None:
    """The mask `<slide_id>.geojson` or `<slide_id>.png` of a folder; None where it has none.

    Raises:
        SlideError: there are both, or what has the name is no file.
    """
    paths = [path for path in (Path(folder) / f"{slide_id}{suffix}" for suffix in SUFFIXES) if os.path.lexists(path)]
    for path in paths:
        if not path.is_file():  # a link to nowhere is a mask that was meant, too
            raise SlideError(f"mask must be a file, got none at {path} (slide {slide_id}). HINT: write it again.")
    if len(paths) > 1:
        names = " and ".join(path.name for path in paths)
        raise SlideError(
            f"slide {slide_id} must have one mask, got {names} ({folder}). HINT: keep the one that is meant."
        )
    return paths[0] if paths else None


def read_mask(file: MaskFile, slide: Slide, downsample: float) -> np.ndarray:
    """Read where a slide's tissue is.

    GeoJSON: annotations (Polygon or MultiPolygon, with holes) in level-0 px; those of a class that is called Ignore,
    Artifact, Background, Exclude or Pen are taken away from the others. PNG: of any scale, anything but 0 is tissue.

    Args:
        file: `.geojson` or `.png`.
        slide: the open slide that the file belongs to.
        downsample: level-0 px per pixel of the mask that is returned.

    Returns:
        bool [ceil(height / downsample), ceil(width / downsample)]; a pixel is tissue where its centre is.

    Raises:
        SlideError: no such file, another format, without a region, or of another slide.
    """
    path, shape = file.path, (math.ceil(slide.height_px / downsample), math.ceil(slide.width_px / downsample))
    area = slide.bounds if file.in_bounds else (0, 0, slide.width_px, slide.height_px)
    if slide.bounds[:2] != (0, 0) and not file.in_bounds:
        logger.warning(
            "slide %s names its scanned area, which begins at (%d, %d): QuPath counts places from there, its mask is "
            "taken to count from level 0's corner. HINT: --masks_in_bounds for masks from QuPath.",
            *(slide.slide_id, *slide.bounds[:2]),
        )
    if path.suffix.lower() == ".png":
        return _read_png(path, slide, shape, downsample, area)
    where = f"(slide {slide.slide_id}, {path})"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        drawn, taken_away = _regions(content)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise SlideError(
            f"mask must be GeoJSON with Polygon or MultiPolygon, got {type(error).__name__}: {error} {where}. HINT: "
            "export it from QuPath with File > Export objects as GeoJSON."
        ) from error
    if not drawn:
        raise SlideError(f"mask must hold a region of tissue, got none {where}. HINT: draw an annotation.")
    mask = np.zeros(shape, dtype=bool)
    for rings, value in [*((rings, True) for rings in drawn), *((rings, False) for rings in taken_away)]:
        _fill(mask, [(ring + area[:2]) / downsample for ring in rings], value)
    low, high = (corner + area[:2] for corner in _extent(drawn))
    if low[0] >= slide.width_px or low[1] >= slide.height_px or high[0] <= 0 or high[1] <= 0 or not mask.any():
        raise SlideError(
            f"mask must lie on its slide of {slide.width_px} x {slide.height_px} px, got regions from "
            f"({low[0]:g}, {low[1]:g}) to ({high[0]:g}, {high[1]:g}) {where}. HINT: is it of another slide or "
            "level?"
        )
    if (high > 1.05 * np.array([slide.width_px, slide.height_px]) + downsample).any():
        logger.warning(
            "mask %s reaches to (%g, %g), beyond its slide of %d x %d px: is it that of another slide?",
            *(path, high[0], high[1], slide.width_px, slide.height_px),
        )
    return mask


def _extent(regions: Sequence[Sequence[Ring]]) -> tuple[np.ndarray, np.ndarray]:
    corners = np.concatenate([ring for rings in regions for ring in rings])
    return corners.min(axis=0), corners.max(axis=0)


def _read_png(
    path: Path, slide: Slide, shape: tuple[int, int], downsample: float, area: tuple[int, int, int, int]
) -> np.ndarray:
    """The pixels of a mask of the area (x, y, width, height)."""
    where = f"(slide {slide.slide_id}, {path})"
    try:
        with Image.open(path, formats=("PNG",)) as image:  # of others Pillow starts programs: Ghostscript
            values = np.asarray(image)  # of a palette its indices
            names = image.getbands()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SlideError(f"mask must be a readable PNG, got {error} {where}. HINT: write it again.") from error
    if values.ndim == 3:
        colours = [index for index, name in enumerate(names) if name != "A"]
        values = np.asarray(values[..., colours].any(-1))
    mask: np.ndarray = np.asarray(values != 0)
    ratio = (mask.shape[1] / mask.shape[0]) / (area[2] / area[3])
    # Rounding to whole pixels changes the shape of small masks.
    allowed = SAME_SHAPE + 1 / min(mask.shape)
    if abs(ratio - 1) > allowed:
        raise SlideError(
            f"mask must have the shape of its slide, {area[2]} x {area[3]} px, at any scale, got "
            f"{mask.shape[1]} x {mask.shape[0]} {where}. HINT: is it the mask of another slide?"
        )
    if not mask.any():
        raise SlideError(f"mask must hold tissue, values other than 0, got none {where}. HINT: correct it.")
    # The last pixel's centre may lie beyond the slide's edge.
    y = np.minimum((np.arange(shape[0]) + 0.5) * downsample, slide.height_px - 0.5)
    x = np.minimum((np.arange(shape[1]) + 0.5) * downsample, slide.width_px - 0.5)
    rows = _indices(y - area[1], area[3], mask.shape[0])
    columns = _indices(x - area[0], area[2], mask.shape[1])
    inside = (rows >= 0)[:, None] & (columns >= 0)
    return mask[rows][:, columns] & inside


def _indices(places: np.ndarray, length: float, count: int) -> np.ndarray:
    """The pixel, of `count` along a length, in which each place lies; -1 outside."""
    indices = np.floor(places * count / length).astype(int)
    return np.where((indices >= 0) & (indices < count), indices, -1)


def _regions(content: Any) -> tuple[list[list[Ring]], list[list[Ring]]]:
    """The polygons, each its rings, that are tissue, and those that are not."""
    drawn: list[list[Ring]] = []
    taken_away: list[list[Ring]] = []
    for feature in _features(content):
        properties = feature.get("properties") or {}
        kind = str(properties.get("objectType") or properties.get("object_type") or "annotation").lower()
        if kind not in DRAWN:
            continue
        name = _class_name(properties)
        target = taken_away if any(name.startswith(word) for word in NOT_TISSUE) else drawn
        target += _polygons(feature.get("geometry"))
    return drawn, taken_away


def _features(content: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(content, list):  # as QuPath wrote it before FeatureCollection
        return content
    if content["type"] == "FeatureCollection":
        return list(content["features"])
    return [content] if content["type"] == "Feature" else [{"geometry": content}]


def _class_name(properties: Mapping[str, Any]) -> str:
    value = properties.get("classification") or ""
    if isinstance(value, Mapping):
        value = value.get("name") or ": ".join(value.get("names") or ())
    return str(value).lower()


def _polygons(geometry: Any) -> list[list[Ring]]:
    if geometry is None:
        return []
    kind = geometry["type"]
    if kind == "GeometryCollection":
        return [rings for part in geometry["geometries"] for rings in _polygons(part)]
    if kind not in ("Polygon", "MultiPolygon"):
        return []  # points and lines have no area
    polygons = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
    return [[_ring(ring) for ring in rings] for rings in polygons]


def _ring(corners: Any) -> Ring:
    ring = np.asarray(corners, dtype=np.float64)
    if ring.ndim != 2 or len(ring) < 3 or ring.shape[1] < 2 or not np.isfinite(ring).all():
        raise ValueError(f"a ring must be at least 3 corners (x, y), got {list(ring.shape)}")
    return ring[:, :2]


def _fill(mask: np.ndarray, rings: Sequence[Ring], value: bool) -> None:
    """Set the pixels whose centres lie inside a polygon, its holes left out: even-odd along each row."""
    corners = np.concatenate(rings)
    height, width = mask.shape
    top = min(max(math.floor(corners[:, 1].min()), 0), height)
    bottom = min(max(math.ceil(corners[:, 1].max()), 0), height)
    left = min(max(math.floor(corners[:, 0].min()), 0), width)
    right = min(max(math.ceil(corners[:, 0].max()), 0), width)
    if top >= bottom or left >= right:
        return
    crossings = np.zeros((bottom - top, right - left + 1), dtype=np.int32)
    for ring in rings:
        ahead = np.roll(ring, -1, axis=0)
        going_down = ring[:, 1] <= ahead[:, 1]
        low = np.where(going_down[:, None], ring, ahead)
        high = np.where(going_down[:, None], ahead, ring)
        # Rows whose centre, at row + 0.5, is in [low, high).
        first = np.clip(np.ceil(low[:, 1] - 0.5), top, bottom).astype(int)
        last = np.clip(np.ceil(high[:, 1] - 0.5), top, bottom).astype(int)
        counts = last - first
        edges = np.repeat(np.arange(len(ring)), counts)
        rows = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts) + first[edges]
        slope = (high[edges, 0] - low[edges, 0]) / (high[edges, 1] - low[edges, 1])
        x = low[edges, 0] + (rows + 0.5 - low[edges, 1]) * slope
        columns = np.clip(np.ceil(x - 0.5), left, right).astype(int)
        np.add.at(crossings, (rows - top, columns - left), 1)
    inside = (crossings.cumsum(axis=1) % 2 == 1)[:, :-1]
    mask[top:bottom, left:right][inside] = value


def write_mask(path: str | Path, mask: np.ndarray, downsample: float, slide: Slide, in_bounds: bool = False) -> None:
    """Write a mask as GeoJSON that QuPath opens, atomically: an annotation for each connected piece, holes as rings.

    `read_mask` at the same downsample gives the mask back, pixel for pixel.

    Args:
        path: where the file is written.
        mask: bool [H, W].
        downsample: level-0 px per pixel.
        slide: the slide that the mask belongs to.
        in_bounds: see `MaskFile`.
    """
    origin = np.array(slide.bounds[:2] if in_bounds else (0, 0))
    features = []
    for number, rings in enumerate(_outlines(mask)):
        corners = [_closed(ring * downsample - origin) for ring in rings]
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(NAMESPACE, f"{slide.slide_id} {number} {rings[0][0].tolist()}")),
                "geometry": {"type": "Polygon", "coordinates": corners},
                "properties": {"objectType": "annotation", "classification": TISSUE, "isLocked": False},
            }
        )
    text = json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":"))
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _closed(ring: Ring) -> list[list[float]]:
    """Corners with the first once more at the end, whole numbers as such."""
    return [[int(v) if v == int(v) else round(v, 3) for v in corner] for corner in (*ring.tolist(), ring[0].tolist())]


def _outlines(mask: np.ndarray) -> Iterator[list[Ring]]:
    """The rings around each piece of a mask (pixels that share a side), the outer one first, along pixel borders."""
    labels, count = label(mask)
    pieces: list[list[Ring]] = [[] for _ in range(count)]
    padded = np.pad(labels, 1)
    # Borders as directed edges with the piece on the right: from -> to, in corners of pixels.
    edges: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for dy, dx, start, end in (
        (-1, 0, (0, 0), (0, 1)),
        (0, 1, (0, 1), (1, 1)),
        (1, 0, (1, 1), (1, 0)),
        (0, -1, (1, 0), (0, 0)),
    ):
        beside = padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        rows, columns = ((labels > 0) & (beside == 0)).nonzero()
        for row, column, piece in zip(rows.tolist(), columns.tolist(), labels[rows, columns].tolist(), strict=True):
            edges.setdefault((row + start[0], column + start[1]), []).append((row + end[0], column + end[1], piece))
    while edges:
        first = next(iter(edges))
        ring, piece = _walk(edges, first)
        pieces[piece - 1].append(ring)
    for rings in pieces:
        rings.sort(key=lambda ring: -abs(_area(ring)))
        yield rings


def _walk(edges: dict[tuple[int, int], list[tuple[int, int, int]]], first: tuple[int, int]) -> tuple[Ring, int]:
    """Follow edges from a corner back to it, taking them out; returns the turns as (x, y), and the piece's number."""
    at, heading, piece = first, (0, 0), 0
    corners: list[tuple[int, int]] = []
    while True:
        choices = edges[at]
        chosen = 0
        if len(choices) > 1:
            # Two pixels meet at this corner: the edge of the same piece that turns right keeps to the same pixel.
            right = (heading[1], -heading[0])
            matches = [n for n, (y, x, _) in enumerate(choices) if (y - at[0], x - at[1]) == right]
            chosen = matches[0] if matches else 0
        y, x, piece = choices.pop(chosen)
        if not choices:
            del edges[at]
        step = (y - at[0], x - at[1])
        if step != heading:
            corners.append((at[1], at[0]))
        at, heading = (y, x), step
        if at == first:
            # The corner where the walk began may lie within a straight side.
            return np.array(corners, dtype=np.float64), piece


def _area(ring: Ring) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)
