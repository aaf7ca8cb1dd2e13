"""The slides that a run is given."""

from dataclasses import dataclass

from ds_wsi.bags.policy import CHECKS
from ds_wsi.models.choices import BAGS
from ds_wsi.runtime.setting import Decides, numbers, ordered_names, ratio, setting
from ds_wsi.slides.policy import DEMO_DIRS, parse_slide_mpp, require_slide_mpp


@dataclass(frozen=True)
class DataSettings:
    """The slides."""

    manifest: str | None = setting(
        None,
        "table of the slides: CSV, JSON, Parquet or a saved dataset; docs/tables.md has its columns",
        Decides.RESOLVED,
        resolved="slides",
        option="manifest",
        words="the demo cohort's",
        column=True,
    )
    demo: str = setting(
        "plain",
        "demo cohort to train on without --manifest: of one centre, of ten whose stains and scanners differ, of "
        "these with tumours that are harder to see, or of one centre with targets for every --task",
        Decides.RESOLVED,
        resolved="slides",
        option="demo",
        kind=tuple(DEMO_DIRS),
        column=True,
    )
    demo_dir: str | None = setting(
        None,
        "folder that keeps the demo slides",
        Decides.NOTHING,
        option="demo_dir",
        words="a folder of theirs below runs/",
    )
    bag: str = setting(
        BAGS[0],
        "what a bag holds: the tiles of a slide, or those of all slides of a patient, by the column patient_id",
        Decides.RESULT,
        option="bag",
        kind=BAGS,
    )
    mpps: tuple[float, ...] = setting(
        (),
        "resolutions of the tiles in a bag where it holds several, in um/px, the finest first, such as 0.5,2.0; they "
        "take the place of --mpp",
        Decides.RESULT,
        option="mpps",
        kind=numbers,
        words="one, --mpp",
        group="tiles",
    )
    scale_ratio: tuple[int, ...] = setting(
        (),
        "shares of the --mpps in the tiles that are drawn of a slide, such as 4:1",
        Decides.RESULT,
        option="scale_ratio",
        kind=ratio,
        words="as many as there are of each",
        group="tiles",
        needs=("mpps", ()),
    )
    tiles_dir: str | None = setting(
        None,
        "folder that keeps each slide's tile coordinates, so that another run need not look for them again",
        Decides.NOTHING,
        option="tiles_dir",
        words="in the run's folder",
        group="tiles",
    )
    classes: tuple[str, ...] | None = setting(
        None,
        "names of the classes in the order of the model's outputs, comma-separated, such as normal,tumor; of grades "
        "from low to high, low<high",
        Decides.RESOLVED,
        resolved="classes",
        option="classes",
        kind=ordered_names,
        words="the labels of the manifest, sorted",
    )
    positive_class: str | None = setting(
        None,
        "class whose F1 is told, where there are two; it becomes the second",
        Decides.RESOLVED,
        resolved="classes",
        option="positive_class",
        words="the second",
    )
    slide_mpp: float | None = setting(
        None,
        "resolution in um/px of slides whose files do not tell theirs, such as 0.25",
        Decides.RESOLVED,
        resolved="grids",
        option="slide_mpp",
        kind=parse_slide_mpp,
        metavar="X",
        words="none, such slides are refused",
    )
    tissue_masks: str | None = setting(
        None,
        "folder of masks, <slide_id>.geojson (QuPath's) or .png, that say where tissue is; slides without one go "
        "by --tissue",
        Decides.RESOLVED,
        resolved="grids",
        option="tissue_masks",
        words="none",
    )
    masks_in_bounds: bool = setting(
        False,
        "count the masks' places from the scanned area's corner, as QuPath does, and not from level 0's",
        Decides.RESOLVED,
        resolved="grids",
        option="masks_in_bounds",
    )
    skip_bad_slides: bool = setting(
        False,
        "leave out slides that cannot be used, and list them",
        Decides.RESOLVED,
        resolved="slides",
        option="skip_bad_slides",
    )
    dataset_name: str | None = setting(
        None,
        "name of the dataset in tables of runs",
        Decides.NAME,
        option="dataset_name",
        words="the manifest's name without its suffix",
        column=True,
    )
    split_seed: int = setting(
        0,
        "seed of the draw of train, validation and test, where the manifest has no splits; --seed has no part in it",
        Decides.RESOLVED,
        resolved="slides",
        option="split_seed",
        column=True,
    )
    split_name: str = setting(
        "",
        "name of the split or fold that the manifest holds, such as fold_0, in tables of runs",
        Decides.NAME,
        option="split_name",
        words="none",
        column=True,
    )
    features_dir: str | None = setting(
        None,
        "train the aggregator alone, on the features in this folder, a file per slide",
        Decides.RESOLVED,
        resolved="features",
        option="features_dir",
        words="none, an encoder computes them",
        column=True,
    )
    check_features: str = setting(
        "full",
        "whether every file of features is read whole before training (full), or its head alone (shapes)",
        Decides.NOTHING,
        option="check_features",
        kind=CHECKS,
    )

    def __post_init__(self) -> None:
        """Refuse a demo beside a cohort, and a resolution that is none."""
        if self.mpps and (len(self.mpps) < 2 or list(self.mpps) != sorted(set(self.mpps))):
            raise ValueError(
                f"--mpps must be two resolutions or more, the finest first, got {','.join(map(str, self.mpps))}. HINT: "
                "--mpps 0.5,2.0; one alone is --mpp."
            )
        if self.bag not in BAGS:
            raise ValueError(f"--bag must be one of {', '.join(BAGS)}, got {self.bag!r}")
        if self.manifest is not None and self.demo != "plain":
            raise ValueError(f"--demo must not be given with --manifest, got {self.demo}. HINT: leave out one of them.")
        require_slide_mpp(self.slide_mpp)

    @property
    def joined_by(self) -> str:
        """The option by which a bag is of several slides or magnifications, as users give it; empty: of one."""
        return "--bag patient" if self.bag == "patient" else "--mpps" if self.mpps else ""

    @property
    def demo_folder(self) -> str:
        """Where the demo cohort is kept."""
        return self.demo_dir or DEMO_DIRS[self.demo]
