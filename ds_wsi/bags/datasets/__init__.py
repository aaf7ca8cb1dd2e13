"""Readers of public cohorts as they are distributed: official folders and label files in, a checked Manifest out."""

from collections.abc import Callable

from ds_wsi.bags.datasets.camelyon16 import read_camelyon16
from ds_wsi.bags.datasets.camelyon17 import read_camelyon17
from ds_wsi.bags.datasets.panda import read_panda
from ds_wsi.bags.datasets.tcga import read_tcga
from ds_wsi.bags.manifest import Manifest

__all__ = ["DATASETS", "read_camelyon16", "read_camelyon17", "read_panda", "read_tcga"]

DATASETS: dict[str, Callable[..., Manifest]] = {
    "camelyon16": read_camelyon16,
    "camelyon17": read_camelyon17,
    "panda": read_panda,
    "tcga": read_tcga,
}
