"""The device that a partition computes on."""

from itertools import chain

import torch
from torch import Tensor, nn

_KINDS = ("cpu", "cuda", "meta")  # whose generators `runtime.seeding` sets back for what is computed again


def device_of(module: nn.Module, default: torch.device) -> torch.device:
    """The parameters' device, or the buffers'; `default` where there are none of either."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), default)


def refuse_devices(module: nn.Module, device: torch.device) -> None:
    """Refuse a module of several devices: chunks go to one, and its memory, streams and generator are the call's.

    Args:
        module: the module that is partitioned, whole, as it is now.
        device: the device of its first parameter, or of the tiles.

    Raises:
        ValueError: names the device, or the tensor on another one. A buffer may lie on the CPU beside a GPU's.
    """
    owner = type(module).__name__
    if device.type not in _KINDS:
        raise ValueError(
            f"a partitioned {owner} must compute on a CPU or a CUDA device, got {device}, whose random numbers chunks "
            'cannot draw again. HINT: mode "native".'
        )
    if all(tensor.device == device for tensor in chain(module.parameters(), module.buffers())):
        return  # at each call: names are looked for where they are needed
    named: list[tuple[str, str, Tensor]] = [("parameter", *item) for item in module.named_parameters()]
    named += [("buffer", *item) for item in module.named_buffers()]
    for kind, name, tensor in named:
        if tensor.device != device and not (kind == "buffer" and tensor.device.type == "cpu"):
            raise ValueError(
                f"a partitioned {owner} must lie on one device, {device}, got {kind} {name!r} on {tensor.device}. "
                "HINT: module.to(device), or partition the sub-modules of each device by themselves."
            )
