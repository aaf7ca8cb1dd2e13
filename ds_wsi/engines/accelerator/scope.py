"""Several runs in one set of processes: each with an engine of its own, over one process group.

Accelerate keeps its state in singletons, and a run ends by destroying the process group. `machine.connection` forms the
next one; within `launched` the processes keep theirs.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator
from ds_wsi.engines.machine.connection import disconnect
from ds_wsi.engines.machine.timeouts import restoring_timeouts
from ds_wsi.runtime.forked import make_pool_anew
from ds_wsi.runtime.memory import restart_peaks
from ds_wsi.runtime.seams import check_seams

T = TypeVar("T")
LOMO = "lomo_optim"  # a package of optimizers that Accelerate looks for
_USES_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_LAUNCHED_WITH = os.environ.get(_USES_DEEPSPEED)


def forget_engine() -> None:
    """Let the next Accelerator be built as if it were the first of this process; a process group stays."""
    check_seams("accelerate", "engine")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # A DeepSpeed engine's Accelerator says in the environment that there is one; the next may have none.
    if _LAUNCHED_WITH is None:
        os.environ.pop(_USES_DEEPSPEED, None)
    else:
        os.environ[_USES_DEEPSPEED] = _LAUNCHED_WITH


@contextmanager
def engine_scope() -> Iterator[None]:
    """An engine may be built inside; when it is left the engine is gone, and another can be built.

    A process group that was there before stays, one that was made inside is destroyed.
    """
    make_pool_anew()
    inherited = dist.is_initialized()
    if torch.cuda.is_available():
        restart_peaks(torch.device("cuda", torch.cuda.current_device()))
    try:
        with restoring_timeouts(), known_absent(LOMO):
            yield
    finally:
        if dist.is_initialized() and not inherited:
            disconnect()
            # DeepSpeed, where it is in use, would hand its clone of the world's group to the next engine.
            groups: Any = sys.modules.get("deepspeed.utils.groups")
            if groups is not None:
                check_seams("deepspeed", "scope")
                groups._WORLD_GROUP = None
        forget_engine()
        gc.collect()  # modules, engine and hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def known_absent(name: str) -> Iterator[None]:
    """Let Python know inside that a top-level module is not there, where it is not.

    Accelerate's optimizer looks for `LOMO` twice at each step, in all folders of the path: half a millisecond.
    """
    absent = name not in sys.modules and find_spec(name) is None
    if absent:
        # Python's own sign for it; its type says modules alone.
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            sys.modules.pop(name, None)


@contextmanager
def closing_trackers(accelerator: Accelerator) -> Iterator[None]:
    """Write out what the trackers hold when the block is left, by an error too."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


@dataclass(frozen=True)
class Processes:
    """The processes of a launcher between two runs: rank 0 to `world_size` - 1."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """The main process's value, on every process. Collective: a broadcast, the identity on one process."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def on_main(self, function: Callable[[], T]) -> T:
        """What the function returns on the main process, which alone calls it, on every process. Collective.

        Raises:
            Exception: the main process's.
            SystemExit: on the others, where it failed: they would wait for its answer.
        """
        if not self.is_main:
            failed, answer = self.share((False, None))
            if failed:
                raise SystemExit(2)
            return cast(T, answer)
        try:
            value = function()
        except BaseException:
            self.share((True, None))
            raise
        self.share((False, value))
        return value


@contextmanager
def launched(settings: EngineSettings, deepspeed_config: dict[str, Any] | None) -> Iterator[Processes]:
    """The launcher's processes, connected as the first engine would connect them, until the block is left.

    Collective: every process of the launcher enters and leaves it.

    Args:
        settings, deepspeed_config: what `build_accelerator` takes, for the runs inside.
    """
    inherited = dist.is_initialized()
    with engine_scope():
        accelerator = build_accelerator(settings, Path("."), deepspeed_config)
        processes = Processes(accelerator.process_index, accelerator.num_processes)
        del accelerator
        # The runs inside make their own; the group, which is open now, they leave as it is.
        forget_engine()
        yield processes
        if dist.is_initialized() and not inherited:
            dist.barrier()  # no process takes the group down while another still uses it
