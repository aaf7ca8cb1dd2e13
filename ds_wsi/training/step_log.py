"""What the trackers are told of each step: kept for some seconds, and written at once."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

from ds_wsi.runtime.memory import peak_memory_bytes
from ds_wsi.training.context import RunContext

EVERY_S = 5.0  # a process that is killed leaves no more than that out of its log


class _Step(NamedTuple):
    """A step's values, and when they came."""

    number: int
    moment: float
    values: dict[str, float]


class StepLog:
    """Values of steps for TensorBoard, on the main process; elsewhere it writes nothing.

    Each is written with the moment at which it came. Accelerate's tracker flushes its file at every call, which takes a
    step of a small model as long as the rest of it.

    Args:
        run: the run whose trackers are told.
    """

    def __init__(self, run: RunContext) -> None:
        self._writers: list[Any] = []
        if run.accelerator.is_main_process:
            self._writers = [tracker.tracker for tracker in run.accelerator.trackers]
        self._steps: list[_Step] = []
        self._written = time.monotonic()

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.write()

    def add(self, number: int, values: Mapping[str, float]) -> None:
        """Take in a step's values; every few seconds all that have come are written."""
        if not self._writers:
            return
        self._steps.append(_Step(number, time.time(), dict(values)))
        if time.monotonic() - self._written > EVERY_S:
            self.write()

    def write(self) -> None:
        """Write what has come, to the disk."""
        steps, self._steps, self._written = self._steps, [], time.monotonic()
        if not steps:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary  # here, because it is not needed earlier

        for writer in self._writers:
            for step in steps:
                summary = Summary(
                    value=[Summary.Value(tag=name, simple_value=value) for name, value in step.values.items()]
                )
                writer.file_writer.add_summary(summary, step.number, step.moment)
            writer.flush()


class PresentPeak:
    """The most memory held so far, looked up every second: asking the system or the allocator takes its time.

    Args:
        run: the run whose device is asked for.
    """

    EVERY_S = 1.0

    def __init__(self, run: RunContext) -> None:
        self._device, self._seen, self._looked = run.device, 0, -self.EVERY_S

    @property
    def n_bytes(self) -> int:
        """Bytes, as they were within the last second."""
        now = time.monotonic()
        if now - self._looked >= self.EVERY_S:
            self._seen, self._looked = peak_memory_bytes(self._device), now
        return self._seen
