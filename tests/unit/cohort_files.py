"""Small slides and their manifests, as files."""

import csv
import os

import numpy as np
import tifffile

from ds_wsi.bags.cohort import load_cohort
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.pyramid import write_pyramid

POLICY = TilingPolicy(tile_size_px=64)


def picture(side=256, tissue=True):
    image = np.full((side, side, 3), 243, dtype=np.uint8)
    if tissue:
        noise = np.random.default_rng(side).integers(-8, 8, (side - 32, side - 32, 1))
        image[32:, 32:] = np.array([200, 110, 160]) + noise
    return image


def write_plain(path, image):
    """A TIFF that tells no resolution."""
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, tile=(64, 64), photometric="rgb", metadata=None, software=False)


def write_manifest(folder, rows, columns=("slide_id", "path", "label", "patient_id", "split", "mpp")):
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_slides(folder):
    """Good slides, and some that are refused."""
    write_pyramid(folder / "good.tiff", picture(), mpp=0.5)
    write_pyramid(folder / "other.tiff", picture(320), mpp=0.5)
    write_pyramid(folder / "dpi72.tiff", picture(), mpp=352.78)
    write_pyramid(folder / "tiny.tiff", picture(48), mpp=0.5)
    write_pyramid(folder / "blank.tiff", picture(tissue=False), mpp=0.5)
    write_plain(folder / "plain.tiff", picture())
    (folder / "text.svs").write_text("no slide")
    return folder


def row(slides, slide_id, name, label, **more):
    return {"slide_id": slide_id, "path": str(slides / name), "label": label, **more}


def two(slides, name="good.tiff", **more):
    return [row(slides, "one", name, "a", **more), row(slides, "two", "other.tiff", "b")]


def load(folder, rows, policy=POLICY, **options):
    return load_cohort(write_manifest(folder, rows), policy, need_splits=False, **options)


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def copy_to(path, source, touch=False):
    path.unlink(missing_ok=True)
    path.write_bytes(source.read_bytes())
    if touch:
        os.utime(path, (1, 1))
    return path


def one_slide(folder, path):
    return [{"slide_id": "one", "path": str(path), "label": "a"}, row(folder, "two", "other.tiff", "b")]
