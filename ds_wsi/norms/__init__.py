"""BatchNorm in models of bags: what a norm averages over, in training and in evaluation."""

from ds_wsi.norms.policy import NormPolicy, natural_evaluation
from ds_wsi.norms.roles import batch_norms, normalise_with, starts_fresh

__all__ = ["NormPolicy", "batch_norms", "natural_evaluation", "normalise_with", "starts_fresh"]
