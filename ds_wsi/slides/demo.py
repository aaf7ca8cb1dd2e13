"""Demo cohorts of synthetic slides: real pyramidal tiled JPEG TIFFs that OpenSlide opens like any scanner's.

Both classes hold tissue of irregular shape on white glass, holes, pen marks, and focal regions that differ from their
surroundings in colour and density. Only tumour slides hold, in two small foci, nuclei with a pale centre (rings)
instead of solid ones; a ring carries the same ink as a solid nucleus and stains vary from slide to slide, so that
neither colour nor density tells the classes apart, and most tiles of a tumour slide look normal.

The cohort "plain" is of one centre. In the cohort "stains" every slide is stained and scanned by one of ten: amounts of
stain, colours, blur, brightness and white balance differ by centre and, less, by slide. Centres of the test slides are
seen neither in training nor in validation, as those of external cohorts are. The cohort "sparse" is "stains" with half
of the tumours harder to see: few nuclei of their foci are rings. It is for encoders that know images already.
"""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFilter

from ds_wsi.runtime.files import atomic_path, read_json, write_text
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.own_files import require_ours
from ds_wsi.runtime.progress import Progress
from ds_wsi.runtime.temporary import remove_left_behind

CLASSES = ("normal", "tumor")
BASE_MPP = 0.5  # um/px at which tissue is drawn
TIFF_TILE_PX = 256
FOCUS_RADIUS_PX = 88  # at BASE_MPP: about six 64 px tiles
SOLID_RADII_PX = (3.2, 4.0, 4.8)
EOSIN = np.array([222, 150, 190], dtype=np.float32)
HAEMATOXYLIN = np.array([96, 62, 140], dtype=np.float32)
GLASS = np.array([243, 242, 245], dtype=np.float32)
MIN_SATURATION, MIN_LIGHT = 0.15, 0.2  # of what eosin stains, at a centre
RING_RATIO = 1.9  # outer radius of a ring over the solid nucleus's
MANIFEST_FIELDS = ("slide_id", "path", "label", "patient_id", "split")


@dataclass(frozen=True)
class DemoPolicy:
    """What the demo cohort holds.

    Args:
        train, validation, test: slides in each split; classes alternate, two slides per patient.
        min_side_px, max_side_px: side of the square slide at 0.5 um/px; bags differ in length by the square of it.
        seed: the seed of everything drawn.
    """

    train: int = 64
    validation: int = 16
    test: int = 20
    min_side_px: int = 352
    max_side_px: int = 832
    seed: int = 0

    foci: ClassVar[int] = 2
    contrast: ClassVar[float] = 1.0  # of nuclei
    few_rings: ClassVar[float] = 1.0  # share of the nuclei that are rings, in the foci of every other round of centres
    format_version: ClassVar[int] = 1  # of the images: a change of the drawing makes old caches stale

    def __post_init__(self) -> None:
        """Refuse a cohort that could not be split or drawn."""
        for name in ("train", "validation", "test"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2 (one slide per class), got {getattr(self, name)}")
        if not 4 * FOCUS_RADIUS_PX <= self.min_side_px <= self.max_side_px:
            raise ValueError(
                f"min_side_px must lie in [{4 * FOCUS_RADIUS_PX}, max_side_px={self.max_side_px}], "
                f"got {self.min_side_px}"
            )


@dataclass(frozen=True)
class StainsPolicy(DemoPolicy):
    """What the cohort "stains" holds: smaller slides than "plain", more of them, and tumours of more foci.

    Args:
        centres: how many the slides to train and to validate on come from; pairs of a normal and a tumour slide share
            one.
        test_centres: how many the test slides come from, all of them others.
    """

    train: int = 96
    validation: int = 24
    test: int = 32
    max_side_px: int = 576
    centres: int = 6
    test_centres: int = 4

    foci: ClassVar[int] = 4
    contrast: ClassVar[float] = 0.5  # less than stains differ by: what hides the nuclei must be normalised away
    format_version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse what `DemoPolicy` does, and splits without a centre."""
        super().__post_init__()
        for name in ("centres", "test_centres"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class SparsePolicy(StainsPolicy):
    """What the cohort "sparse" holds: the slides of "stains" with fewer foci, and in half of the tumours few rings.

    Features of a pretrained encoder tell every slide of "stains" already, so that nothing is left for training it.
    """

    foci: ClassVar[int] = 3
    few_rings: ClassVar[float] = 0.06
    format_version: ClassVar[int] = 3


DEMOS: dict[str, type[DemoPolicy]] = {"plain": DemoPolicy, "stains": StainsPolicy, "sparse": SparsePolicy}


@dataclass(frozen=True)
class Centre:
    """How a laboratory stains and a scanner sees.

    Args:
        stain: factors of the optical density of red, green and blue.
        gamma: the exponent of the transmitted light.
        white: factors of red, green and blue, brightness included.
        blur_px: standard deviation at BASE_MPP.
    """

    stain: tuple[float, float, float]
    gamma: float
    white: tuple[float, float, float]
    blur_px: float

    @classmethod
    def draw(cls, seed: int, number: int) -> "Centre":
        """The centre of this number, alike in every cohort of the seed."""
        rng = np.random.default_rng([seed, 77, number])
        while True:
            amount, colour = rng.uniform(-0.3, 0.6), rng.normal(0, 0.25, 3)
            white, bright = rng.uniform(-0.04, 0.04, 3), rng.uniform(-0.12, 0.05)
            blur, gamma = rng.uniform(0, 0.9), rng.uniform(-0.25, 0.25)
            drawn = cls(_triple(np.exp(amount + colour)), math.exp(gamma), _triple((1 + white) * (1 + bright)), blur)
            if drawn.shows_tissue:
                return drawn

    def of_slide(self, rng: np.random.Generator) -> "Centre":
        """The same centre on another day."""
        while True:
            stain = np.array(self.stain) * np.exp(rng.normal(0, 0.15) + rng.normal(0, 0.08, 3))
            gamma = self.gamma * math.exp(rng.normal(0, 0.06))
            white = np.array(self.white) * (1 + rng.normal(0, 0.01, 3)) * (1 + rng.normal(0, 0.03))
            drawn = Centre(_triple(stain), gamma, _triple(white), max(0.0, self.blur_px + rng.normal(0, 0.1)))
            if drawn.shows_tissue:
                return drawn

    @property
    def shows_tissue(self) -> bool:
        """Whether tissue is told from glass and pen: what is paler or greyer is glass, what is darker is pen."""
        pale, inked = self.light(EOSIN), self.light((EOSIN + GLASS) / 2)
        saturation = min(1 - float(shown.min() / shown.max()) for shown in (pale, inked))
        return saturation > MIN_SATURATION and float(pale.min()) > MIN_LIGHT

    def light(self, colours: np.ndarray) -> np.ndarray:
        """Colours [..., 3] in [0, 255] as this centre shows them, in [0, 1] and a little above."""
        density = -np.log((colours.astype(np.float32) + 1) / 256) * np.array(self.stain, dtype=np.float32)
        return np.exp(-density * self.gamma) * np.array(self.white, dtype=np.float32)

    def scan(self, image: np.ndarray) -> np.ndarray:
        """A slide, uint8 [H, W, 3], as this centre shows it."""
        picture = Image.fromarray(np.clip(self.light(image) * 255, 0, 255).astype(np.uint8))
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(self.blur_px)))


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def make_demo(directory: str | Path, policy: DemoPolicy | None = None) -> Path:
    """Write a demo cohort once and return its manifest's path.

    A finished cohort drawn with the same policy is kept as it is; slides of an interrupted one are completed. The
    manifest is written last, so that its presence means that every slide is whole.

    Raises:
        ValueError: the directory holds a cohort of another policy.
    """
    policy = policy or DemoPolicy()
    directory = Path(directory)
    manifest, stamp = directory / "manifest.csv", directory / "demo.json"
    recipe = {"format_version": policy.format_version, **asdict(policy)}
    if stamp.exists() and read_json(stamp, "the demo's policy") != recipe:
        raise ValueError(
            f"{directory} must hold the demo of this policy, got another ({stamp} differs). "
            "HINT: delete the folder, or give another --demo_dir."
        )
    if manifest.exists() and stamp.exists():
        return manifest
    remove_left_behind(directory / "slides")
    require_ours(manifest, lambda _: stamp.exists(), "the demo's folder")
    write_text(stamp, json.dumps(recipe))
    rows = list(_rows(policy))
    logger.info("drawing %d demo slides in %s", len(rows), directory)
    for index, row in Progress("demo slides", "slide", len(rows)).over(enumerate(rows)):
        path = directory / row["path"]
        if not path.exists():
            rng = np.random.default_rng([policy.seed, policy.format_version, index])
            write_demo_slide(
                path,
                tumor=row["label"] == "tumor",
                side_px=_side_px(index, policy),
                rng=rng,
                foci=policy.foci,
                contrast=policy.contrast,
                rings=_rings(index, policy),
                centre=_centre(index, policy),
            )
    with atomic_path(manifest) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, MANIFEST_FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def is_drawn(directory: str | Path, policy: DemoPolicy) -> bool:
    """Whether a folder holds the whole demo cohort of this policy, so that `make_demo` would write nothing."""
    stamp = Path(directory) / "demo.json"
    if not (stamp.is_file() and (Path(directory) / "manifest.csv").is_file()):
        return False
    recipe = {"format_version": policy.format_version, **asdict(policy)}
    return bool(read_json(stamp, "the demo's policy") == recipe)


def _rows(policy: DemoPolicy) -> Iterator[dict[str, str]]:
    index = 0
    for split, count in (("train", policy.train), ("validation", policy.validation), ("test", policy.test)):
        for k in range(count):
            # Slides k and k+2 of a split, the same class, belong to one patient.
            patient = f"{split}_p{k // 4 * 2 + k % 2:02d}"
            slide_id = f"demo_{index:03d}"
            yield dict(
                zip(MANIFEST_FIELDS, (slide_id, f"slides/{slide_id}.tiff", CLASSES[k % 2], patient, split), strict=True)
            )
            index += 1


def _centre(index: int, policy: DemoPolicy) -> Centre | None:
    """The centre of a slide; both slides of a pair, one of each class, have the same."""
    if not isinstance(policy, StainsPolicy):
        return None
    pair, centres, first = _pair(index, policy)
    return Centre.draw(policy.seed, first + pair % centres)


def _rings(index: int, policy: DemoPolicy) -> float:
    """The share of rings in a tumour's foci: few in every other round, so that each centre has both kinds."""
    if not isinstance(policy, StainsPolicy):
        return 1.0
    pair, centres, _ = _pair(index, policy)
    return policy.few_rings if pair // centres % 2 else 1.0


def _pair(index: int, policy: StainsPolicy) -> tuple[int, int, int]:
    """A slide's pair in its part of the cohort, seen or test, and the centres there: how many, the first's number."""
    before_test = policy.train + policy.validation
    if index < before_test:
        return index // 2, policy.centres, 0
    return (index - before_test) // 2, policy.test_centres, policy.centres


def _side_px(index: int, policy: DemoPolicy) -> int:
    # Consecutive pairs (one slide of each class) share a side: the bag's length does not tell the class.
    phase = (index // 2 * 0.618034) % 1.0  # golden ratio: every split holds short and long bags
    side = policy.min_side_px + phase * (policy.max_side_px - policy.min_side_px)
    return round(side / 64) * 64


def write_demo_slide(
    path: Path,
    *,
    tumor: bool,
    side_px: int,
    rng: np.random.Generator,
    foci: int = DemoPolicy.foci,
    contrast: float = DemoPolicy.contrast,
    rings: float = DemoPolicy.few_rings,
    centre: Centre | None = None,
) -> None:
    """Draw one slide and write it as a pyramidal tiled JPEG TIFF with its mpp in the resolution tags.

    Half of the slides are stored at 0.25 um/px ("40x"), half at 0.5 ("20x"), as cohorts of two scanners are.
    """
    image = draw_slide(tumor=tumor, side_px=side_px, rng=rng, foci=foci, contrast=contrast, rings=rings)
    # No pen on what another centre has stained: the ink can be so much more saturated than pale tissue that Otsu's
    # threshold lies between these two, and the slide has no tissue.
    image = _pen_marks(image, rng) if centre is None else centre.of_slide(rng).scan(image)
    scale = int(rng.integers(1, 3))
    if scale == 2:
        picture = Image.fromarray(image)
        image = np.asarray(picture.resize((side_px * 2, side_px * 2), Image.Resampling.BICUBIC))
    write_pyramid(path, image, mpp=BASE_MPP / scale)


def draw_slide(
    *,
    tumor: bool,
    side_px: int,
    rng: np.random.Generator,
    foci: int = DemoPolicy.foci,
    contrast: float = DemoPolicy.contrast,
    rings: float = DemoPolicy.few_rings,
) -> np.ndarray:
    """Return one slide at 0.5 um/px, without pen marks: uint8 [side, side, 3].

    Args:
        tumor: whether the slide is of this class.
        side_px: side of the square slide.
        rng: draws everything.
        foci: how many a tumour has.
        contrast: how far the nuclei stand out.
        rings: share of the foci's nuclei that are rings, in [0, 1].
    """
    tissue = _tissue(side_px, rng)
    places = _focus_centres(tissue, rng, count=2 + foci)
    crowded, pale = _disc_field(side_px, places[:1]), _disc_field(side_px, places[1:2])
    lesion = _disc_field(side_px, places[2:]) if tumor else np.zeros_like(tissue)
    density = (0.0055 + 0.006 * crowded - 0.003 * pale) * (tissue > 0.5)  # nuclei per px
    share = rings * (lesion >= 0.5)
    solid = _nuclei(density * (1 - share), _solid_kernels(), rng)
    pale_centred = _nuclei(density * share, _ring_kernels(), rng)
    return _stain(tissue, contrast * np.clip(solid + pale_centred, 0, 1), pale, rng)


def _smooth_noise(side_px: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    grid = rng.normal(size=(cells, cells)).astype(np.float32)
    picture = Image.fromarray(grid).resize((side_px, side_px), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _tissue(side_px: int, rng: np.random.Generator) -> np.ndarray:
    """An irregular blob with holes: float32 [side, side], 1 inside, soft at the edge."""
    y, x = np.mgrid[0:side_px, 0:side_px].astype(np.float32) / side_px - 0.5
    angle, squeeze = rng.uniform(0, math.pi), rng.uniform(0.8, 1.0)
    u, v = x * math.cos(angle) + y * math.sin(angle), (y * math.cos(angle) - x * math.sin(angle)) / squeeze
    outline = 0.40 - np.hypot(u, v) + 0.05 * _smooth_noise(side_px, 6, rng)
    holes = 1.5 - _smooth_noise(side_px, max(6, side_px // 96), rng)
    return np.clip(np.minimum(outline * side_px / 4, holes * 8), 0, 1)


def _focus_centres(tissue: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Centres [count, 2] (y, x) inside the tissue, as far from each other as a few tries find."""
    inside = np.argwhere(tissue > 0.99)
    tries = inside[rng.integers(0, len(inside), size=(64, count))]
    gaps = np.linalg.norm(tries[:, :, None] - tries[:, None, :], axis=-1) + np.eye(count) * tissue.shape[0]
    return tries[gaps.min(axis=(1, 2)).argmax()]


def _disc_field(side_px: int, centres: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[0:side_px, 0:side_px]
    field = np.zeros((side_px, side_px), dtype=np.float32)
    for cy, cx in centres:
        field = np.maximum(field, np.hypot(y - cy, x - cx) < FOCUS_RADIUS_PX)
    return field


def _kernel(outer_px: float, inner_px: float) -> np.ndarray:
    reach = math.ceil(outer_px) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    r = np.hypot(x, y)
    return np.clip(outer_px - r + 0.5, 0, 1) - np.clip(inner_px - r + 0.5, 0, 1)


def _solid_kernels() -> list[np.ndarray]:
    return [_kernel(r, -1.0) for r in SOLID_RADII_PX]


def _ring_kernels() -> list[np.ndarray]:
    # outer^2 - inner^2 = r^2: a ring of the same ink as the solid nucleus of radius r.
    return [_kernel(RING_RATIO * r, r * math.sqrt(RING_RATIO**2 - 1)) for r in SOLID_RADII_PX]


def _nuclei(density: np.ndarray, kernels: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Stamp kernels at Poisson points of the given density per pixel; overlapping ink adds up."""
    side = density.shape[0]
    ink = np.zeros((side + 32, side + 32), dtype=np.float32)
    for kernel in kernels:
        reach = kernel.shape[0] // 2
        for cy, cx in np.argwhere(rng.random(density.shape) < density / len(kernels)):
            top, left = cy + 16 - reach, cx + 16 - reach
            ink[top : top + kernel.shape[0], left : left + kernel.shape[1]] += kernel
    return ink[16:-16, 16:-16]


def _stain(tissue: np.ndarray, nuclei: np.ndarray, pale: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    eosin = EOSIN + rng.normal(0, 4, 3)
    haematoxylin = HAEMATOXYLIN + rng.normal(0, 4, 3)
    side = tissue.shape[0]
    fibres = (0.10 * _smooth_noise(side, side // 10, rng) + 0.08 * _smooth_noise(side, 8, rng) - 0.25 * pale)[..., None]
    ground = eosin + np.clip(fibres, -0.4, 0.4) * (eosin - GLASS)
    inked = ground + nuclei[..., None] * 0.85 * (haematoxylin - ground)
    image = GLASS + tissue[..., None] * (inked - GLASS) + rng.normal(0, 2.5, (side, side, 1))
    return np.clip(image, 0, 255).astype(np.uint8)


def _pen_marks(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    side = image.shape[0]
    colour = [(30, 60, 160), (20, 120, 60), (15, 15, 20)][int(rng.integers(3))]
    corner = rng.uniform(0.03, 0.12, 2) * side
    points = [tuple(corner + np.array([t * side * 0.35, side * 0.03 * math.sin(9 * t)])) for t in np.linspace(0, 1, 24)]
    draw.line(points, fill=colour, width=max(6, side // 90))
    return np.asarray(picture)


def write_pyramid(path: Path, image: np.ndarray, mpp: float, min_side_px: int = 192) -> None:
    """Write uint8 [H, W, 3] as a tiled JPEG TIFF, halved level by level while its shorter side is >= min_side_px."""
    pixels_per_cm = 1e4 / mpp
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
        level, downsample = Image.fromarray(image), 1
        while True:
            tiff.write(
                np.asarray(level),
                tile=(TIFF_TILE_PX, TIFF_TILE_PX),
                photometric="rgb",  # of the input; stored as YCbCr
                subsampling=(1, 1),
                compression="jpeg",
                compressionargs={"level": 88},
                subfiletype=0 if downsample == 1 else 1,
                resolution=(pixels_per_cm / downsample, pixels_per_cm / downsample),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
            )
            if min(level.size) // 2 < min_side_px:
                return
            level = level.reduce(2)
            downsample *= 2
