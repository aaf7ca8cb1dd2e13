"""Kinds of task and their losses, by name; help pages need no torch for it."""

from collections.abc import Mapping

CLASSIFICATION, SEVERAL = "classification", "several"
# Kind of task -> its losses; the first is taken where none is asked for.
LOSSES_OF: Mapping[str, tuple[str, ...]] = {
    CLASSIFICATION: ("ce",),
    "regression": ("huber", "mse", "mae"),
    "ordinal": ("bits", "corn", "coral", "link"),
    "multilabel": ("bce",),
    "survival": ("nll", "cox"),
}
KINDS = (*LOSSES_OF, SEVERAL)
ALL_LOSSES = tuple(loss for losses in LOSSES_OF.values() for loss in losses)
TIES = ("efron", "breslow")
