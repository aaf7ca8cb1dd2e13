"""The kernels that a GPU uses: TF32, cuDNN's search, the order of channels in memory. A run says what it chose."""

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import says_no_memory
from ds_wsi.runtime.numerics import autocast_now

if TYPE_CHECKING:
    from ds_wsi.models.slide_model import SlideModel

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_REPEATS = 5
_GAIN = 0.97  # of the time: what is not faster by as much is noise


def choose_tf32(choice: str, device: torch.device) -> None:
    """Let float32 products and convolutions round their factors to TF32, or not; "torch" leaves torch's setting.

    Args:
        choice: one of `TF32`.
        device: a CPU has no TF32.
    """
    if device.type != "cuda":
        return
    if choice != "torch":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = choice == "yes"
    logger.info(
        "TF32 (--tf32): matrix products %s, convolutions %s",
        *("yes" if one else "no" for one in (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)),
    )


def search_kernels(device: torch.device, *, one_size: bool) -> None:
    """Let cuDNN try its kernels where chunks have one size: for bags of all lengths the search would never end."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = one_size
    logger.info("cuDNN searches its kernels: %s", "yes, chunks have one size" if one_size else "no, sizes differ")


def choose_memory_format(
    module: "SlideModel",
    choice: str,
    tile_shape: Sequence[int],
    device: torch.device,
    agree: Callable[[str], str] = lambda name: name,
) -> torch.memory_format | None:
    """Lay the encoder's input out in memory as its convolutions are faster, by a short trial on the device.

    Convolutions follow their input's format, and their outputs have it. Weights stay as they are: engines flatten them,
    and what the kernels reorder of them is small beside a chunk.

    Args:
        module: the model whose encoder it is, not shared among ranks yet; its `memory_format` is set.
        choice: one of `MEMORY_FORMATS`; "auto" tries both on a GPU ("contiguous" where not even two tiles fit it) and
            leaves a CPU alone, where neither wins by a rule.
        tile_shape: [n, 3, S, S] of a chunk.
        device: where the trial runs.
        agree: makes the first rank's choice all ranks'. Collective where it is given.

    Returns:
        The format, or None where tiles come as they were read.
    """
    if not any(isinstance(part, nn.Conv2d) for part in module.encoder.modules()):
        return None
    if choice == "auto" and device.type != "cuda":
        return None
    if choice == "auto":
        seconds, tiles = _trial(module.encoder, tile_shape, device)
        faster = bool(seconds) and seconds["channels_last"] < _GAIN * seconds["contiguous"]
        choice = agree("channels_last" if faster else "contiguous")
        times = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
        told = f"by a trial of {tiles} tiles: {times}" if seconds else "because the trial does not fit the device"
        logger.info("memory format (--memory_format): %s, %s", choice, told)
    else:
        logger.info("memory format (--memory_format): %s, as was asked for", choice)
    module.memory_format = _FORMATS[choice]
    return module.memory_format


def _trial(encoder: nn.Module, tile_shape: Sequence[int], device: torch.device) -> tuple[dict[str, float], int]:
    """Seconds of a step in each format, and its tiles: as many as fit, because the trial has no partition yet.

    Nothing where not even two do; of one tile there is no BatchNorm, and its kernels are other ones.
    """
    tiles = tile_shape[0]
    while True:
        shape = (tiles, *tile_shape[1:])
        try:
            return {name: _step_seconds(encoder, form, shape, device) for name, form in _FORMATS.items()}, tiles
        except RuntimeError as error:
            if not says_no_memory(error):
                raise
        torch.cuda.empty_cache()  # outside of the handler: the error's frames hold the activations
        if tiles <= 2:
            return {}, tiles
        tiles //= 2


def _step_seconds(
    encoder: nn.Module, memory_format: torch.memory_format, tile_shape: Sequence[int], device: torch.device
) -> float:
    """How long a forward and backward of a copy takes: the encoder keeps its statistics, and gets no gradients."""
    trial: Any = copy.deepcopy(encoder).to(device)
    parameter = next(trial.parameters())
    tiles = torch.zeros(tuple(tile_shape), dtype=parameter.dtype, device=device).to(memory_format=memory_format)
    autocast, times = autocast_now(device), []
    with torch.random.fork_rng([device]), torch.enable_grad():
        for _ in range(1 + _REPEATS):  # the first one loads kernels
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            with autocast():
                out = trial(tiles)
            if out.requires_grad:
                out.float().sum().backward()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])
