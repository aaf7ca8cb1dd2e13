"""Encoders and aggregators of the user's own code, built and checked when a run starts."""

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.models.features import features_shape
from ds_wsi.models.output import SlideOutput
from ds_wsi.models.own import ENCODER, built, check_options, find_own
from ds_wsi.models.weights import load_encoder_weights
from ds_wsi.runtime.contracts import needs_labels
from ds_wsi.runtime.seams import is_zero3_part
from ds_wsi.stacking.stacked_bags import stack_bags

GIVEN = ("in_dim", "num_classes")  # to every aggregator, by place
TILE_SIZE = "tile_size_px"  # to an encoder that has such a parameter
_LENGTHS = (3, 2)  # of the bags that an aggregator is tried on
_TOLERANCE = 1e-4  # of the largest logit, in float32


def build_own_encoder(
    name: str, weights: str | Path | None, features: str, tile_size_px: int, options: Mapping[str, Any]
) -> nn.Module:
    """Build an encoder of own code: tiles [N, 3, S, S] -> features [N, num_features].

    Args:
        name: `module:callable`, or an entry point's name.
        weights: a local file; None leaves the encoder as it is built.
        features: "pooled": what it returns.
        tile_size_px: S; given to a callable that has a parameter of this name.
        options: keyword arguments of the callable.

    Raises:
        ValueError: it cannot be built, is no module, or returns no features [N, D] of a tile.
    """
    if features != "pooled":
        raise ValueError(
            f"encoder_features must be pooled, what it returns, for {name}, got {features!r}. HINT: an option of your "
            "own, --encoder_options."
        )
    build = find_own(name, ENCODER)
    given = (TILE_SIZE,) if TILE_SIZE in signature(build).parameters and TILE_SIZE not in options else ()
    check_options(name, build, options, given)
    encoder = built(name, build, **options, **dict.fromkeys(given, tile_size_px))
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, got {type(encoder).__name__}")
    shape = features_shape(encoder, tile_size_px)
    if len(shape) != 2 or shape[0] != 1 or shape[1] < 1:
        raise ValueError(f"an encoder must return features [N, D], got {list(shape)} of {name} for one tile")
    if getattr(encoder, "num_features", shape[1]) != shape[1]:
        raise ValueError(
            f"num_features of {name} must be the width of its features, {shape[1]}, got {encoder.num_features}"
        )
    if not hasattr(encoder, "num_features"):
        encoder.num_features = shape[1]  # type: ignore[assignment]
    if weights is not None:
        load_encoder_weights(encoder, weights)
    return encoder


def build_own_aggregator(
    name: str, kind: Callable[..., Any], in_dim: int, num_classes: int, options: Mapping[str, Any]
) -> nn.Module:
    """Build an aggregator of own code, and try it on two bags: features [sum N, D] -> logits [B, C].

    Raises:
        ValueError: it cannot be built, has no parameters, returns no `SlideOutput` of these shapes, or a bag's logits
            depend on what it is stacked with.
    """
    module = built(name, kind, in_dim, num_classes, **options)
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, got {type(module).__name__}")
    parameters = list(module.parameters())
    if not parameters:
        raise ValueError(f"{name} must have parameters, whose dtype features are given in, got none")
    if all(part.device.type == "cpu" and not is_zero3_part(part) for part in parameters):
        _try_aggregator(name, module, in_dim, num_classes)
    return module


def _try_aggregator(name: str, module: nn.Module, in_dim: int, num_classes: int) -> None:
    """A trial on two bags, see `build_own_aggregator`: modes and torch's generator are left as they were."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    like = next(module.parameters())
    draw = torch.Generator().manual_seed(0)
    bags = [torch.randn(length, in_dim, generator=draw).to(like.dtype) for length in _LENGTHS]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            whole = _logits(name, module, bags, num_classes)
            alone = torch.cat([_logits(name, module, [bag], num_classes) for bag in bags])
    finally:
        for part, training in modes:
            part.training = training
    gap = (whole - alone).abs().max().item()
    if not gap <= _TOLERANCE * max(1.0, alone.abs().max().item()):
        raise ValueError(
            f"{name} must compute each bag of a stack by itself, got logits that differ by {gap:.3g} from those of the "
            "bags alone. HINT: bags.split() gives them, bags.cu_seqlens their bounds."
        )


def _logits(name: str, module: nn.Module, bags: list[Tensor], num_classes: int) -> Tensor:
    stack = stack_bags(bags)
    labels = (torch.zeros(len(bags), dtype=torch.int64),) if needs_labels(module) else ()
    try:
        output = module(stack, *labels)
    except Exception as error:  # of code that nobody here wrote
        raise ValueError(
            f"{name} must take a StackedBags of features {list(stack.values.shape)}{' and labels' if labels else ''}, "
            f"got {type(error).__name__}: {error}. HINT: DS_WSI_TRACEBACK=1 shows where it came from."
        ) from error
    if not isinstance(output, SlideOutput):
        raise ValueError(f"{name} must return a ds_wsi.SlideOutput, got {type(output).__name__}")
    if tuple(output.logits.shape) != (len(bags), num_classes):
        raise ValueError(
            f"logits of {name} must be [B, C], [{len(bags)}, {num_classes}] for {len(bags)} bags, got "
            f"{list(output.logits.shape)}"
        )
    n_rows, attention, loss = len(stack.values), output.attention, output.auxiliary_loss
    if attention is not None and (attention.dim() not in (1, 2) or len(attention) != n_rows):
        raise ValueError(
            f"attention of {name} must be [sum N] or [sum N, M], of {n_rows} rows, got {list(attention.shape)}. "
            "HINT: None where there is none."
        )
    if loss is not None and tuple(loss.shape) != (len(bags),):
        raise ValueError(f"auxiliary_loss of {name} must be one per bag, [{len(bags)}], got {list(loss.shape)}")
    return output.logits
