"""Readers of cohorts: public ones as they are distributed, and any with a CSV; a checked Manifest comes out."""

from collections.abc import Callable

from ds_wsi.bags.datasets.camelyon16 import read_camelyon16
from ds_wsi.bags.datasets.camelyon17 import read_camelyon17
from ds_wsi.bags.datasets.custom import read_custom
from ds_wsi.bags.datasets.panda import read_panda
from ds_wsi.bags.datasets.tcga import read_tcga
from ds_wsi.bags.manifest import Manifest

__all__ = ["DATASETS", "read_camelyon16", "read_camelyon17", "read_custom", "read_panda", "read_tcga"]

DATASETS: dict[str, Callable[..., Manifest]] = {
    "camelyon16": read_camelyon16,
    "camelyon17": read_camelyon17,
    "custom": read_custom,
    "panda": read_panda,
    "tcga": read_tcga,
}
