"""Results of operations on shapes alone, remembered: a plan takes the same operations through the same shapes often."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ds_wsi.runtime.memory import ByteMeter


class ShapeMeter(ByteMeter):
    """A `ByteMeter` of operations on meta tensors.

    What an operation that makes new tensors makes of such arguments is asked of torch once: there most operations are
    Python, and slow. Views and operations in place are left to it.

    Args:
        known: what was asked for already.
    """

    def __init__(self, known: dict[Any, Any]) -> None:
        super().__init__()
        self.known = known

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: D102
        schema = func._schema
        if schema.is_mutable or any(result.alias_info is not None for result in schema.returns):
            return func(*args, **kwargs)
        try:
            key = func, _described(args), _described(tuple(sorted(kwargs.items())))
            form = self.known.get(key)
        except TypeError:  # an argument without a hash, or not on the meta device
            return func(*args, **kwargs)
        if form is None:
            out = func(*args, **kwargs)
            self.known[key] = tree_map(_to_form, out)
            return out
        return tree_map(_to_tensor, form)


def _described(value: Any) -> Any:
    """A key that tells arguments apart by the shapes of their tensors."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError
        return _Form.of(value)
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value  # 1 and True and 1.0 are equal


@dataclass(frozen=True)
class _Form:
    """All that a meta tensor is."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "_Form":
        return cls(tensor.shape, tensor.stride(), tensor.dtype)


def _to_form(value: Any) -> Any:
    return _Form.of(value) if isinstance(value, Tensor) else value


def _to_tensor(value: Any) -> Any:
    if isinstance(value, _Form):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    return value
