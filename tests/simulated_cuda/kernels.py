"""Operations whose results on a GPU differ from the CPU's, by their source; and where random numbers come from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

aten: Any = torch.ops.aten
_DRAW = 4  # of a generator's offset: what a kernel that draws advances it by


def batch_norm_stats(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) of each channel; the latter is 0 where var + eps is.

    Source: aten/src/ATen/native/cuda/Normalization.cuh, struct InvStd.
    """
    var, mean = torch.var_mean(_wide(z), [dim for dim in range(z.dim()) if dim != 1], correction=0)
    invstd = (var + eps).rsqrt()
    return mean, torch.where(var + eps == 0, torch.zeros_like(invstd), invstd)


def batch_norm_update_stats(
    z: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, in float32 for half-precision inputs; on a CPU they are rounded to half precision."""
    return aten.batch_norm_update_stats(_wide(z), running_mean, running_var, momentum)


def native_batch_norm(z: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Computed in float32 for half-precision inputs; so are the statistics that backward reads."""
    weight, bias, *rest = arguments
    out, *saved = aten.native_batch_norm(_wide(z), _wide(weight), _wide(bias), *rest)
    return out.to(z.dtype), *saved


def native_batch_norm_backward(grad: Tensor, z: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """See `native_batch_norm`; gradients have the dtypes of what they are of."""
    weight, *rest = arguments
    z_grad, *others = aten.native_batch_norm_backward(_wide(grad), _wide(z), _wide(weight), *rest)
    kind = z.dtype if weight is None else weight.dtype
    return None if z_grad is None else z_grad.to(z.dtype), *(None if one is None else one.to(kind) for one in others)


def cudnn_batch_norm(z: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """PyTorch's own batch normalisation, and an empty reserve."""
    return *native_batch_norm(z, *arguments), torch.empty(0, dtype=torch.uint8)


def cudnn_batch_norm_backward(z: Tensor, grad: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """See `cudnn_batch_norm`."""
    mean, var, saved_mean, saved_invstd, eps, _ = arguments
    rest = (mean, var, saved_mean, saved_invstd, True, eps, [True, True, True])
    return native_batch_norm_backward(grad, z, weight, *rest)


def in_float32(product: Callable[..., Any]) -> Callable[..., Any]:
    """A product that sums in float32 where its operands are of half precision.

    A CPU would sum in half precision, and take a hundred times as long.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        kinds = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if _is_half(leaf)}
        if len(kinds) != 1:
            return product(*args, **kwargs)
        (kind,) = kinds
        wide_args, wide_kwargs = tree_map(_wide, (args, kwargs))
        results = product(*wide_args, **wide_kwargs)
        return tree_map(lambda leaf: leaf.to(kind) if isinstance(leaf, Tensor) else leaf, results)

    return run


EMULATED: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": batch_norm_stats,
    "batch_norm_update_stats": batch_norm_update_stats,
    "native_batch_norm": native_batch_norm,
    "native_batch_norm_backward": native_batch_norm_backward,
    "cudnn_batch_norm": cudnn_batch_norm,
    "cudnn_batch_norm_backward": cudnn_batch_norm_backward,
    **{
        name: in_float32(getattr(aten, name))
        for name in ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
    },
}


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _wide(value: Any) -> Any:
    return value.float() if _is_half(value) else value


# ------------------------------------------------------------------------------------------------ random numbers


def host_generator(generator: torch.Generator) -> torch.Generator:
    """A CPU generator whose numbers are a function of a GPU generator's seed and offset; the offset is advanced."""
    return torch.Generator().manual_seed(_take(generator))


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Inside, the CPU's default generator stands for a GPU's."""
    present = torch.get_rng_state()
    torch.default_generator.manual_seed(_take(generator))
    try:
        yield
    finally:
        torch.set_rng_state(present)


def _take(generator: torch.Generator) -> int:
    offset = generator.get_offset()
    generator.set_offset(offset + _DRAW)
    return (generator.initial_seed() * 1_000_003 + offset) % 2**63
