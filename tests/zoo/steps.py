"""One step of a module of the zoo in float64: its input, what comes out, and how far two steps are from each other."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .entry import ZooModel

TILES, IMAGES = 7, 2  # of a step on either axis
# Gradients are held against this part of the largest one at least: a bias before a norm has rounding alone.
SMALL = 1e-3

Found = dict[str, Tensor | None]


def prepare(module: nn.Module) -> nn.Module:
    """Float64, and no parameter constant: a branch that starts at zero, or a norm's scale of one, hides mistakes.

    Running statistics are moved too.
    """
    module = module.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() == 0 or parameter.min() != parameter.max():
                continue
            value = parameter.flatten()[0].item()
            noise = torch.rand(parameter.shape, dtype=torch.float64, generator=generator)
            if abs(value) < 1e-2:  # a bias, a layer scale, a position
                parameter.copy_(noise * 0.4 - 0.15)
            else:
                parameter.mul_(0.6 + 0.8 * noise)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.2 * torch.randn(buffer.shape, dtype=torch.float64, generator=generator))
            elif name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand(buffer.shape, dtype=torch.float64, generator=generator))
    return module


def without_draws(module: nn.Module) -> nn.Module:
    """Dropout and drop path switched off, whosever they are; what is drawn by functions stays."""
    for part in module.modules():
        name = type(part).__name__
        if isinstance(part, nn.modules.dropout._DropoutNd) or name == "StochasticDepth":
            part.p = 0.0  # type: ignore[assignment]
        for attribute in ("drop_prob", "drop_path_rate", "drop_rate", "attention_dropout", "dropout"):
            if isinstance(part.__dict__.get(attribute), float):
                setattr(part, attribute, 0.0)
    return module


def call(module: nn.Module, x: Tensor, keyword: str | None) -> Any:
    """The module's output, as its users call it."""
    return module(x) if keyword is None else module(**{keyword: x})


def outputs(result: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in their order."""
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def directions(tensors: list[Tensor]) -> list[Tensor]:
    """The gradients that a step's outputs are given."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(tensor.shape, dtype=torch.float64, generator=generator) for tensor in tensors]


def step(module: nn.Module, x: Tensor, keyword: str | None, order: int = 0) -> Found:
    """One step: outputs, gradients of input and parameters, buffers; the tiles `order` places on, and back again."""
    tiles = len(x)
    x = x.roll(order, 0).requires_grad_()
    torch.manual_seed(5)
    results = outputs(call(module, x, keyword))
    after = torch.random.get_rng_state()
    given = [
        grad.to(out.dtype).roll(order * out.shape[0] // tiles, 0) if out.dim() else grad.to(out.dtype)
        for out, grad in zip(results, directions(results), strict=True)
    ]
    pairs = [(out, grad) for out, grad in zip(results, given, strict=True) if out.requires_grad]
    torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
    tensors: Found = {}
    for index, out in enumerate(results):
        tensors[f"output {index}"] = (
            out.detach().roll(-(order * out.shape[0] // tiles), 0) if out.dim() else out.detach()
        )
    tensors["input's gradient"] = None if x.grad is None else x.grad.roll(-order, 0)
    for name, parameter in module.named_parameters():
        tensors[f"gradient of {name}"] = parameter.grad
    for name, buffer in module.named_buffers():
        tensors[f"buffer {name}"] = buffer.detach().clone()
    tensors["generator"] = after  # what backward leaves is looked at by `check_generator`
    return tensors


def distances(found: Found, expected: Found) -> Iterator[tuple[str, float]]:
    """Each tensor's largest difference over its largest value; infinite where one is missing or of another shape.

    Gradients that are rounding alone are held against `SMALL` of the largest gradient.
    """
    gradients = [value for name, value in expected.items() if "gradient of" in name and value is not None]
    largest = max((value.abs().max().item() for value in gradients if value.numel()), default=0.0)
    for name in expected.keys() | found.keys():
        if name == "generator":
            continue
        one, other = found.get(name), expected.get(name)
        if one is None or other is None:
            yield name, 0.0 if one is other else float("inf")
        elif one.shape != other.shape:
            yield name, float("inf")
        elif not other.is_floating_point():
            yield name, 0.0 if torch.equal(one, other) else float("inf")
        elif other.numel() == 0:
            yield name, 0.0
        else:
            one, other = one.double(), other.double()
            same_nan = torch.equal(one.isnan(), other.isnan())
            size = other.nan_to_num().abs().max().item()
            size = max(size, SMALL * largest) if "gradient of" in name else size
            difference = (one.nan_to_num() - other.nan_to_num()).abs().max().item()
            yield name, difference / max(size, 1e-30) if same_nan else float("inf")


def tile_input(model: ZooModel, axis: str) -> Tensor:
    """Seven tiles, or two large images; the same in every run."""
    if axis == "spatial" and model.image is None:
        raise ValueError(f"{model.key} must have an image size to be tried on the spatial axis")
    shape = (TILES, *model.shape) if axis == "batch" else (IMAGES, *(model.image or ()))
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(model: ZooModel, train: bool, draws: bool) -> nn.Module:
    """The module of a setting, the same in every run."""
    torch.manual_seed(0)
    module = prepare(model.build(draws))
    return (module if draws else without_draws(module)).train(train)
