"""What a user asks of the reading of slides and of augmentation."""

from dataclasses import dataclass

from ds_wsi.runtime.bounds import MOST_BLUR_PX, MOST_WORKERS, require_at_most
from ds_wsi.runtime.setting import SWITCH, Decides, setting, size_or_none, tiles_or_all
from ds_wsi.slides.policy import AUTO, READERS

CHUNK_BYTES = 24 * 2**20  # of the tiles of a request
READ_TIMEOUT_S = 600.0  # a network file system that comes back mostly does so within minutes
FEATURES_MEMORY_BYTES = 2 * 2**30  # a cohort of 500 slides of 1,000 tiles and width 1,024
CHECKS = ("full", "shapes")  # of files of features


@dataclass(frozen=True)
class ReadPolicy:
    """How tiles are read.

    Args:
        workers: reading processes; 0 reads in the training process.
        tiles_per_slide: tiles of each training slide, drawn anew each epoch without repeats; None takes all.
        tiles_per_bag: the most tiles of a training bag; a patient's slides share it in proportion to their tiles; None
            takes all.
        chunk_tiles: tiles per request at the most; 0 takes as many as 24 MiB hold, 128 of 256 px (a request of less
            costs more to hand over, relative to its reading).
        open_slides: slides each worker keeps open.
        max_failed_fraction: the share of the cohort's tiles that may fail to read before the run stops.
        tile_store: folder that `ds-wsi tile --store` wrote, read in the slides' place; empty reads the slides.
        slide_reader: what reads a slide's pixels, which are the same: "auto", its own JPEG tiles directly where that is
            proved to give OpenSlide's pixels; "openslide", OpenSlide alone.
        features_memory_bytes: bytes of features on disk that each process keeps in memory once they are read, and no
            more than a fourth of what is free there; 0 reads the files anew each time.
        timeout_s: how long tiles that are due are waited for before the run stops; 0 waits for ever, as reading in the
            training process always does.
    """

    workers: int = setting(
        1,
        "number of processes that read tiles beside the one that trains",
        Decides.NOTHING,
        option="dataloader_num_workers",
    )
    tiles_per_slide: int | None = setting(
        None,
        "number of tiles that are drawn of each training slide in each epoch, such as 512, or all",
        Decides.RESULT,
        option="tiles_per_slide",
        kind=tiles_or_all,
        words="all",
    )
    tiles_per_bag: int | None = setting(
        None,
        "most tiles of each training bag in each epoch, which a patient's slides share in proportion to their tiles",
        Decides.RESULT,
        option="tiles_per_bag",
        kind=tiles_or_all,
        words="all",
    )
    chunk_tiles: int = setting(
        0, "largest number of tiles of a request to a reading process; 0 takes as many as 24 MiB hold", Decides.NOTHING
    )
    open_slides: int = setting(4, "number of slides that each reading process keeps open", Decides.NOTHING)
    max_failed_fraction: float = setting(
        0.01,
        "share of all tiles, 0 to 1, that may fail to be read before the run stops",
        Decides.NOTHING,
        option="max_failed_fraction",
    )
    tile_store: str = setting(
        "",
        "folder that `ds-wsi tile --store` wrote: tiles are read from it in place of the slides",
        Decides.RESOLVED,
        resolved="from_tile_store",
        option="tile_store",
        words="none, the slides are read",
    )
    slide_reader: str = setting(
        AUTO,
        "what reads the slides' pixels: auto takes their own JPEG tiles where that is proved to give OpenSlide's "
        "pixels, several times faster; openslide takes OpenSlide alone",
        Decides.NOTHING,
        option="slide_reader",
        kind=READERS,
    )
    features_memory_bytes: int = setting(
        FEATURES_MEMORY_BYTES,
        "memory in which each process keeps features on disk once they are read, such as 8GiB, and no more than a "
        "fourth of what is free; 0 reads the files anew in each epoch",
        Decides.NOTHING,
        option="features_memory",
        kind=size_or_none,
        words="2GiB",
    )
    timeout_s: float = setting(
        READ_TIMEOUT_S,
        "seconds that tiles which are due are waited for before the command gives up; 0 waits for ever",
        Decides.NOTHING,
        option="read_timeout",
    )

    def __post_init__(self) -> None:
        """Refuse counts that cannot be read with."""
        for name, least in (("workers", 0), ("chunk_tiles", 0), ("open_slides", 1), ("features_memory_bytes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.slide_reader not in READERS:
            raise ValueError(f"slide_reader must be one of {', '.join(READERS)}, got {self.slide_reader!r}")
        require_at_most("workers", self.workers, MOST_WORKERS)
        if self.tiles_per_slide is not None and self.tiles_per_slide < 1:
            raise ValueError(f"tiles_per_slide must be at least 1, or null for all, got {self.tiles_per_slide}")
        if self.tiles_per_bag is not None and self.tiles_per_bag < 1:
            raise ValueError(f"tiles_per_bag must be at least 1, or null for all, got {self.tiles_per_bag}")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction must be in [0, 1], got {self.max_failed_fraction}")
        if not 0 <= self.timeout_s < float("inf"):
            raise ValueError(f"--read_timeout must be at least 0 seconds, got {self.timeout_s}. HINT: 0 has no limit.")

    def tiles_a_chunk(self, tile_size_px: int) -> int:
        """Tiles of this side a request."""
        return self.chunk_tiles or max(1, CHUNK_BYTES // (3 * tile_size_px**2))


@dataclass(frozen=True)
class AugmentPolicy:
    """What may change between two readings of a slide; applied in the order of the fields, 0 leaves a thing alone.

    Args:
        flips: flip and rotate by quarter turns (the eight symmetries of a tile).
        colour: largest relative change of each channel's gain, and of its offset, in [0, 1); applied last.
        rotation: largest angle in degrees, either way; corners are filled by reflection, bilinear.
        stain: strength of the jitter of haematoxylin, eosin and residual: see `shift_stains`.
        brightness, contrast, saturation: largest relative change, in [0, 1]; contrast about a tile's own mean grey.
        hue: largest change, in [0, 0.5] of the colour circle.
        blur: largest standard deviation of the Gaussian blur, in px.
        blur_probability: the probability that a slide is blurred.
    """

    flips: bool = setting(
        True,
        "draw one of the eight symmetries (flips and quarter turns) for each tile",
        Decides.RESULT,
        option="augment_flips",
        kind=SWITCH,
    )
    colour: float = setting(
        0.1,
        "largest relative change of a colour channel, one draw per slide; 0.1 is 10%",
        Decides.RESULT,
        option="augment_colour",
    )
    rotation: float = setting(
        0.0, "largest angle, in degrees, by which a tile is turned", Decides.RESULT, option="augment_rotation"
    )
    stain: float = setting(
        0.0,
        "largest relative change of a stain's amount, haematoxylin or eosin, one draw per slide",
        Decides.RESULT,
        option="augment_stain",
    )
    brightness: float = setting(
        0.0,
        "largest relative change of the brightness, one draw per slide",
        Decides.RESULT,
        option="augment_brightness",
    )
    contrast: float = setting(
        0.0, "largest relative change of the contrast, one draw per slide", Decides.RESULT, option="augment_contrast"
    )
    saturation: float = setting(
        0.0,
        "largest relative change of the saturation, one draw per slide",
        Decides.RESULT,
        option="augment_saturation",
    )
    hue: float = setting(
        0.0,
        "largest turn of the hue, as a share of the colour circle, 0 to 0.5, one draw per slide",
        Decides.RESULT,
        option="augment_hue",
    )
    blur: float = setting(
        0.0,
        "largest standard deviation, in px, of a Gaussian blur, one draw per slide",
        Decides.RESULT,
        option="augment_blur",
    )
    blur_probability: float = setting(
        0.5,
        "probability, 0 to 1, that a slide is blurred at all",
        Decides.RESULT,
        option="augment_blur_probability",
        needs=("blur", ()),
    )

    def __post_init__(self) -> None:
        """Refuse a jitter that could invert a channel, and other values out of range."""
        if not 0 <= self.colour < 1:
            raise ValueError(f"colour must be in [0, 1), got {self.colour}")
        if not 0 <= self.stain < 1:
            raise ValueError(f"stain must be in [0, 1), got {self.stain}")
        largest = {"rotation": 180, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5, "blur": MOST_BLUR_PX}
        for name, most in {**largest, "blur_probability": 1}.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(f"{name} must be in [0, {most:g}], got {value}")
