"""Reading processes: requests go to them in turn, their answers come back in order, and none is waited for in vain.

[Note: transport] An answer's tensor lies in a file without a name in memory (memfd), whose descriptor comes with the
message through a socket; the receiver maps it, and nothing is copied. Neither /dev/shm, of which a container has 64 MB
by default, nor a semaphore (a file there too) has any part in it, and no thread of the sender's has to answer before
the tensor can be had: what a worker has sent can be read whether or not it is stopped since. A worker writes to the
file by `write`, which fails with an error where memory is short; a mapped page would end the process.

[Note: signals] Workers ignore the signals that ask a run to end: it may want another step, and their tiles. They end
with the process that started them, by SIGKILL, which a stopped process obeys too.
"""

import errno
import mmap
import multiprocessing
import os
import pickle
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import cache
from itertools import islice
from multiprocessing import process, util
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ds_wsi.runtime.log import logger
from ds_wsi.runtime.processes import end_with_parent, end_words, is_stopped, state_of, state_words
from ds_wsi.runtime.seams import ExceptionWrapper
from ds_wsi.slides.errors import SlideError

LOOK_S = 1.0  # between looks at whether the other side lives
JOIN_S = 5.0  # that a killed process may take to go; one that waits for a dead disk may never
_LENGTH = struct.Struct("<Q")
_PLACE = struct.Struct("<q")
_CONTEXT = multiprocessing.get_context("fork")  # the cohort's grids come without a copy
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WorkerError(SlideError):
    """A process that reads has died, is stopped, or does not come to an end; names where it was."""


class Answer(NamedTuple):
    """What a request is answered with: a tensor on the CPU, and anything small that can be pickled."""

    tensor: Tensor
    more: Any


class Job(Protocol):
    """What a worker does."""

    tell: Callable[[int], None]  # to be called with the number of the row that is read next

    def answer(self, request: Any) -> Answer:
        """Answer one request."""


def answers(
    job: Job,
    requests: Iterable[Any],
    *,
    workers: int,
    ahead: int,
    timeout_s: float,
    describe: Callable[[Any, int], str],
    known: Callable[[Any], Answer | None] = lambda request: None,
) -> Generator[tuple[Any, Answer], None, None]:
    """The requests, in order, each with its answer, worked at by processes of this one.

    Args:
        job: forked into every worker.
        requests: consumed as the stream goes, `ahead` of what is taken.
        workers: processes, at least 1.
        ahead: requests under way at a time.
        timeout_s: how long an answer is waited for once it is due; 0 waits for ever.
        describe: what a request, and the last row that `tell` was given (-1: none), is about, in words.
        known: the answer to a request that no worker need be asked, else None.

    Raises:
        WorkerError: an answer that does not come.
        Exception: what the job raised, with the worker's traceback in its text.
    """
    source, waiting = ((request, known(request)) for request in requests), deque[tuple[Any, Answer | None]]()
    with _Pool(job, workers, timeout_s, describe) as pool:

        def ask(n_requests: int) -> None:
            for request, answer in islice(source, n_requests):
                if answer is None:
                    pool.ask(request)
                waiting.append((request, answer))

        ask(ahead)
        while waiting:
            request, answer = waiting.popleft()
            if answer is None:
                answer = pool.take(request)
            ask(1)
            yield request, answer


class _Worker:
    """One process, as its parent sees it."""

    def __init__(self, job: Job, number: int) -> None:
        self.number = number
        self.place = mmap.mmap(-1, _PLACE.size)  # shared: where the worker is, even after its death
        self.socket, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # The kernel's word for a parent is the thread that forks: another than the main one may end before the process.
        dies_along = threading.current_thread() is threading.main_thread()
        arguments = (child_end, job, self.place, number, os.getpid(), dies_along)
        self.process = _CONTEXT.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        child_end.close()  # the end of the process is then the end of the stream
        self.socket.setblocking(False)
        self.to_send = bytearray()
        self.received = bytearray()
        self.files: deque[int] = deque()
        self.ended = False

    def pump(self, wait_s: float) -> None:
        """Send and receive what can be without waiting, or wait so long for something to be."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN | (select.POLLOUT if self.to_send else 0))
        for _, events in poll.poll(wait_s * 1000):
            if events & select.POLLOUT:
                self.send()
            if events & ~select.POLLOUT:
                self._receive()

    def send(self) -> None:
        """What fits into the socket; the rest is sent while answers are waited for."""
        try:
            while self.to_send:
                del self.to_send[: self.socket.send(self.to_send)]
        except BlockingIOError:
            pass
        except OSError:  # its end is closed
            self.to_send.clear()
            self.ended = True

    def _receive(self) -> None:
        try:
            data, files, _, _ = socket.recv_fds(self.socket, 2**16, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except ConnectionError:
            data, files = b"", []
        self.files.extend(files)
        self.received += data
        self.ended = self.ended or not data

    def message(self) -> Any:
        """The next whole message, or None."""
        if len(self.received) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self.received)[0]
        if len(self.received) < end:
            return None
        message = pickle.loads(self.received[_LENGTH.size : end])
        del self.received[:end]
        return message

    def kill(self) -> None:
        """End the process, whatever it does."""
        if self.process.is_alive():
            self.process.kill()

    def close(self) -> None:
        """Let go of what is left, once it was killed."""
        self.process.join(JOIN_S)
        if self.process.is_alive():
            # In a wait that no signal ends. Python would join it at exit, for ever.
            process._children.discard(self.process)  # type: ignore[attr-defined]
        self.socket.close()
        while self.files:
            os.close(self.files.popleft())


class _Pool:
    """The workers of one stream of answers."""

    def __init__(self, job: Job, workers: int, timeout_s: float, describe: Callable[[Any, int], str]) -> None:
        _tell_transport()
        self.timeout_s, self.describe = timeout_s, describe
        self.workers: list[_Worker] = []
        self.asked = self.taken = 0
        # Before Python, at exit, asks daemons by SIGTERM and waits for them.
        self._at_exit = util.Finalize(None, self.close, exitpriority=100)
        for number in range(workers):
            self.workers.append(_Worker(job, number))

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self._at_exit()

    def close(self) -> None:
        """Kill all, then wait for all: nobody is waited for while another still works."""
        for worker in self.workers:
            worker.kill()
        while self.workers:
            self.workers.pop().close()

    def ask(self, request: Any) -> None:
        """Hand a request to the worker whose turn it is, without waiting for it."""
        worker = self.workers[self.asked % len(self.workers)]
        self.asked += 1
        data = pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL)
        worker.to_send += _LENGTH.pack(len(data)) + data
        worker.send()

    def take(self, request: Any) -> Answer:
        """The answer to the oldest request that was not taken yet."""
        worker = self.workers[self.taken % len(self.workers)]
        self.taken += 1
        started = time.monotonic()
        while (message := worker.message()) is None:
            if worker.ended:
                raise WorkerError(self._death(worker, request))
            waited = time.monotonic() - started
            if 0 < self.timeout_s <= waited:
                raise WorkerError(self._lateness(worker, request))
            # All of them: the others want their next requests, which may not have fitted into their sockets.
            for other in self.workers:
                if other is not worker and other.to_send:
                    other.send()
            worker.pump(min(LOOK_S, max(0.01, self.timeout_s - waited)) if self.timeout_s else LOOK_S)
        if isinstance(message, ExceptionWrapper):
            message.reraise()
        return _received(message, worker)

    def _at(self, worker: _Worker, request: Any) -> str:
        return self.describe(request, _PLACE.unpack_from(worker.place)[0])

    def _death(self, worker: _Worker, request: Any) -> str:
        worker.kill()  # its stream is at the end, whatever it still does
        worker.process.join(JOIN_S)
        code = worker.process.exitcode
        return (
            f"reading process {worker.number} must live as long as the run, got its end, {end_words(code)}, at "
            f"{self._at(worker, request)}. HINT: {_end_remedy(code)}"
        )

    def _lateness(self, worker: _Worker, request: Any) -> str:
        state = state_of(worker.process.pid)
        remedy = "let it go on (kill -CONT), and start again" if is_stopped(state) else "check the file and its disk"
        return (
            f"tiles must come within {self.timeout_s:g} s, got none of {self._at(worker, request)} from reading "
            f"process {worker.number} (pid {worker.process.pid}): {state_words(state)}. "
            f"HINT: {remedy}; --read_timeout sets the limit, 0 none."
        )


def _received(message: tuple[Any, ...], worker: _Worker) -> Answer:
    shape, dtype, is_last, more = message
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        if not worker.files:  # the kernel leaves out what this process has no descriptor for
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        file = worker.files.popleft()
        try:
            # By its path: torch keeps no descriptor open, as Python's mmap would.
            flat = torch.from_file(f"/proc/self/fd/{file}", shared=True, size=tensor.numel(), dtype=dtype)
        finally:
            os.close(file)
        tensor = flat.view(shape)
    return Answer(tensor.movedim(-1, 1) if is_last else tensor, more)


def _end_remedy(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return (
            "where the machine or container was out of memory, take fewer --dataloader_num_workers; "
            "--resume_from_checkpoint goes on."
        )
    if code == -signal.SIGBUS:
        return "the file became shorter while it was read, or memory ran out; do not change files under a run."
    return "the file may be damaged: replace it, or take it out of the manifest."


def _memory_file() -> int:
    """A descriptor of a file without a name: in memory, and on a system without such files in the temporary folder."""
    try:
        return os.memfd_create("ds_wsi", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        with tempfile.TemporaryFile(prefix="ds_wsi-") as file:
            return os.dup(file.fileno())


@cache  # one line per process
def _tell_transport() -> None:
    try:
        os.close(os.memfd_create("ds_wsi", os.MFD_CLOEXEC))
    except (AttributeError, OSError) as error:
        logger.info(
            "tiles come from reading processes in files of %s: no memory files (%s)", tempfile.gettempdir(), error
        )


def _work(child_end: socket.socket, job: Job, shared: mmap.mmap, number: int, parent: int, dies_along: bool) -> None:
    """The worker: answers until its parent is gone."""
    if dies_along:  # stopped, or in a read that does not come back, it would outlive one that is killed
        end_with_parent()
    for ignored in _IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    torch.set_num_threads(1)
    job.tell = lambda row: _PLACE.pack_into(shared, 0, row)
    link = _Link(child_end, parent)
    while True:
        request = pickle.loads(link.receive())
        job.tell(-1)
        try:
            tensor, more = job.answer(request)
            head, file = _stored(tensor, more)
        except Exception:
            link.send(pickle.dumps(ExceptionWrapper(where=f"in reading worker process {number}")), None)
            continue
        link.send(head, file)
        if file is not None:
            os.close(file)
        del tensor


def _stored(tensor: Tensor, more: Any) -> tuple[bytes, int | None]:
    """A tensor as the head of a message and a file; channels-last memory stays so."""
    is_last = tensor.dim() > 2 and not tensor.is_contiguous()
    plain = (tensor.movedim(1, -1) if is_last else tensor).contiguous()
    head = pickle.dumps((tuple(plain.shape), plain.dtype, is_last, more))
    if not plain.numel():
        return head, None
    file = _memory_file()
    try:
        rest = plain.view(-1).view(torch.uint8).numpy().data
        while rest:
            rest = rest[os.write(file, rest) :]
    except OSError as error:
        os.close(file)
        raise WorkerError(
            f"memory must hold the tiles that are read ahead, got {error.strerror} for {plain.nbytes} bytes. "
            "HINT: take fewer --dataloader_num_workers, or give the machine or container more memory."
        ) from error
    return head, file


class _Link:
    """A worker's end of the socket; the process ends when its parent has."""

    def __init__(self, child_end: socket.socket, parent: int) -> None:
        self.socket, self.parent = child_end, parent
        self.socket.settimeout(LOOK_S)

    def receive(self) -> bytes:
        """The next message."""
        return self._exactly(_LENGTH.unpack(self._exactly(_LENGTH.size))[0])

    def _exactly(self, n_bytes: int) -> bytes:
        received = bytearray()
        while len(received) < n_bytes:
            try:
                data = self.socket.recv(n_bytes - len(received))
                if not data:
                    os._exit(0)
                received += data
            except TimeoutError:
                self._look()
            except OSError:
                os._exit(0)
        return bytes(received)

    def send(self, data: bytes, file: int | None) -> None:
        """A message, with a descriptor where there is one; waits while the parent is busy."""
        rest, files = memoryview(_LENGTH.pack(len(data)) + data), [] if file is None else [file]
        while rest:
            try:
                rest = rest[socket.send_fds(self.socket, [rest], files) :]
                files = []
            except TimeoutError:
                self._look()
            except OSError:
                os._exit(0)

    def _look(self) -> None:
        # Workers that were started later hold the parent's end open too: only this tells that it is gone.
        if os.getppid() != self.parent:
            os._exit(0)
