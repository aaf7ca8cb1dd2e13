"""The one iterator of a run: its steps, each with the bags that were read for it."""

import time
from collections.abc import Callable, Iterator
from itertools import tee

import torch

from ds_wsi.bags.bag import Bag, BagPart, read_bags
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.training.epoch_plan import PlannedStep
from ds_wsi.training.micro_step import MicroStep, lay_bags
from ds_wsi.training.run import Run


def read_parts(run: Run, policy: ReadPolicy) -> Callable[[Iterator[BagPart]], Iterator[Bag]]:
    """How a run reads bags: what yields those of the parts that it is given, in their order, read ahead by `policy`."""
    cohort = run.cohort

    def read(parts: Iterator[BagPart]) -> Iterator[Bag]:
        return read_bags(
            *(cohort.manifest.slides, cohort.grids, parts, policy, run.failures),
            may_be_empty=run.mesh.tile_size > 1,
        )

    return read


class StepReader:
    """The steps of a run in order, each with the bags that this rank trains on in it.

    One pass over the plan is behind both: the parts that are asked for, ahead of the training, and the steps that take
    them. Each bag is compared with the part that it should be, too.

    Args:
        run: the run that takes the steps.
        planned: the steps.
        read: yields the bags of the parts that it is given, in their order; it may ask for parts ahead of its bags.

    Attributes:
        reads_ahead: whether `make_ready` does something. On a CPU it would only hold memory: the reading processes are
            ahead already, and there is no copy.
        waited: how long steps waited for bags on this rank, in seconds; reading while the device works is no waiting.
    """

    def __init__(
        self, run: Run, planned: Iterator[PlannedStep], read: Callable[[Iterator[BagPart]], Iterator[Bag]]
    ) -> None:
        self.run = run
        self.reads_ahead = run.device.type == "cuda"
        self.waited = 0.0
        self._planned, asked = tee(planned)
        self._bags = read(part for step in asked for parts in step.parts for part in parts)
        self._epoch = -1
        self._following = next(self._planned, None)
        self._ready: MicroStep | None = None

    def of_epoch(self, epoch: int) -> Iterator[tuple[PlannedStep, Iterator[MicroStep]]]:
        """The steps of the epoch that are left, each with its micro-steps, whose bags are read when they are taken.

        Take all micro-steps of a step before the next step.
        """
        self._epoch = epoch
        while (step := self._following) is not None and step.epoch == epoch:
            self._following = next(self._planned, None)
            yield step, self._micro_steps(step)

    def make_ready(self) -> None:
        """Read the first bags of the next step of the epoch, and start their copy: call it with the work queued.

        The copy has the computing stream's turn, after that work: its memory is what the activations have left.
        """
        step = self._following
        if self.reads_ahead and step is not None and step.epoch == self._epoch:
            queued = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
            waited = self.waited
            self._ready = self._read(step, step.parts[0])
            if queued is not None and not queued.query():
                self.waited = waited  # the device is still at work: it has not waited

    def _micro_steps(self, step: PlannedStep) -> Iterator[MicroStep]:
        for parts in step.parts:
            ready, self._ready = self._ready, None  # if any, of the step's first bags
            yield self._read(step, parts) if ready is None else ready

    def _read(self, step: PlannedStep, parts: tuple[BagPart, ...]) -> MicroStep:
        return lay_bags(self.run, [self._bag_of(step, part) for part in parts], step.number)

    def _bag_of(self, step: PlannedStep, part: BagPart) -> Bag:
        """The next bag, which must be the part's."""
        began = time.perf_counter()
        bag = next(self._bags, None)
        self.waited += time.perf_counter() - began
        if bag is None or bag.slide != part.slide:
            slides = self.run.cohort.manifest.slides
            read = "no bag" if bag is None else slides[bag.slide].words
            raise RuntimeError(
                f"a step must train on the bags that were planned for it, {slides[part.slide].words}, got "
                f"{read} (epoch {step.epoch + 1}, step {step.number}). HINT: report it in the project's issue "
                "tracker; DS_WSI_TRACEBACK=1 shows where it was. The last checkpoint is of before."
            )
        return bag
