"""What a training step does when the device has no memory left in spite of a plan."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import device_peaks, says_no_memory

T = TypeVar("T")


class OutOfDeviceMemoryError(RuntimeError):
    """A step does not fit the device; says what was planned, what was held, and which option lowers it."""


def with_retry(
    work: Callable[[], T],
    model: nn.Module,
    encoder: nn.Module,
    device: torch.device,
    *,
    again: Callable[[], None] | None,
) -> T:
    """Do `work`, a forward and backward; once more, with torch's cache emptied, where the device has no memory left.

    Memory that other processes took since the plan was made, or blocks of another bag's sizes that the allocator keeps,
    can be in the way for a while.

    Args:
        work: restartable: what it adds to is cleared by `again`.
        model: the one whose buffers (running statistics) are put back before the second try.
        encoder: the one whose plans the error names.
        device: where both are.
        again: called before the second try; None allows none: other micro-steps, other ranks or an engine
            have summed gradients already.

    Raises:
        OutOfDeviceMemoryError: out of memory, at the second try or where there is none.
    """
    if device.type != "cuda":
        return work()
    before = [buffer.clone() for buffer in model.buffers()] if again is not None else []
    try:
        return work()
    except RuntimeError as error:
        if not says_no_memory(error):
            raise
        first = _first_line(error)
    # Outside of the handler: the error's frames hold the activations.
    if again is None:
        raise OutOfDeviceMemoryError(
            _words(
                first, encoder, device, "no second try, because gradients of other micro-steps or ranks are under way"
            )
        )
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    logger.warning("out of device memory (%s): the cache is emptied, and the step taken once more", first)
    with torch.no_grad():
        for buffer, was in zip(model.buffers(), before, strict=True):
            buffer.copy_(was)
    again()
    try:
        return work()
    except RuntimeError as error:
        if not says_no_memory(error):
            raise
        last = _first_line(error)
    raise OutOfDeviceMemoryError(_words(last, encoder, device, "twice, the second time with an empty cache"))


@contextmanager
def naming_no_memory(doing: str, encoder: nn.Module, device: torch.device) -> Iterator[None]:
    """Name a device without memory left where there is no second try; `with_retry`'s own words go on as they are.

    Args:
        doing: what cannot be taken once more: "the optimizer's step".
        encoder: the one whose plans the error names.
        device: where it is.

    Raises:
        OutOfDeviceMemoryError: out of memory inside.
    """
    try:
        yield
        return
    except RuntimeError as error:
        if device.type != "cuda" or isinstance(error, OutOfDeviceMemoryError) or not says_no_memory(error):
            raise
        reason = _first_line(error)
    raise OutOfDeviceMemoryError(_words(reason, encoder, device, f"in {doing}, which is not taken twice"))


def _first_line(error: BaseException) -> str:
    return (str(error) or "no memory").splitlines()[0]


def _words(reason: str, encoder: nn.Module, device: torch.device, tries: str) -> str:
    forward = encoder.__dict__.get("forward")
    plans = forward.plans if isinstance(forward, PartitionedForward) else ()
    planned = "; ".join(str(plan).splitlines()[0] for plan in plans) or "none: the encoder is not partitioned"
    remedy = "a smaller --gpu_budget makes a plan that holds less" if plans else "--partition auto computes in chunks"
    return (
        f"a training step must fit the device, got out of memory ({tries}): {reason} Plan: {planned}. Held at most: "
        f"{device_peaks(device)}. HINT: {remedy}; --tiles_per_slide takes fewer tiles, and what else uses the GPU "
        "(--validate_beside is another process) can be stopped."
    )
