"""Draws that are the same for every tile: a module that draws becomes one that can be held tensor by tensor."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class SameDraws(TorchDispatchMode):
    """While it is entered, a tile's draw depends on the place within the tile alone: every other element is kept.

    Chunks and the order of passes cannot show then, and a mask that is not scaled, or is drawn and not used, does. The
    generators stay where they are.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.bernoulli_.float:
            return args[0].copy_(_kept(args[0]))
        if func is aten.bernoulli.p:
            return _kept(args[0])
        if func is aten.native_dropout.default:
            x, rate, train = args
            mask = _kept(x) if train else torch.ones_like(x)
            return x * mask / (1 - rate if train else 1), mask.bool()
        if func is aten.uniform_.default:
            low, high = (*args[1:], 0.0, 1.0)[:2] if len(args) < 3 else args[1:3]
            return args[0].copy_(low + (high - low) * (0.25 + 0.5 * _kept(args[0])))
        if func in (aten.rand.default, aten.rand_like.default):
            empty = aten.empty.memory_format if func is aten.rand.default else aten.empty_like.default
            result = empty(*args, **{key: value for key, value in kwargs.items() if key != "generator"})
            return result.copy_(0.25 + 0.5 * _kept(result))
        return func(*args, **kwargs)


def _kept(like: Tensor) -> Tensor:
    """Ones and zeros in turn within a tile, ones where a tile has one element."""
    if like.numel() == 0 or like.dim() == 0:
        return torch.ones_like(like)
    places = torch.arange(like[0].numel(), device=like.device).remainder(2).eq(0)
    return places.to(like.dtype).view(like[0].shape).expand(like.shape).clone()
