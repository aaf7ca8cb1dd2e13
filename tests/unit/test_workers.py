"""Reading processes that die, stop, hang or find no memory end the run with the tile's name; nothing waits for ever."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from ds_wsi.bags import workers
from ds_wsi.bags.bag import FailureLog, read_bags, read_chunks
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.bags.workers import Answer, WorkerError, answers
from ds_wsi.runtime.processes import GONE, state_of
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.slide import Slide

ORDER = [3, 0, 0, 5, 3]


@pytest.fixture(scope="module")
def cohort(demo_manifest):
    return load_cohort(demo_manifest, TilingPolicy(tile_size_px=64))


def bags_of(cohort, order=ORDER, **policy):
    log = FailureLog(cohort.manifest.slides, cohort.grids, 0.01)
    stream = read_bags(cohort.manifest.slides, cohort.grids, order, ReadPolicy(chunk_tiles=4, **policy), log)
    return [(bag.slide, bag.tiles) for bag in stream]


@pytest.fixture
def at_tile(monkeypatch):
    """Call something in the process that reads the sixth tile of the slide in row 5."""

    def install(cohort, call):
        x, y = (int(value) for value in cohort.grids[5].coords[5])
        slide_id = cohort.manifest.slides[5].slide_id
        read_tile, parent = Slide.read_tile, os.getpid()

        def read(self, *corner, **more):
            if (self.slide_id, *corner[:2]) == (slide_id, x, y) and os.getpid() != parent:
                call()
            return read_tile(self, *corner, **more)

        monkeypatch.setattr(Slide, "read_tile", read)
        return f"slide {slide_id}, tile at ({x}, {y}) ({cohort.manifest.slides[5].path})"

    return install


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep():
    time.sleep(1000)


def stubborn():
    """A read that no polite signal ends."""
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("call", "words"),
    [(stop, "it is stopped (SIGSTOP"), (sleep, "it waits"), (stubborn, "reading process")],
)
def test_a_read_that_does_not_come_is_told_with_its_tile_and_its_process_is_gone(cohort, at_tile, call, words):
    where = at_tile(cohort, call)
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        bags_of(cohort, workers=2, timeout_s=1.0)
    assert time.monotonic() - started < 8
    assert f"tiles must come within 1 s, got none of {where} from reading process" in str(caught.value)
    assert words in str(caught.value)
    assert "--read_timeout" in str(caught.value)
    assert not multiprocessing.active_children()


def test_without_a_limit_a_stopped_process_is_waited_for_until_it_goes_on(cohort, at_tile):
    expected = bags_of(cohort, workers=0)
    pids = multiprocessing.get_context("fork").SimpleQueue()

    def stops():
        pids.put(os.getpid())
        stop()

    at_tile(cohort, stops)
    waker = multiprocessing.get_context("fork").Process(
        target=lambda: (time.sleep(2.5), os.kill(pids.get(), signal.SIGCONT))
    )
    waker.start()
    bags = bags_of(cohort, workers=1, timeout_s=0)
    waker.join()
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(bags, expected, strict=True))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (signal.SIGKILL, "out of memory, take fewer --dataloader_num_workers"),
        (signal.SIGSEGV, "the file may be damaged: replace it"),
        (signal.SIGBUS, "the file became shorter while it was read, or memory ran out"),
    ],
)
@pytest.mark.parametrize("n_workers", [1, 3])
def test_a_process_that_dies_is_told_at_once_with_its_tile(cohort, at_tile, number, remedy, n_workers):
    where = at_tile(cohort, lambda: os.kill(os.getpid(), number))
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        bags_of(cohort, workers=n_workers)
    assert time.monotonic() - started < 8  # and not after the timeout
    assert f"got its end, killed by {number.name}, at {where}. HINT: " in str(caught.value)
    assert remedy in str(caught.value)


def test_workers_outlast_the_signals_that_ask_a_run_to_end(cohort, at_tile):
    expected = bags_of(cohort, workers=0)
    at_tile(cohort, lambda: [os.kill(os.getpid(), one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
    bags = bags_of(cohort, workers=2)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(bags, expected, strict=True))


def test_a_stream_that_is_left_ends_its_processes_and_one_that_is_held_does_not_hold_up_the_exit(cohort, at_tile):
    at_tile(cohort, stop)
    stream = read_chunks(cohort.manifest.slides, cohort.grids, ORDER * 9, ReadPolicy(workers=3, chunk_tiles=4))
    next(stream)
    started = time.monotonic()
    stream.close()
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 5


HELD = """
import os, signal, sys, torch
from ds_wsi.bags.workers import Answer, answers
class Job:
    tell = None
    def answer(self, request):
        if request == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return Answer(torch.full((2**20,), request), os.getpid())
stream = answers(Job(), iter(range(100)), workers=2, ahead=8, timeout_s=60, describe=lambda request, row: "")
print(next(stream)[1].more, next(stream)[1].more, flush=True)
if sys.argv[1:] == ["killed"]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["leaves", "killed"])
def test_a_process_that_ends_takes_its_workers_along(how):
    done = subprocess.run([sys.executable, "-c", HELD, how], capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in pids if state_of(pid) != GONE]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive
    assert done.returncode == (0 if how == "leaves" else -signal.SIGKILL)


class Numbers:
    """Answers with tensors of every kind that reading has, or fails."""

    tell = None

    def answer(self, request):
        generator = torch.Generator().manual_seed(request)
        tiles = torch.randint(0, 256, (request % 4, 5, 7, 3), dtype=torch.uint8, generator=generator)
        if request % 3 == 0:
            return Answer(tiles.permute(0, 3, 1, 2), ("x" * request * 10_000,))
        if request % 3 == 1:
            return Answer(torch.randn(request, 6, generator=generator), ())
        return Answer(torch.randn(6, request, generator=generator).T, ())


@pytest.mark.parametrize("n_workers", [1, 3])
@pytest.mark.parametrize("ahead", [3, 12])
def test_answers_are_the_jobs_own_in_order_whatever_their_size(n_workers, ahead):
    job = Numbers()
    # Requests of 1 MB do not fit into a socket: neither side may wait for the other to read.
    requests = [Large(number) for number in range(30)]
    answered = list(answers(job, requests, workers=n_workers, ahead=ahead, timeout_s=30, describe=lambda *_: ""))
    assert [request for request, _ in answered] == requests
    for request, answer in answered:
        expected = job.answer(request)
        assert torch.equal(answer.tensor, expected.tensor)
        assert answer.more == expected.more
        assert answer.tensor.dtype == expected.tensor.dtype
        if expected.tensor.dim() == 4 and expected.tensor.numel():
            assert answer.tensor.stride() == expected.tensor.stride()


class Large(int):
    """A number whose pickle takes a megabyte."""

    def __reduce__(self):
        return _large, (int(self), b"x" * 2**20)


def _large(number, filling):
    return Large(number)


def test_without_memory_files_tiles_go_through_files_of_the_temporary_folder(cohort, monkeypatch, caplog, tmp_path):
    expected = bags_of(cohort, workers=0)

    def refused(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refused)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    workers._tell_transport.cache_clear()
    with caplog.at_level("INFO", logger="ds_wsi"):
        bags = bags_of(cohort, workers=2)
    workers._tell_transport.cache_clear()
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(bags, expected, strict=True))
    assert f"in files of {tmp_path}: no memory files" in caplog.text
    assert not list(tmp_path.iterdir())


def test_memory_that_is_short_is_an_error_with_a_remedy(cohort, monkeypatch):
    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        WorkerError, match="memory must hold the tiles that are read ahead, got No space left on device"
    ):
        bags_of(cohort, workers=1)


SMALL_SHM = """
import sys, torch
from ds_wsi.bags.bag import FailureLog, ReadPolicy, read_bags
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.slides.tiling import TilingPolicy
cohort = load_cohort(sys.argv[1], TilingPolicy(tile_size_px=256, mpp=0.25))
def bags(workers):
    log = FailureLog(cohort.manifest.slides, cohort.grids, 0.01)
    order = [*range(len(cohort.grids))] * 8
    for bag in read_bags(cohort.manifest.slides, cohort.grids, order, ReadPolicy(workers=workers), log):
        yield bag.slide, torch.hash_tensor(bag.tiles) if hasattr(torch, "hash_tensor") else bag.tiles.long().sum()
for one, other in zip(bags(0), bags(4), strict=True):
    assert one[0] == other[0] and torch.equal(one[1], other[1])
print("the same")
"""


@pytest.mark.parametrize("mount", ["mount -t tmpfs -o size=16m tmpfs", "mount -t tmpfs -o size=64m tmpfs", "full"])
def test_a_small_or_full_dev_shm_has_no_part_in_it(mount, demo_manifest):
    """A container's: /dev/shm of 64 MB by default."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    if mount == "full":
        mount = "mount -t tmpfs -o size=4k tmpfs /dev/shm && echo x > /dev/shm/x; true"
    else:
        mount = f"{mount} /dev/shm"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$@"', sys.executable, "-c", SMALL_SHM, demo_manifest],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "the same\n", done.stderr
