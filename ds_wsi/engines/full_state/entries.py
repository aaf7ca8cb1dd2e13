"""The entries of an optimizer's state as files name and keep them: tensors, numbers, and float32 masters."""

from typing import Any

import torch
from torch import Tensor

from ds_wsi.runtime.tensor_file import TensorFile

NUMBERS = "numbers"
MASTER = "master"


def make_number(inner: Any, group: dict[str, Any], parameter: Tensor, value: float) -> Any:
    """A count of steps as this optimizer keeps it: DeepSpeed's as a number, torch's as a tensor."""
    if type(inner).__module__.startswith("deepspeed"):
        return int(value)
    beside = parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    return torch.tensor(float(value), dtype=torch.get_default_dtype(), device=beside)


def number_of(value: Any, parameter: Tensor) -> float | None:
    """What an optimizer counts, as a number; None: a tensor that goes with the parameter's entries.

    Raises:
        ValueError: neither.
    """
    if not isinstance(value, Tensor):
        return float(value)
    if value.shape == parameter.shape and value.dim() > 0:
        return None
    if value.numel() != 1:
        raise ValueError(
            f"an optimizer's state must be of its parameter's shape, {tuple(parameter.shape)}, got "
            f"{tuple(value.shape)}. HINT: Adam, AdamW or SGD."
        )
    return float(value)


def flat_states(
    inner: Any, group: dict[str, Any], own: Tensor, names: list[str], states: TensorFile, by_name: dict[str, list[str]]
) -> dict[str, Any]:
    """The states of a flat group that ZeRO steps as one: its numbers, and zeros to be filled for the rest.

    Args:
        inner: the optimizer that steps.
        group: one of its parameter groups.
        own: what this rank steps of the group.
        names: names of the group's parameters.
        states, by_name: a file, and the kinds of state in it by parameter.

    Raises:
        ValueError: parameters of the group differ in a number.
    """
    made: dict[str, Any] = {}
    for kind in sorted({kind for name in names for kind in by_name.get(name, [])} - {MASTER}):
        if kind.startswith(f"{NUMBERS}/"):
            short = kind.removeprefix(f"{NUMBERS}/")
            values = [float(states.read(f"{kind}/{name}")) for name in names if kind in by_name.get(name, [])]
            made[short] = make_number(inner, group, own, _one_number(values, short))
        else:
            made[kind] = torch.zeros_like(own)
    return made


def _one_number(values: list[float], what: str) -> float:
    if len(set(values)) > 1:
        raise ValueError(
            f"{what} must be the same for all parameters that ZeRO steps together, got {min(values):g} to "
            f"{max(values):g}. HINT: go on without DeepSpeed, or with FSDP2: they count by parameter."
        )
    return values[0]


def as_number(value: float) -> Tensor:
    """A number as a file keeps it."""
    return torch.tensor(float(value), dtype=torch.float64)
