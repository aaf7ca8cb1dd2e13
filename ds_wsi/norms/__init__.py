"""BatchNorm in models of bags: what a norm averages over, in training and in evaluation."""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily

if TYPE_CHECKING:
    from ds_wsi.norms.policy import NormPolicy, natural_evaluation
    from ds_wsi.norms.roles import batch_norms, named_batch_norms, normalise_with, starts_fresh

__all__ = ["NormPolicy", "batch_norms", "named_batch_norms", "natural_evaluation", "normalise_with", "starts_fresh"]

# Help pages read the policies alone.
__getattr__ = lazily(
    __name__,
    {
        "ds_wsi.norms.policy": (
            "NormPolicy",
            "natural_evaluation",
        ),
        "ds_wsi.norms.roles": (
            "batch_norms",
            "named_batch_norms",
            "normalise_with",
            "starts_fresh",
        ),
    },
)
