"""A process that predicts a split again and again, each time with other weights, while its caller goes on.

A process and not a thread: in a thread each of the many small calls of a forward pass would wait for the interpreter
that the training step holds, and torch's threads and its global generator are one per process.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from ds_wsi.bags.bag import FailureLog, ReadFailureError
from ds_wsi.bags.joined import Grids
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.bags.workers import WorkerError
from ds_wsi.evaluation.norm_choice import NormChoice, NormPlan, choose_norms
from ds_wsi.models import ModelConfig, build_model
from ds_wsi.models.weights_file import read_weights
from ds_wsi.runtime.log import setup_logging
from ds_wsi.runtime.processes import end_with_parent, from_own_path, is_stopped, state_of
from ds_wsi.slides.slide import SlideError

CONTEXT: Any = multiprocessing.get_context("spawn")  # a fork would inherit CUDA's and torch's threads, broken
# Raised as they are: they name the slide and the remedy.
_OF_SLIDES: dict[str, type[Exception]] = {
    error.__name__: error for error in (ReadFailureError, SlideError, WorkerError)
}
_PARENT_CHECK_S = _LOOK_S = 1.0
_FAREWELL_S = 10.0
_HINT = (
    "HINT: give it another --validation_device or more memory, or validate between epochs: without --validate_beside."
)


class ValidatorError(RuntimeError):
    """The process that validates failed or died."""


@dataclass(frozen=True)
class ValidationWork:
    """What is predicted, and where.

    Args:
        config: describes the model whose weights will be given.
        slides, grids: the cohort's, row by row.
        plan: what is measured, on which slides.
        policy: how tiles are read.
        device: the device to compute on, as torch names it.
        precision: the encoder's, one of `PRECISIONS`.
    """

    config: ModelConfig
    slides: Sequence[SlideEntry]
    grids: Grids
    plan: NormPlan
    policy: ReadPolicy
    device: str
    precision: str = "no"


class ValidationResult(NamedTuple):
    """What was measured and chosen, and all tiles that could not be read until now."""

    choice: NormChoice
    failures: dict[tuple[str, int, int], str]


class _Caller(NamedTuple):
    pid: int
    start_method: str
    threads: int
    dies_along: bool  # the thread that starts the process lives as long as the caller


class _Failure(NamedTuple):
    kind: str
    message: str
    where: str


class Validator:
    """The handle of the process: `submit` weights, go on, `wait` for the result; one at a time.

    The process and its readers form a process group of their own, which ends with `close` or with the caller's death.

    Args:
        work: what is predicted.

    Raises:
        ValueError: the device is none of torch's, or is not there.
    """

    def __init__(self, work: ValidationWork) -> None:
        require_device(work.device, "--validation_device")
        self._device, self._timeout_s = work.device, work.policy.timeout_s
        self._connection, child_end = CONTEXT.Pipe()
        in_main = threading.current_thread() is threading.main_thread()
        caller = _Caller(os.getpid(), multiprocessing.get_start_method(), torch.get_num_threads(), in_main)
        arguments = (work, child_end, caller)
        # Not a daemon: those may not have readers.
        self._process = CONTEXT.Process(target=_serve, args=arguments, name="ds_wsi-validator", daemon=False)
        with from_own_path():
            self._process.start()
        child_end.close()  # else its end would not be seen
        self._epoch: int | None = None
        self._result: ValidationResult | None = None
        self._ended = False

    @property
    def pid(self) -> int:
        """The id of the process, and of its group."""
        assert self._process.pid is not None
        return int(self._process.pid)

    def submit(self, epoch: int, weights: Path) -> None:
        """Start to predict with the weights of this epoch, from 1, in a file that must stay until the result is there.

        Raises:
            ValidatorError: the process died.
        """
        assert self._epoch is None, "one at a time"
        self._epoch = epoch
        try:
            self._connection.send((epoch, weights))
        except OSError:
            self._raise_death()

    def check(self) -> None:
        """Raise what `wait` would, where it is known already; never blocks."""
        self._receive(timeout_s=0)

    def wait(self, unless: Callable[[], bool] = lambda: False) -> ValidationResult | None:
        """The result of the weights that were submitted; None where `unless`, asked each second, comes first.

        Raises:
            ReadFailureError, SlideError: as `predict_slides` does.
            WorkerError: a process that reads tiles for it died, or does not come to an end.
            ValidatorError: another failure of the process, its death, or that it is stopped; names it.
        """
        assert self._epoch is not None, "nothing was submitted"
        went_on = time.monotonic()
        while self._result is None:
            if unless():
                return None
            self._receive(timeout_s=_LOOK_S)
            if not is_stopped(state_of(self.pid)):
                went_on = time.monotonic()
            elif 0 < self._timeout_s <= time.monotonic() - went_on:
                self._raise_stop()
        result, self._result, self._epoch = self._result, None, None
        return result

    def close(self) -> None:
        """End the process and its readers; with a result under way, at once."""
        if self._epoch is None:
            with suppress(OSError):  # gone already
                self._connection.send(None)
                connection.wait([self._process.sentinel], _FAREWELL_S)
        self._end_group()
        self._connection.close()

    def _receive(self, timeout_s: float | None) -> None:
        if self._result is not None:
            return
        ready = connection.wait([self._connection, self._process.sentinel], timeout_s)
        if self._connection in ready:
            try:
                answer = self._connection.recv()
            except (EOFError, OSError):
                self._raise_death()
            if isinstance(answer, _Failure):
                self._raise_failure(answer)
            self._result = answer
        elif ready:
            self._raise_death()

    def _raise_failure(self, failure: _Failure) -> NoReturn:
        if failure.kind in _OF_SLIDES:
            raise _OF_SLIDES[failure.kind](failure.message)
        raise ValidatorError(
            f"the validation of epoch {self._epoch} beside training must succeed, got {failure.kind}: "
            f"{failure.message} (process {self.pid} on {self._device}). {_HINT}\n{failure.where}"
        )

    def _raise_stop(self) -> NoReturn:
        raise ValidatorError(
            f"the process that validates beside training must go on, got one that is stopped (SIGSTOP, or a debugger) "
            f"for {self._timeout_s:g} s (process {self.pid} on {self._device}, validating epoch {self._epoch}). HINT: "
            "let it go on (kill -CONT), and resume the run; --read_timeout sets the limit, 0 none."
        )

    def _raise_death(self) -> NoReturn:
        self._end_group()
        code = self._process.exitcode
        how = f"exit status {code}" if code >= 0 else f"death by {signal.Signals(-code).name}"
        doing = "idle" if self._epoch is None else f"validating epoch {self._epoch}"
        raise ValidatorError(
            f"the process that validates beside training must live as long as the run, got {how} "
            f"(process {self.pid} on {self._device}, {doing}). {_HINT}"
        )

    def _end_group(self) -> None:
        if self._ended:
            return
        self._ended = True
        # Before the process is waited for: until then nobody else can have its number.
        with suppress(ProcessLookupError):  # it has not come to form its group
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def require_device(name: str, option: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: it is none of torch's to compute on, or is not there; names the option.
    """
    hint = 'HINT: such as "cpu" or "cuda:1".'
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{option} must be a device of torch's, got {name!r}. {hint}") from error
    if device.type == "meta":
        raise ValueError(f"{option} must be a device that computes, got {name!r}. {hint}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{option} must be a device of this machine, got {name!r} of {torch.cuda.device_count()} GPUs. {hint}"
        )
    return device


def _serve(work: ValidationWork, requests: Any, caller: _Caller) -> None:
    os.setsid()
    if caller.dies_along:  # the thread below does not run while the process is stopped
        end_with_parent()
    threading.Thread(target=_end_with, args=(caller.pid,), daemon=True).start()
    setup_logging()
    # A spawned process would spawn its readers, which costs seconds per epoch.
    multiprocessing.set_start_method(caller.start_method, force=True)
    # A CPU rounds otherwise on another number of threads, and metrics would differ from those of the caller.
    torch.set_num_threads(caller.threads)
    failures = FailureLog(work.slides, work.grids, work.policy.max_failed_fraction)
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return
        if request is None:
            return
        epoch, weights = request
        work_now = replace(work, plan=work.plan.of_epoch(epoch))
        try:
            answer: ValidationResult | _Failure = _validate(work_now, weights, failures)
        except Exception as error:
            answer = _Failure(type(error).__name__, str(error), traceback.format_exc())
        requests.send(answer)


def _end_with(caller: int) -> None:
    """End this process and its readers when the caller is gone, even where that was killed."""
    while os.getppid() == caller:
        time.sleep(_PARENT_CHECK_S)
    os.killpg(0, signal.SIGKILL)


def _validate(work: ValidationWork, weights: Path, failures: FailureLog) -> ValidationResult:
    model = build_model(work.config, allow_code=work.config.own_code.values())  # of this run's command line
    model.load_state_dict(read_weights(weights))
    model.to(work.device)
    model.evaluation_precision = work.precision
    choice = choose_norms(model, work.slides, work.grids, work.policy, failures, work.plan)
    return ValidationResult(choice, dict(failures.reasons))
