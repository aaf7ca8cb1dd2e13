"""Bags of different length in one tensor, and the segment operations on it."""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily

if TYPE_CHECKING:
    from ds_wsi.stacking.stacked_bags import StackedBags, stack_bags

__all__ = ["StackedBags", "stack_bags"]

# Help pages read the policies alone.
__getattr__ = lazily(
    __name__,
    {
        "ds_wsi.stacking.stacked_bags": (
            "StackedBags",
            "stack_bags",
        ),
    },
)
