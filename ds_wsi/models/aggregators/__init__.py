"""Slide aggregators (MIL pooling): each takes a StackedBags of features and returns a SlideOutput."""

from collections.abc import Callable

from torch import nn

from ds_wsi.models.aggregators.abmil import ABMIL, GatedABMIL
from ds_wsi.models.aggregators.abmilx import ABMILX
from ds_wsi.models.aggregators.acmil import ACMIL
from ds_wsi.models.aggregators.clam import CLAMMB, CLAMSB
from ds_wsi.models.aggregators.dsmil import DSMIL
from ds_wsi.models.aggregators.dtfd import DTFD
from ds_wsi.models.aggregators.pooling import MaxMIL, MeanMIL
from ds_wsi.models.aggregators.rrtmil import RRTMIL
from ds_wsi.models.aggregators.transmil import TransMIL

AGGREGATORS: dict[str, Callable[..., nn.Module]] = {
    "abmil": ABMIL,
    "gated_abmil": GatedABMIL,
    "mean": MeanMIL,
    "max": MaxMIL,
    "clam_sb": CLAMSB,
    "clam_mb": CLAMMB,
    "dsmil": DSMIL,
    "dtfd": DTFD,
    "transmil": TransMIL,
    "acmil": ACMIL,
    "rrtmil": RRTMIL,
    "abmilx": ABMILX,
}


def build_aggregator(name: str, in_dim: int, num_classes: int, **options: float | str) -> nn.Module:
    """Build an aggregator by name for features [N, in_dim] and logits [B, num_classes].

    Raises:
        ValueError: an unknown name, or sizes that are not positive.
    """
    if name not in AGGREGATORS:
        raise ValueError(f"aggregator must be one of {', '.join(AGGREGATORS)}, got {name!r}")
    if in_dim < 1 or num_classes < 2:
        raise ValueError(f"in_dim must be >= 1 and num_classes >= 2, got {in_dim} and {num_classes}")
    return AGGREGATORS[name](in_dim, num_classes, **options)
