"""Steps that a run on a GPU measures: its sizes, budgets that are tried until one fits, the first step."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ds_wsi.runtime.log import logger
from launch.benchmarks.device_training import DoesNotFitError, Machine, Training
from launch.benchmarks.gpu_run import GIB, Run
from launch.benchmarks.sweep import SHARES


@dataclass(frozen=True)
class Sizes:
    """What is measured: sides and caps (None: the whole card) of (a) and (b), numbers and side of tiles of (c)."""

    image: tuple[int, float | None]
    large: tuple[int, float | None]
    largest: tuple[int, float | None]
    bags: tuple[int, ...]
    bag_cap: float
    tile: int
    exact: int
    sample: int  # tiles of the native measurement


FULL = Sizes((13_824, 24), (32_768, 80), (65_536, None), (2_048, 12_800, 41_000), 24, 256, 224, 512)
QUICK = Sizes((96, None), (160, 0.047), (224, None), (8, 16, 32), 0.047, 32, 40, 8)
QUICK_GPU = replace(QUICK, large=(160, 1.0), bag_cap=1.0)  # an allocator's blocks alone exceed less


@dataclass
class SizedRun(Run):
    """A run with its sizes and the user's options."""

    sizes: Sizes = FULL
    options: dict[str, str] = field(default_factory=dict)


def fitted(
    run: SizedRun, cap: float | None, attempt: Callable[[int], tuple[Training, float]], what: str
) -> tuple[Training, float]:
    """What `attempt` makes of the largest share of the cap (GiB) that it fits into.

    Raises:
        DoesNotFitError: it fits into none.
    """
    machine, reason = run.machine, "nothing was tried"
    machine.cap(None if cap is None else cap * GIB)
    size = total_memory(machine) if cap is None else int(cap * GIB)
    for share in SHARES if machine.gpu else (1.0,):
        try:
            return attempt(int(share * size))
        except DoesNotFitError as error:
            reason = str(error)
            logger.warning("%s within %.2f of the cap: %s", what, share, reason)
        machine.rest(host=True)
    raise DoesNotFitError(reason)


def first_step(run: SizedRun, training: Training, cap_bytes: int) -> float:
    """Take a training's first step, which is counted on a CPU; its seconds."""
    if training.plan is not None and run.machine.gpu:
        run.need(1.5 * training.plan.seconds, f"a step, planned to take {training.plan.seconds:.1f} s,")
    training.count(cap_bytes)
    return training.step()


def total_memory(machine: Machine) -> int:
    """Bytes of the device; of a CPU more than anything needs."""
    return torch.cuda.get_device_properties(machine.device).total_memory if machine.gpu else 2**40
