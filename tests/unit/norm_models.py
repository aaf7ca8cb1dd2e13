"""A small model with norms, and slides to measure it on."""

import torch
from torch import nn

from ds_wsi.bags.bag import FailureLog
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.norms import batch_norms

TILE_PX = 32
ALL = ("running", "recalibrated", "bag")


def make_model() -> SlideModel:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    model = SlideModel(encoder, build_aggregator("gated_abmil", 5, 2, dropout=0.0)).double().eval()
    for norm in batch_norms(encoder):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return model


def tiles_of(cohort, row) -> torch.Tensor:
    from ds_wsi.bags.bag import read_bags

    failures = FailureLog(cohort.manifest.slides, cohort.grids, 0.0)
    return next(read_bags(cohort.manifest.slides, cohort.grids, [row], ReadPolicy(0), failures)).tiles


def work(cohort, chunk=7):
    slides, grids = cohort.manifest.slides, cohort.grids
    return slides, grids, ReadPolicy(0, chunk_tiles=chunk), FailureLog(slides, grids, 0.0)
