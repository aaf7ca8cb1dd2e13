"""The DeepSpeed JSON, its "auto" values filled from the run's settings; whole parameters at any ZeRO stage."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.engines.cpu import without_gpu
from ds_wsi.engines.fsdp import whole
from ds_wsi.engines.ops import choose_adam
from ds_wsi.partition.apply import PartitionedForward, is_anchor
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seams import check_seams

DEFAULT_BUCKET = 500_000_000  # gradients, where the config says nothing
_GRADIENT_BYTES = 4  # mixed precision is by autocast: they are float32


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        ValueError: missing, not JSON (with the place), or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the DeepSpeed config must be a file, got {path} (missing). HINT: check --deepspeed.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the DeepSpeed config must be JSON, got {error.msg} ({path}, line {error.lineno}, column {error.colno})"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"the DeepSpeed config must be a JSON object, got {type(config).__name__} ({path})")
    return config


def fill_auto(
    config: dict[str, Any], values: dict[str, Any], options: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return `config` with the run's settings in place of "auto" and of absent keys.

    Args:
        config: of DeepSpeed.
        values: dotted key -> the run's value. Optimizer keys are filled only where the section is there.
        options: dotted key -> the command line's option, for the remedy.

    Raises:
        ValueError: the config fixes a key to another value than the run's; names the key and both.
    """
    filled = json.loads(json.dumps(config))
    for key, value in values.items():
        *parents, leaf = key.split(".")
        if parents and parents[0] not in filled:
            continue
        place = filled
        for parent in parents:
            place = place.setdefault(parent, {})
        present = place.get(leaf, "auto")
        if present not in ("auto", value):
            option = (options or {}).get(key)
            remedy = f"give {option} {present}" if option else "leave it out"
            raise ValueError(
                f'{key} of the DeepSpeed config must be "auto" or the run\'s value, {value}, got {present}. '
                f'HINT: write "auto", or {remedy}.'
            )
        place[leaf] = value
    return filled


def suit_machine(config: dict[str, Any]) -> None:
    """Take the Adam that this machine can build, in place in `config`, and tell what the buckets cost its GPU."""
    check_seams("deepspeed", "zero3", "ops")
    choose_adam(config)
    words = bucket_words(config)
    if words and not without_gpu():
        logger.info("%s", words)


def bucket_bytes(config: dict[str, Any]) -> int:
    """Device memory that ZeRO takes for gradients on their way between ranks, however few the model has.

    Twice a bucket where communication overlaps backward: one is filled while the other is sent. At stage 3 it is one.
    """
    zero = config.get("zero_optimization") or {}
    stage, size = zero.get("stage", 0), zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    if stage == 0 or not zero.get("contiguous_gradients", True) or size == "auto":
        return 0
    buckets = 2 if stage < 3 and zero.get("overlap_comm") else 1
    return buckets * int(size) * _GRADIENT_BYTES


def bucket_words(config: dict[str, Any]) -> str:
    """What DeepSpeed's own size of a bucket costs, and the key that lowers it; empty where the config names a size."""
    cost = bucket_bytes(config)
    if not cost or "reduce_bucket_size" in config["zero_optimization"]:
        return ""
    return (
        f"ZeRO's buckets take {cost / 2**30:.1f} GiB of the device, by DeepSpeed's default. HINT: "
        '"zero_optimization": {"reduce_bucket_size": 5e7}, and without "overlap_comm" on one GPU, take 0.2 GiB.'
    )


def gather_as_one(model: nn.Module) -> None:
    """Make partitioned modules, and aggregators of one bag at a time, ZeRO-3's leaf modules; before DeepSpeed wraps it.

    A partition runs the submodules once a chunk and pass: as a leaf the module is gathered once around its forward and
    once around its backward, however many chunks or bags a rank has, and its gradients are reduced once.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), PartitionedForward):
            set_z3_leaf_module(module, True)
        elif getattr(module, "packed", True) is False and not isinstance(module.__dict__.get("forward"), _TiedForward):
            set_z3_leaf_module(module, True)
            module.forward = _TiedForward(module.forward)
            module.register_forward_pre_hook(_give_tie)


class _TiedForward:
    """The forward of a leaf module whose tensors come in a StackedBags.

    DeepSpeed reduces a leaf's gradients once those of its inputs are known, and torch's hook for that sees tensors
    among the arguments alone, not in tuples: without one it fires at once, with gradients of zero. So there is one, and
    the bags' values are tied to it.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, bags: Any, *more: Any) -> Any:
        if more and is_anchor(more[-1]):
            bags, more = bags._replace(values=_Tied.apply(bags.values, more[-1])), more[:-1]
        return self.original(bags, *more)


class _Tied(torch.autograd.Function):
    """The identity on values, whose backward is the last of the module's: then the tie's gradient is known."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, tie: Tensor) -> Tensor:
        ctx.tie = tie.shape, tie.dtype, tie.device
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        shape, dtype, device = ctx.tie
        return grads[0], torch.zeros(shape, dtype=dtype, device=device)


def _give_tie(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not torch.is_grad_enabled() or not is_zero3(module):
        return None
    return *args, torch.empty(0, device=args[0].values.device, requires_grad=True)


def is_zero3(model: nn.Module) -> bool:
    """Whether the parameters of `model` are partitioned over the ranks by ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters and buffers on the CPU, floating ones in float32, at every ZeRO stage, under FSDP2 and DDP.

    Every rank gets them. At ZeRO-3 and under FSDP2 one parameter at a time is gathered (one all-gather each), so that
    the device never holds the whole model.

    Args:
        model: the unwrapped module, whose names the keys are.
    """
    partitioned = is_zero3(model)
    own = dict(model.named_parameters())
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with gathered(own[name]) if partitioned and name in own else nullcontext():
            copy = whole(value).to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        state[name] = copy
    return state


def gathered(parameter: Tensor, modifier_rank: int | None = None) -> Any:
    """A context in which a parameter of ZeRO-3 is whole; what `modifier_rank` writes into it is every rank's after."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)
