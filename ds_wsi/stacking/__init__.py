"""Bags of different length in one tensor, and the segment operations on it."""

from ds_wsi.stacking.stacked_bags import StackedBags, stack_bags

__all__ = ["StackedBags", "stack_bags"]
