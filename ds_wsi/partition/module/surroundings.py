"""What autograd is doing around a call of a partitioned module, and what of it a partition cannot do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

_ONCE = 'a partitioned module must be differentiated once and in reverse, got {}. HINT: mode "native".'


def refuse_transforms(x: Tensor, tensors: list[Tensor], *, save: bool) -> None:
    """Refuse torch.func's transforms and forward-mode differentiation.

    Args:
        x: the input.
        tensors: the module's parameters.
        save: whether a backward may follow.

    Raises:
        RuntimeError: one of them is at work on this call.
    """
    if torch._C._are_functorch_transforms_active() and (
        save or any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in (x, *tensors))
    ):
        raise RuntimeError(_ONCE.format("a transform of torch.func (grad, vmap, jvp or vjp)"))
    if torch.autograd.forward_ad._current_level >= 0:
        for tensor in (x, *tensors):
            if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(_ONCE.format("forward mode (torch.autograd.forward_ad)"))


def refuse_batched(grad: Tensor) -> None:
    """Refuse several gradients at once.

    Raises:
        RuntimeError: `torch.autograd.grad(..., is_grads_batched=True)`, or a vectorized jacobian.
    """
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(_ONCE.format("several gradients at once (is_grads_batched, or torch.func)"))


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_ONCE.format("create_graph"))


def carrier_of(*tensors: Tensor) -> Tensor:
    """An empty tensor that hangs on these in autograd's graph, and holds none of them."""
    carrier: Tensor = _Carrier.apply(*tensors)
    return carrier


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward whose results raise where they are differentiated: under create_graph.

    `ctx.carrier`, see `carrier_of`, is of the Function's inputs: or who asks for gradients of results with respect to
    them, as `torch.autograd.functional.hvp` does, would be told that there are none.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        # Even where `grads` need no gradient: the results depend on the parameters.
        raising: Any = torch._C._functions.DelayedError(_ONCE.format("create_graph").encode(), len(results) + 1)
        required = (None if result is None else result.detach().requires_grad_() for result in results)
        return tuple(raising(*required, ctx.carrier))[:-1]

    return wrapped


def refuse_checkpoint() -> None:
    """Recomputing a partitioned module as a whole would update running statistics twice and double its cost.

    Raises:
        RuntimeError: the call is inside of torch.utils.checkpoint.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    packing = getattr(hooks[0], "__qualname__", "") if hooks else ""
    if "_checkpoint_hook" in packing or torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a partitioned module must not be called inside torch.utils.checkpoint, got such a call. "
            "HINT: take it out of the checkpoint; the partition recomputes by itself."
        )


def refuse_saved_tensor_hooks(modes: set[str]) -> None:
    """Refuse hooks on what autograd saves, which a partition saves in its own way.

    Args:
        modes: the modes of the call's segments. "offload" does what save_on_cpu does.

    Raises:
        RuntimeError: there are some.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if not hooks:
        return
    by_torch = getattr(hooks[0], "__qualname__", "").startswith("save_on_cpu.")
    if by_torch and modes == {"offload"}:
        return
    raise RuntimeError(
        "no hooks on saved tensors may be set around a partitioned module, got some (save_on_cpu?). "
        'HINT: mode "offload" does the same.'
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Chunks as nobody's but the partition's graphs.

    No hooks on saved tensors: nothing that the caller's autograd would save is made inside. No cache of parametrized
    weights (`parametrize.cached`): what one chunk has computed belongs to its graph.
    """
    taken = []
    caches, parametrize._cache_enabled = parametrize._cache_enabled, 0
    while hooks := torch._C._autograd._top_saved_tensors_default_hooks(True):
        taken.append(hooks)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        parametrize._cache_enabled = caches
        for hooks in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
