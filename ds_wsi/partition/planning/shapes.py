"""Results of operations on shapes alone, remembered: a plan takes the same operations through the same shapes often."""

from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from ds_wsi.runtime.memory import ByteMeter, books_host
from ds_wsi.runtime.seams import storage_key, tree_leaves

_IN_PLACE = {
    torch.ops.aten.add_.Tensor,
    torch.ops.aten.mul_.Tensor,
    torch.ops.aten.copy_.default,
}  # known to change numbers alone


class _Kind(Enum):
    VIEW = "its results are views"
    NEW = "its results are new tensors"
    NUMBERS = "it changes numbers alone"
    OTHER = "what it does is torch's to say"


class ShapeMeter(ByteMeter):
    """A `ByteMeter` of operations on tensors without numbers: meta tensors, or fake ones.

    What an operation that makes new tensors makes of such arguments, and what it costs, is asked of torch once: there
    most operations are Python, and slow.

    Args:
        known: what was asked for already.
        mode: the mode of the fake tensors; None for meta tensors.
    """

    def __init__(self, known: dict[Any, Any], mode: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.known, self.mode = known, mode

    def dispatched(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation's results, remembered or asked of torch: the class's `__torch_dispatch__`."""
        kwargs = kwargs or {}
        kind = self.known.get(func)
        if kind is None:
            kind = self.known[func] = _kind_of(func)
        if kind is _Kind.VIEW and self.mode is None:
            self.operations += 1
            return func(*args, **kwargs)
        if kind is _Kind.OTHER:
            return self.counted(func, args, kwargs)
        try:
            key = func, books_host(), self._described(args), self._described(tuple(sorted(kwargs.items())))
            result = self.known.get(key)
        except TypeError:  # an argument without a hash, or with numbers
            return self.counted(func, args, kwargs)
        if result is None:
            before = self.flops, self.touched, self.copied
            out = self.counted(func, args, kwargs)
            after = self.flops, self.touched, self.copied
            done = tuple(one - two for one, two in zip(after, before, strict=True))
            with suppress(TypeError):  # more than new tensors, or views of the first argument
                self.known[key] = _Known(kind, self._forms(kind, out, args, kwargs), *done)
            return out
        self.operations += 1
        self.flops += result.flops
        self.touched += result.touched
        self.copied += result.copied
        return args[0] if kind is _Kind.NUMBERS else self._made(result.forms, args[0] if kind is _Kind.VIEW else None)

    def _described(self, value: Any) -> Any:
        """A key that tells arguments apart by the shapes of their tensors."""
        if isinstance(value, Tensor):
            return self._form(value)
        if isinstance(value, list | tuple):
            return tuple([self._described(item) for item in value])
        return type(value), value  # 1 and True and 1.0 are equal

    def _form(self, tensor: Tensor) -> Any:
        if self.mode is None:
            if not tensor.is_meta:
                raise TypeError
            return tensor.shape, tensor.stride(), tensor.dtype
        if not isinstance(tensor, FakeTensor) or tensor.constant is not None:
            raise TypeError
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.fake_device

    def _forms(self, kind: _Kind, out: Any, args: Any, kwargs: Any) -> Any:
        """What the operation's results are.

        Raises:
            TypeError: more than `_made` makes.
        """
        if kind is _Kind.NUMBERS:
            return None
        places = [storage_key(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        given = {storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if kind is _Kind.VIEW:
            if set(places) != {storage_key(args[0])}:
                raise TypeError
            return self._form_of(out, args[0].storage_offset(), args[0].dtype)
        if len(set(places)) < len(places) or given & set(places):
            raise TypeError
        return self._form_of(out, 0, None)

    def _form_of(self, out: Any, offset: int, dtype: torch.dtype | None) -> Any:
        if isinstance(out, Tensor):
            if out.layout is not torch.strided or (dtype or out.dtype) != out.dtype:
                raise TypeError
            if dtype is None and out.storage_offset():
                raise TypeError
            self._form(out)
            return _Form(out.shape, out.stride(), out.dtype, out.device, int(out.storage_offset()) - offset)
        if isinstance(out, list | tuple):
            return type(out)([self._form_of(item, offset, dtype) for item in out])
        return out

    def _made(self, form: Any, base: Tensor | None) -> Any:
        if isinstance(form, list | tuple):
            return type(form)([self._made(item, base) for item in form])
        if not isinstance(form, _Form):
            return form
        if self.mode is None:
            tensor = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=form.device)
        else:
            with in_kernel_invocation_manager(self.mode):
                if base is not None:
                    offset = base.storage_offset() + form.offset
                    plain = torch.ops.aten.as_strided.default(base, form.shape, form.stride, offset)
                else:
                    plain = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
            tensor = FakeTensor(self.mode, plain, form.device)
        if base is None:
            self.book(tensor)
        return tensor


# Set after the class is made: what torch wraps around a mode's own, to keep torch.compile out, takes longer than this
# does, and nothing of a plan is compiled.
ShapeMeter.__torch_dispatch__ = ShapeMeter.dispatched  # type: ignore[method-assign, assignment]


def _kind_of(func: Any) -> _Kind:
    schema = func._schema
    if func is torch.ops.prim.device.default:
        return _Kind.OTHER
    if func in _IN_PLACE:
        return _Kind.NUMBERS
    if schema.is_mutable:
        return _Kind.OTHER
    aliases = [result.alias_info is not None for result in schema.returns]
    return _Kind.OTHER if not aliases else _Kind.VIEW if all(aliases) else _Kind.OTHER if any(aliases) else _Kind.NEW


@dataclass(frozen=True)
class _Form:
    """All that a tensor without numbers is; `offset` of a view: beyond that of what it is a view of."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int


@dataclass(frozen=True)
class _Known:
    """What an operation makes, and does."""

    kind: _Kind
    forms: Any
    flops: int
    touched: int
    copied: int
