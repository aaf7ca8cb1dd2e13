"""Encoders of which nothing, or a part, is trained."""

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def freeze(module: nn.Module) -> None:
    """Stop training `module`: no gradients; `SlideModel` then keeps a frozen encoder in evaluation mode."""
    module.requires_grad_(False)


def keep_in_eval(encoder: nn.Module, names: Iterable[str]) -> None:
    """Name the submodules that `SlideModel.train` leaves in evaluation mode, in `encoder.frozen_parts`."""
    encoder.frozen_parts = tuple(names)  # type: ignore[assignment]


def freeze_until(encoder: nn.Module, name: str) -> tuple[str, ...]:
    """Stop training everything before the submodule `name`, in place and before an engine wraps the model.

    Before it is what its parents register earlier, which for timm's models is the order of computation: children, and
    parameters of their own such as position embeddings. As neither tiles nor these parameters require a gradient,
    autograd keeps nothing for them. `encoder.frozen_parts` names the submodules, which `SlideModel` keeps in evaluation
    mode, dropout and BatchNorm's statistics included.

    Args:
        encoder: the encoder that is partly frozen.
        name: the first submodule that is trained, such as `layer3` or `blocks.6`.

    Returns:
        The names of the frozen submodules.

    Raises:
        ValueError: there is no such submodule, or nothing comes before it.
    """
    names = [module_name for module_name, _ in encoder.named_modules() if module_name]
    if name not in names:
        shown = difflib.get_close_matches(name, names, n=5) or [child for child, _ in encoder.named_children()]
        raise ValueError(
            f"freeze_until must name a submodule of {type(encoder).__name__}, got {name!r}. "
            f"HINT: did you mean {', '.join(shown)}?"
        )
    frozen: list[str] = []
    parent, path = encoder, ""
    for step in name.split("."):
        for parameter in parent.parameters(recurse=False):
            parameter.requires_grad_(False)
        for child, module in parent.named_children():
            if child == step:
                break
            module.requires_grad_(False)
            frozen.append(path + child)
        parent, path = parent.get_submodule(step), f"{path}{step}."
    if not any(not parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError(f"freeze_until must name a submodule with parameters before it, got {name!r}")
    keep_in_eval(encoder, frozen)
    return tuple(frozen)


class Untrained(torch.autograd.Function):
    """The identity on features, as a function of parameters that they were computed from without a gradient.

    Engines wait for a gradient of every parameter they hold; these are zero, and nothing was computed for them.
    """

    @staticmethod
    def forward(ctx: object, features: Tensor, *parameters: nn.Parameter) -> Tensor:
        """See the class."""
        ctx.parameters = parameters  # type: ignore[attr-defined]
        return features.view_as(features)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        return None, *(torch.zeros_like(parameter) for parameter in ctx.parameters)  # type: ignore[attr-defined]
