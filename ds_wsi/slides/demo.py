"""Demo cohorts of synthetic slides: real pyramidal tiled JPEG TIFFs that OpenSlide opens like any scanner's.

Both classes hold tissue of irregular shape on white glass, holes, pen marks, and focal regions that differ from their
surroundings in colour and density. Only tumour slides hold, in two small foci, nuclei with a pale centre (rings)
instead of solid ones; a ring carries the same ink as a solid nucleus and stains vary from slide to slide, so that
neither colour nor density tells the classes apart, and most tiles of a tumour slide look normal.

The cohort "plain" is of one centre. In the cohort "stains" every slide is stained and scanned by one of ten: amounts of
stain, colours, blur, brightness and white balance differ by centre and, less, by slide. Centres of the test slides are
seen neither in training nor in validation, as those of external cohorts are. The cohort "sparse" is "stains" with half
of the tumours harder to see: few nuclei of their foci are rings. It is for encoders that know images already. The
cohort "graded" is of one centre, with targets for every kind of task: see `demo_targets`.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ds_wsi.runtime.files import atomic_path, read_json, write_text
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.own_files import require_ours
from ds_wsi.runtime.progress import Progress
from ds_wsi.runtime.temporary import remove_left_behind
from ds_wsi.slides.demo_centres import Centre
from ds_wsi.slides.demo_drawing import FOCUS_RADIUS_PX, draw_slide, pen_marks
from ds_wsi.slides.demo_targets import TARGETS_DEMO, Findings, findings_of, targets_of
from ds_wsi.slides.pyramid import write_pyramid

CLASSES = ("normal", "tumor")
BASE_MPP = 0.5  # um/px at which tissue is drawn
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


@dataclass(frozen=True)
class GradedPolicy(DemoPolicy):
    """What the cohort "graded" holds: slides of one size, of patients with more and less tumour.

    One size, because what tells a patient's targets is how much of the tissue is tumour.
    """

    train: int = 96
    validation: int = 32
    test: int = 48
    min_side_px: int = 512
    max_side_px: int = 512

    format_version: ClassVar[int] = 5


DEMOS: dict[str, type[DemoPolicy]] = {
    "plain": DemoPolicy,
    "stains": StainsPolicy,
    "sparse": SparsePolicy,
    TARGETS_DEMO: GradedPolicy,
}


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
                foci=_foci(index, policy),
                contrast=policy.contrast,
                rings=_rings(index, policy),
                centre=_centre(index, policy),
            )
    with atomic_path(manifest) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
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
            patient = f"{split}_p{_patient_number(k):02d}"
            slide_id = f"demo_{index:03d}"
            label, targets = CLASSES[k % 2], {}
            if isinstance(policy, GradedPolicy):
                findings = findings_of(_patient_number(k))
                label, targets = CLASSES[findings.foci > 0], targets_of(findings, policy.seed, patient, index)
            values = (slide_id, f"slides/{slide_id}.tiff", label, patient, split)
            yield {**dict(zip(MANIFEST_FIELDS, values, strict=True)), **targets}
            index += 1


def _patient_number(k: int) -> int:
    """The number, in its split, of the patient whose slide k of the split is."""
    return k // 4 * 2 + k % 2


def _findings(index: int, policy: GradedPolicy) -> Findings:
    """What a slide of the cohort "graded" holds, by its number in the cohort."""
    for count in (policy.train, policy.validation):
        if index < count:
            break
        index -= count
    return findings_of(_patient_number(index))


def _foci(index: int, policy: DemoPolicy) -> int:
    """How many foci a tumour has."""
    return _findings(index, policy).foci if isinstance(policy, GradedPolicy) else policy.foci


def _centre(index: int, policy: DemoPolicy) -> Centre | None:
    """The centre of a slide; both slides of a pair, one of each class, have the same."""
    if not isinstance(policy, StainsPolicy):
        return None
    pair, centres, first = _pair(index, policy)
    return Centre.draw(policy.seed, first + pair % centres)


def _rings(index: int, policy: DemoPolicy) -> float:
    """The share of rings in a tumour's foci: few in every other round, so that each centre has both kinds."""
    if isinstance(policy, GradedPolicy):
        return _findings(index, policy).rings
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
    image = pen_marks(image, rng) if centre is None else centre.of_slide(rng).scan(image)
    scale = int(rng.integers(1, 3))
    if scale == 2:
        picture = Image.fromarray(image)
        image = np.asarray(picture.resize((side_px * 2, side_px * 2), Image.Resampling.BICUBIC))
    write_pyramid(path, image, mpp=BASE_MPP / scale)
