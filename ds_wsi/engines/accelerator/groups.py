"""The parameters that an optimizer is given, in groups."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def trained_parameters(
    model: nn.Module, apart: nn.Module | None = None, groups: Sequence[Mapping[str, Any]] | None = None
) -> list[Any]:
    """The trained parameters of a model, as an optimizer takes them.

    Args:
        model: sharded by now, under FSDP2.
        apart: a submodule whose parameters are the second of two groups; None has no groups.
        groups: groups instead, whose "params" are names; their other keys stay in them.
    """
    if groups is not None:
        by_name = dict(model.named_parameters())
        return [{**group, "params": [by_name[name] for name in group["params"]]} for group in groups]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if apart is None:
        return trained
    apart_ids = {id(parameter) for parameter in apart.parameters()}
    halves = [p for p in trained if id(p) not in apart_ids], [p for p in trained if id(p) in apart_ids]
    return [{"params": half} for half in halves]
