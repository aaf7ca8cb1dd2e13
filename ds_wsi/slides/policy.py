"""What a user asks of the tiling of slides."""

import argparse
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any

from ds_wsi.runtime.setting import Decides, setting

TISSUE_RULES = ("auto", "grey", "otsu", "none")
TISSUE_VERSION = 1  # of the rule "auto"; another value for every change of the masks that it makes
AUTO = "auto"
BOX, DCT = "box", "dct"
SHRINKS = (BOX, DCT)  # how a tile is shrunk from a finer level
READERS = (AUTO, "openslide")  # of a slide's pixels, which are the same
POSSIBLE_MPP = (0.05, 10.0)  # of a slide, um/px, that a user may say: from 100x oil immersion to a macro camera
POSSIBLE_TILE_MPP = (0.05, 1000.0)  # of tiles, um/px: optics resolve no less, and of more a slide is a few pixels
DEMO_DIRS = {
    "plain": "runs/demo_slides",
    "stains": "runs/demo_stains",
    "sparse": "runs/demo_sparse",
    "graded": "runs/demo_graded",
}
DEMO_TILE_SIZE_PX = 64  # what the demo cohort's regions were drawn for


@dataclass(frozen=True)
class TilingPolicy:
    """How slides are tiled.

    Args:
        tile_size_px: side of a tile.
        mpp: resolution of the tiles, um/px (0.5 is what scanners call 20x).
        min_tissue_fraction: the share of a tile's area that must be tissue, in [0, 1].
        overview_mpp: resolution of the tissue mask, um/px; finer where a tile has fewer than 16 of its pixels a side.
        grey_range: grey values that can be tissue, both ends included.
        tissue: the rule that finds tissue: "auto", by the colour of the slide's own glass (see `auto_mask`); "grey", by
            the grey range alone; "otsu", in the grey range and above Otsu's threshold on saturation; "none", every tile
            is taken.
        tissue_version: the version of the rule "auto": a model's tiles stay what they were when a later version
            changes it.
        shrink: how a tile is shrunk where its level is finer: "box", the means of the pixels; "dct", 2, 4 or 8 times as
            its JPEG is decoded, the rest by means (see `read_shrunk`); of earlier versions, "box".
        use_saturation: what earlier versions had: True is "otsu", False is "grey".
    """

    tile_size_px: int = setting(
        256,
        "side of a tile in px",
        Decides.RESOLVED,
        resolved="tiling",
        option="tile_size_px",
        words=f"256, of the demo {DEMO_TILE_SIZE_PX}",
    )
    mpp: float = setting(
        0.5,
        "resolution in um/px at which tiles are read: 0.5 is 20x, 0.25 is 40x",
        Decides.RESOLVED,
        resolved="tiling",
        option="mpp",
    )
    min_tissue_fraction: float = setting(
        0.6,
        "share of a tile's area, 0 to 1, that must be tissue",
        Decides.RESOLVED,
        resolved="tiling",
        option="min_tissue_fraction",
    )
    overview_mpp: float = setting(
        8.0,
        "resolution of the tissue mask, um/px; finer where a tile has fewer than 16 of its pixels a side",
        Decides.RESOLVED,
        resolved="tiling",
    )
    grey_range: tuple[int, int] = setting(
        (3, 230), "grey values that can be tissue, both ends included", Decides.RESOLVED, resolved="tiling", kind=None
    )
    tissue: str = setting(
        "auto",
        "what finds tissue: the slide's own glass, a grey range, Otsu's threshold, or nothing (every tile is taken)",
        Decides.RESOLVED,
        resolved="tiling",
        option="tissue",
        kind=TISSUE_RULES,
    )
    tissue_version: int = setting(
        TISSUE_VERSION,
        'version of the rule "auto": a model\'s tiles stay what they were when a later version changes it',
        Decides.RESOLVED,
        resolved="tiling",
    )
    shrink: str = setting(
        BOX,
        "how a tile is shrunk where the level that it is read from is finer: box takes the means of the pixels; dct "
        "decodes its JPEG at a half, a quarter or an eighth, about twice as fast, with other pixels, and needs slides "
        "that are read directly",
        Decides.RESOLVED,
        resolved="tiling",
        option="shrink",
        kind=SHRINKS,
    )
    use_saturation: InitVar[bool | None] = None

    def __post_init__(self, use_saturation: bool | None) -> None:
        """Refuse what cannot be tiled with."""
        if use_saturation is not None:
            object.__setattr__(self, "tissue", "otsu" if use_saturation else "grey")
        if self.tissue not in TISSUE_RULES:
            raise ValueError(f"tissue must be one of {', '.join(TISSUE_RULES)}, got {self.tissue!r}")
        if self.shrink not in SHRINKS:
            raise ValueError(f"shrink must be one of {', '.join(SHRINKS)}, got {self.shrink!r}")
        if self.tissue_version != TISSUE_VERSION:
            raise ValueError(
                f"tissue_version must be {TISSUE_VERSION}, got {self.tissue_version}. HINT: install the version of "
                "ds_wsi that made it."
            )
        if self.tile_size_px < 1:
            raise ValueError(f"tile_size_px must be at least 1, got {self.tile_size_px}")
        for name in ("mpp", "overview_mpp"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
            if not POSSIBLE_TILE_MPP[0] <= getattr(self, name) <= POSSIBLE_TILE_MPP[1]:
                low, high = POSSIBLE_TILE_MPP
                raise ValueError(f"{name} must be in [{low:g}, {high:g}] um/px, got {getattr(self, name):g}")
        if not 0 <= self.min_tissue_fraction <= 1:
            raise ValueError(f"min_tissue_fraction must be in [0, 1], got {self.min_tissue_fraction}")
        if len(self.grey_range) != 2 or not 0 <= self.grey_range[0] <= self.grey_range[1] <= 255:
            raise ValueError(f"grey_range must be two rising values in [0, 255], got {self.grey_range}")


def stored_tiling(values: Mapping[str, Any], key: str = "tiling") -> dict[str, Any]:
    """A policy's fields as a file has them, in today's names: `use_saturation` of earlier versions becomes `tissue`.

    Raises:
        ValueError: `use_saturation` is no truth value; names it below `key`.
    """
    fields_of_today = dict(values)
    if "use_saturation" in fields_of_today:
        used = fields_of_today.pop("use_saturation")
        if not isinstance(used, bool):
            raise ValueError(f"{key}.use_saturation must be of type bool, got {used!r}")
        fields_of_today.setdefault("tissue", "otsu" if used else "grey")
    return fields_of_today


def require_slide_mpp(value: float | None) -> None:
    """Refuse a resolution that no slide has, before any is read.

    Raises:
        ValueError: names the option.
    """
    low, high = POSSIBLE_MPP
    if value is not None and not low <= value <= high:
        raise ValueError(f"--slide_mpp must be in [{low:g}, {high:g}] um/px, got {value:g}")


def parse_slide_mpp(text: str) -> float:
    """The resolution that is typed, as `require_slide_mpp` has it."""
    try:
        value = float(text)
        require_slide_mpp(value)
    except ValueError as error:
        words = str(error).removeprefix("--slide_mpp ") if "must" in str(error) else f"must be a number, got {text!r}"
        raise argparse.ArgumentTypeError(words) from error
    return value
