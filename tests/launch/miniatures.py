"""Cohorts in miniature, with the folders, file names and label files that their distributors give them."""

import csv
from pathlib import Path

import numpy as np

from ds_wsi.slides.pyramid import write_pyramid

CAMELYON16 = [
    ("normal_001.tif", "normal", "negative", "0"),
    ("normal_034.tif", "normal", "negative", "0"),
    ("tumor_012.tif", "tumor", "micro", "1"),
    ("tumor_024.tif", "tumor", "macro", "0"),
    ("test_001.tif", "tumor", "macro", "1"),
    ("test_003.tif", "normal", "negative", "0"),
]
CAMELYON17 = [
    ("patient_004.zip", "pN1"),
    ("patient_004_node_0.tif", "negative"),
    ("patient_004_node_4.tif", "macro"),
    ("patient_020.zip", "pN0(i+)"),
    ("patient_020_node_1.tif", "itc"),
    ("patient_099.zip", "pN1mi"),
    ("patient_099_node_2.tif", "micro"),
]
PANDA = [
    ("0005f7aaab2800f6170c399693a96917", "karolinska", "0", "0+0"),
    ("000920ad0b612851f8e01bcc880d9b3d", "karolinska", "0", "0+0"),
    ("0018ae58b01bdadc8e347995b69f99aa", "radboud", "4", "4+4"),
    ("001c62abd11fa4b57bf7a6c603a11bb9", "radboud", "0", "negative"),
    ("003a91841da04a5a31f808fb5c21538a", "karolinska", "1", "3+3"),
]
TCGA = [
    ("TCGA-83-5908", "adenocarcinoma", "Site-28", "TCGA-83-5908-01Z-00-DX1.381c8f82-61a0-4e9d-982d-1ad0af7bead9"),
    ("TCGA-83-5908", "adenocarcinoma", "Site-28", "TCGA-83-5908-01Z-00-DX2.00000000-61a0-4e9d-982d-1ad0af7bead9"),
    ("TCGA-21-1082", "squamous", "Site-3", "TCGA-21-1082-01Z-00-DX1.cae5bbaa-76f5-416d-b532-16cf773e017e"),
]
CUSTOM = [(f"case_{number}", ("wt", "mutant")[number % 2], f"P{number // 2}") for number in range(8)]


def table(path, heading, rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([heading, *rows])
    return path


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def panda(root, rows=PANDA):
    table(root / "train.csv", ("image_id", "data_provider", "isup_grade", "gleason_score"), rows)
    return touch(root, *(f"train_images/{row[0]}.tiff" for row in PANDA))


def camelyon16(root, rows=CAMELYON16):
    table(root / "reference.csv", ("image", "type", "class", "center"), rows)
    for row in CAMELYON16:
        kind = row[0].split("_")[0]
        touch(root / ("testing/images" if kind == "test" else f"training/{kind}"), row[0])
    return root


def camelyon17(root, rows=CAMELYON17):
    table(root / "stage_labels.csv", ("patient", "stage"), rows)
    slides = [name for name, _ in CAMELYON17 if name.endswith(".tif")]
    return touch(root, *(f"training/center_{int(name[8:11]) // 20}/{name}" for name in slides))


def tcga(root, rows=TCGA):
    table(root / "labels.csv", ("patient", "subtype", "site", "slide"), rows)
    return touch(root, *(f"downloads/{index}/{row[3]}.svs" for index, row in enumerate(TCGA)))


def custom(root, rows=CUSTOM):
    table(root / "mutations.csv", ("image", "egfr", "case"), rows)
    return touch(root, *(f"scans/{row[0]}.svs" for row in CUSTOM))


def draw(root: Path, mpp: float = 0.5, side_px: int = 160) -> Path:
    """Make every empty image below `root` a slide of tissue that tells its resolution in the TIFF's tags alone."""
    empty = sorted(path for path in root.rglob("*") if path.suffix in (".tif", ".tiff", ".svs"))
    for number, path in enumerate(path for path in empty if path.stat().st_size == 0):
        rng = np.random.default_rng(number)
        image = np.full((side_px, side_px, 3), 243, dtype=np.uint8)
        # As pale as glass on one side, so that tiling has something to leave out.
        tissue = image[:, : 3 * side_px // 4]
        tissue[:] = np.array([200, 110, 160]) + rng.integers(-30, 30, (side_px, 1, 1)) // (1 + number % 2)
        tissue[:] = np.clip(tissue.astype(int) + rng.integers(-12, 12, tissue.shape), 0, 255)
        write_pyramid(path, image, mpp)
    return root
