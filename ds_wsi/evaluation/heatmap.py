"""Attention over the slide's thumbnail."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from ds_wsi.runtime.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOR_MAP = "viridis"  # the highest is the brightest, for colour-blind readers and on paper too
OPACITY = 0.6  # nuclei stay visible below the colour
PANEL_INCHES = 4.5  # the longer side of a panel
MIN_PANEL_WIDTH_INCHES = 2.1  # the colour bar's label fits below two of them
DPI = 200
SOFTWARE = "ds_wsi heat map"  # in the file, by which it is known
MADE_OF = "ds_wsi made of"

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]


def draw_attention(
    thumbnail: UInt8Array,
    coords: npt.ArrayLike,
    tile_size_level0_px: float,
    attention: npt.ArrayLike,
    downsample: float,
    path: str | os.PathLike[str],
    title: str,
    made_of: str = "",
    ranks: FloatArray | None = None,
) -> None:
    """Write a PNG: the thumbnail, and beside it the thumbnail under the tiles' attention.

    Args:
        thumbnail: uint8 [h, w, 3].
        coords: integer [N, 2], x and y of each tile's upper left corner, level-0 px.
        tile_size_level0_px: side of a tile, level-0 px.
        attention: float [N].
        downsample: level-0 px for one thumbnail px.
        path: where to; written atomically.
        title: drawn as it is.
        made_of: what it is known by, for `heat_map_of`.
        ranks: float64 [N], see `attention_rgba`.

    Raises:
        ValueError: see `attention_rgba`; a thumbnail that is not uint8 [h, w, 3].
    """
    if thumbnail.ndim != 3 or thumbnail.shape[2] != 3 or thumbnail.dtype != np.uint8:
        raise ValueError(
            f"thumbnail must be uint8 [h, w, 3], got {thumbnail.dtype} {list(thumbnail.shape)} ({title}). "
            "HINT: drop the alpha channel."
        )
    height, width = thumbnail.shape[:2]
    overlay = attention_rgba(coords, tile_size_level0_px, attention, downsample, (height, width), ranks)
    figure = _figure(height, width)
    left, right = figure.subplots(1, 2)
    left.imshow(thumbnail)
    right.imshow(composite(thumbnail, overlay))
    for axes in (left, right):
        _frame(axes)
    # The title may hold a dollar sign, which is no mathematics here.
    figure.suptitle(title, fontsize=10, parse_math=False, wrap=True)
    _color_bar(figure, [left, right], "slide" if ranks is None else "bag")
    with atomic_path(path) as temporary:
        known_by = {"Software": SOFTWARE, **({MADE_OF: made_of} if made_of else {})}
        figure.savefig(temporary, dpi=DPI, facecolor="white", metadata=known_by)


def is_heat_map(path: Path) -> bool:
    """Whether a file, no link, is a heat map that `draw_attention` drew."""
    return heat_map_of(path) is not None


def heat_map_of(path: Path) -> str | None:
    """What a heat map is known by, empty where it was not told; None: the file is none, or there is none."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return str(image.info.get(MADE_OF, "")) if image.info.get("Software") == SOFTWARE else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # another's PNG, perhaps damaged
        return None


def attention_rgba(
    coords: npt.ArrayLike,
    tile_size_level0_px: float,
    attention: npt.ArrayLike,
    downsample: float,
    shape: tuple[int, int],
    ranks: FloatArray | None = None,
) -> UInt8Array:
    """Colour the tiles on a transparent image of the thumbnail's size.

    A tile covers the thumbnail's pixels from round(x / downsample) to round((x + side) / downsample), one at least;
    neighbours share an edge and leave no gap. Where tiles overlap, the highest attention is on top.

    Args:
        coords: integer [N, 2], x and y of each tile's upper left corner, level-0 px.
        tile_size_level0_px: side of a tile, level-0 px.
        attention: float [N].
        downsample: level-0 px for one thumbnail px.
        shape: height and width of the thumbnail, px.
        ranks: float64 [N], 0 to 1, of the tiles among more than these, such as all of a patient; None: among these.

    Returns:
        uint8 [h, w, 4], RGBA, not premultiplied; alpha is 0 outside the tiles.

    Raises:
        ValueError: shapes that do not fit, attention that is not finite, a tile outside the thumbnail.
    """
    from matplotlib import colormaps

    coord_array, weights = np.asarray(coords), np.asarray(attention, dtype=np.float64)
    _check_tiles(coord_array, weights, tile_size_level0_px, downsample)
    boxes = tile_boxes(coord_array, tile_size_level0_px, downsample)
    _check_inside(boxes, coord_array, shape)
    colors = colormaps[COLOR_MAP](percentile_rank(weights) if ranks is None else ranks, bytes=True)
    colors[:, 3] = round(255 * OPACITY)
    overlay = np.zeros((*shape, 4), dtype=np.uint8)
    for tile in np.argsort(weights, kind="stable"):
        x0, y0, x1, y1 = boxes[tile]
        overlay[y0:y1, x0:x1] = colors[tile]
    return overlay


def tile_boxes(coords: np.ndarray, tile_size_level0_px: float, downsample: float) -> npt.NDArray[np.int64]:
    """Return each tile's box on the thumbnail: int64 [N, 4], x0, y0, x1, y1 (ends exclusive), px."""
    # floor(x + 0.5), since rint sends the halves of neighbouring tiles up and down in turn.
    first = np.floor(coords / downsample + 0.5).astype(np.int64)
    last = np.floor((coords + tile_size_level0_px) / downsample + 0.5).astype(np.int64)
    return np.concatenate([first, np.maximum(last, first + 1)], axis=1)


def percentile_rank(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return each value's rank from 0 (lowest) to 1 (highest): float64 [N]; equal values share their mean rank.

    Attention is a softmax over the bag: a few tiles hold most of it, and on a linear scale the others are all zero.
    """
    if len(values) == 1:
        return np.array([0.5])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts + 1) / 2
    return mean_rank[inverse] / (len(values) - 1)


def composite(image: UInt8Array, overlay: UInt8Array) -> UInt8Array:
    """Lay an RGBA overlay [h, w, 4] on an image [h, w, 3], both uint8; where alpha is 0 the image is unchanged."""
    alpha = overlay[:, :, 3:].astype(np.float32) / 255
    return np.rint(image * (1 - alpha) + overlay[:, :, :3] * alpha).astype(np.uint8)


def _check_tiles(coords: np.ndarray, attention: np.ndarray, tile_size_level0_px: float, downsample: float) -> None:
    if attention.ndim != 1 or not len(attention) or coords.shape != (len(attention), 2):
        raise ValueError(
            f"coords and attention must have shapes [N, 2] and [N] with N >= 1, got {list(coords.shape)} and "
            f"{list(attention.shape)}. HINT: give one weight per tile; tiles that failed to read have neither."
        )
    if not np.isfinite(attention).all():
        row = int(np.flatnonzero(~np.isfinite(attention))[0])
        raise ValueError(
            f"attention must be finite, got {attention[row]} (tile {row}). HINT: NaN comes from a diverged model."
        )
    for name, value in (("tile_size_level0_px", tile_size_level0_px), ("downsample", downsample)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}. HINT: it is in level-0 px.")


def _check_inside(boxes: np.ndarray, coords: np.ndarray, shape: tuple[int, int]) -> None:
    """Refuse a tile that misses the thumbnail; one px is left to the rounding of the thumbnail's own size."""
    height, width = shape
    outside = (boxes[:, 0] > width) | (boxes[:, 1] > height) | (boxes[:, 2] < 0) | (boxes[:, 3] < 0)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"coords must lie on the thumbnail of {width} x {height} px, got level-0 ({coords[row, 0]}, "
            f"{coords[row, 1]}) at thumbnail ({boxes[row, 0]}, {boxes[row, 1]}) (tile {row}). "
            "HINT: downsample is the slide's level-0 width over the thumbnail's width."
        )


def _figure(height: int, width: int) -> "Figure":
    """Return a figure for two panels of an image of this size, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale = PANEL_INCHES / max(height, width)
    panel_width = max(width * scale, MIN_PANEL_WIDTH_INCHES)
    figure = Figure(figsize=(2 * panel_width + 0.2, height * scale + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _frame(axes: "Axes") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("0.8")


def _color_bar(figure: "Figure", panels: "list[Axes]", bag: str) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(
        ScalarMappable(cmap=COLOR_MAP), ax=panels, location="bottom", ticks=[0, 0.5, 1], aspect=50, shrink=0.6, pad=0.02
    )
    bar.ax.set_xticklabels(["lowest", "median", "highest"])
    bar.set_label(f"attention: percentile rank among the {bag}'s tiles", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
