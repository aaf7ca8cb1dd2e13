"""Hooks and computed weights inside a partitioned module: which run as in the plain module, and which are refused.

Chunks call the parts of a module many times, some of them never (a train-mode norm) and some in parts (a convolution
whose result backward does not need). A hook on a part would see chunks, or nothing. What torch puts there itself to
compute a weight is known, and so are the hooks of engines and profilers, which change no number.
"""

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ds_wsi.norms.population import takes_population

_COMPUTES_WEIGHTS = "torch.nn.utils."  # weight_norm, spectral_norm, prune: by pre-hooks of the old kind
_CHANGES_NOTHING = (
    *("deepspeed.", "torch.distributed.", "torch.utils.", "torch.profiler", "torch.autograd.profiler"),
    "ds_wsi.",
)
_HANDS_ON = "deepspeed.runtime.zero.parameter_offload"  # ZeRO-3's Functions around what its modules take and give
_KINDS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def refuse_inner_hooks(module: nn.Module) -> None:
    """Refuse what a partition would run another number of times than the plain module does.

    Args:
        module: the module that is partitioned, as it is now.

    Raises:
        ValueError: a user's hook on a part of it, or on all modules; weights that a forward in training mode changes
            (spectral_norm); a hook on a train-mode BatchNorm.
    """
    rule = "a hook inside a partition must be on the partitioned module itself, got"
    remedy = 'HINT: mode "native" while you look.'
    for kind, words in _KINDS.items():
        for hook in getattr(torch_module, f"_global{kind}", {}).values():
            if not _homes(hook, _CHANGES_NOTHING):
                raise ValueError(f"{rule} {words} on all modules. {remedy}")
    for name, part in module.named_modules():
        _refuse_written_weights(name, part)
        if part is module:
            continue
        for kind, hook in _hooks_of(part):
            if _homes(hook, _CHANGES_NOTHING):
                continue
            if not _homes(hook, (_COMPUTES_WEIGHTS,)):
                raise ValueError(f"{rule} {_KINDS[kind]} on {name!r}. {remedy}")
            if isinstance(part, _BatchNorm) and takes_population(part):
                raise ValueError(
                    f"a train-mode BatchNorm must have torch's or timm's own forward, got {_KINDS[kind]} of "
                    f"{type(hook).__name__} (layer {name!r}). HINT: torch.nn.utils.parametrizations has the same."
                )


def compute_weights(leaf: nn.Module, *inputs: Any) -> None:
    """Run torch's own hooks that compute the weights of a leaf, whose `__call__` is not used, in the present graph."""
    for hook in weight_hooks(leaf).values():
        hook(leaf, inputs)


def weight_hooks(part: nn.Module) -> "OrderedDict[int, Any]":
    """Those of its forward pre-hooks that are torch's own and compute its weights."""
    return OrderedDict(
        (key, hook) for key, hook in part._forward_pre_hooks.items() if _homes(hook, (_COMPUTES_WEIGHTS,))
    )


def is_torchs(part: nn.Module) -> bool:
    """Whether a sub-module is of one of torch's own classes."""
    return type(part).__module__.startswith(("torch.nn", "torch.ao.nn"))


def is_engines(home: str) -> bool:
    """Whether code of this module is an engine's or a profiler's, which changes no number."""
    return home.startswith(_CHANGES_NOTHING)


def hands_on(function: type) -> bool:
    """Whether an autograd.Function returns what it is given: an engine waits in it for backward."""
    return function.__module__ == _HANDS_ON


def is_plain_convolution(leaf: Any) -> bool:
    """Whether calling the leaf is a convolution of its input with its parameters, and nothing else."""
    plain = type(leaf) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and not _is_patched(leaf)
    return plain and not any(True for _ in _hooks_of(leaf))


def is_convolution_2d(leaf: nn.Module) -> bool:
    """Whether the leaf convolves images with its `weight` and `bias`, computed ones too."""
    kind = type(leaf)
    if hasattr(leaf, "parametrizations") and len(kind.__mro__) > 1:
        kind = kind.__mro__[1]
    return kind is nn.Conv2d and not _is_patched(leaf)


def _is_patched(leaf: nn.Module) -> bool:
    """Whether somebody has set another forward of this one convolution, or the step of it that pads and convolves."""
    return not leaf.__dict__.keys().isdisjoint(("forward", "_conv_forward"))


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is what `torch.compile` has made of another."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that was compiled, or the module itself."""
    while is_compiled(module):
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    return module


def twin(module: nn.Module) -> Any:
    """A module with the same state and other attributes of its own: `copy` refuses a parametrized one."""
    made: Any = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    return made


def weight_of(leaf: Any, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution, computed where they are no parameters."""
    compute_weights(leaf, image)
    return leaf.weight, leaf.bias


def _refuse_written_weights(name: str, part: nn.Module) -> None:
    written = [
        f"{hook.name}_u"
        for hook in part._forward_pre_hooks.values()
        if isinstance(hook, SpectralNorm) and part.training
    ]
    for key, steps in part._modules.get("parametrizations", nn.ModuleDict()).named_children():  # type: ignore[union-attr]
        written += [
            f"parametrizations.{key}.{index}._u"
            for index, step in steps.named_children()
            if isinstance(step, _SpectralNorm) and step.training
        ]
    for buffer in written:
        raise ValueError(
            f"{name!r} ({type(part).__name__}) must not write its buffer {buffer!r} in forward, got spectral_norm in "
            "training mode. HINT: keep it out of the partition, or call eval() on it."
        )


def _hooks_of(part: nn.Module) -> Iterator[tuple[str, Any]]:
    for kind in _KINDS:
        for hook in part.__dict__.get(kind, {}).values():
            yield kind, hook


def _homes(hook: Any, homes: tuple[str, ...]) -> bool:
    """Whether the hook, or a class that it is of, is defined in one of these packages."""
    while isinstance(hook, partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    defined_in = getattr(hook, "__module__", None) or ""
    kinds = [] if hasattr(hook, "__code__") else [kind.__module__ for kind in type(hook).__mro__]
    return any(home.startswith(homes) for home in (defined_in, *kinds))
