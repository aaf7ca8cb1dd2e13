"""What the system allows: room on its disks, open files, threads."""

import contextlib
import os
import resource
import tempfile
from pathlib import Path

from ds_wsi.doctor.finding import FAIL, PASS, WARN, Finding
from ds_wsi.doctor.machine import usable_cores
from ds_wsi.runtime.environment import ranks_on_machine
from ds_wsi.runtime.full_disk import free_bytes
from ds_wsi.runtime.units import format_bytes
from ds_wsi.runtime.words import counted

NEEDED_BYTES = 2**30  # a checkpoint of a ResNet-50 with Adam's moments, and a store of tiles beside it
ENOUGH_BYTES = 10 * 2**30
PROBE_BYTES = 2**20
FEW_FILES, ENOUGH_FILES = 128, 1024  # a run holds some 8 slides, 2 pipes and a log for each reading process
_SHM = Path("/dev/shm")


def check_working_folder() -> Finding:
    """Whether the working folder, below which runs are written by default, has room."""
    return disk_finding(Path.cwd(), "run in a folder with room, or name one with --output_dir")


def check_temporary_folder() -> Finding:
    """Whether temporary files have room: downloads, memory files where there are none, torch's compiled code."""
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # none that can be written to
        return Finding(FAIL, str(error), "set TMPDIR to a folder with room")
    return disk_finding(folder, "free space there, or set TMPDIR to a folder with room")


def disk_finding(folder: Path, remedy: str) -> Finding:
    """Whether a folder can be written to and has room; by writing, since quotas do not show otherwise."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(FAIL, f"{folder}: {error.strerror or error}", remedy)
    free = free_bytes(folder)
    if free is None:
        return Finding(PASS, f"{folder} can be written to; the system does not tell what is free")
    words = f"{folder}: {format_bytes(free)} free"
    if free < NEEDED_BYTES:
        return Finding(FAIL, f"{words}, needed {format_bytes(NEEDED_BYTES)}", remedy)
    if free < ENOUGH_BYTES:
        return Finding(WARN, f"{words}; runs with checkpoints of large encoders take more", remedy)
    return Finding(PASS, words)


def check_shared_memory() -> Finding:
    """The size of /dev/shm, for information: batches go through memory files instead (docs/stops.md)."""
    if not _SHM.is_dir():
        return Finding(PASS, f"no {_SHM}; nothing here uses it")
    statistics = os.statvfs(_SHM)
    return Finding(PASS, f"{format_bytes(statistics.f_blocks * statistics.f_frsize)}; nothing here uses it")


def check_open_files() -> Finding:
    """Whether this process may open as many files as a run does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES:
        return Finding(PASS, "no limit" if soft == resource.RLIM_INFINITY else f"limit {soft}")
    remedy = "ulimit -n 4096"
    if hard not in (resource.RLIM_INFINITY,) and hard < ENOUGH_FILES:
        remedy += f" by the administrator (the hard limit is {hard}); until then --num_workers 0"
    return Finding(FAIL if soft < FEW_FILES else WARN, f"limit {soft}, needed {ENOUGH_FILES}", remedy)


def check_threads() -> Finding:
    """Whether the ranks of this machine together start no more threads than it has cores for."""
    cores, n_ranks = usable_cores(), ranks_on_machine()
    text = os.environ.get("OMP_NUM_THREADS")
    each = max(1, cores // n_ranks)
    remedy = f"OMP_NUM_THREADS={each}"
    words = f"{counted(cores, 'core')}, {counted(n_ranks, 'rank')} here"
    if text is None:
        started = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if started * n_ranks > cores:
            return Finding(WARN, f"{words}, OMP_NUM_THREADS not set: {started} threads in each", remedy)
        return Finding(PASS, f"{words}, OMP_NUM_THREADS not set: a thread for each core")
    threads = None
    with contextlib.suppress(ValueError):
        threads = int(text.split(",")[0])  # a list is of nested levels
    if threads is None or threads < 1:
        return Finding(WARN, f"{words}, OMP_NUM_THREADS={text!r}, which OpenMP ignores", remedy)
    if threads * n_ranks > cores:
        return Finding(WARN, f"{words}, OMP_NUM_THREADS={threads}: threads wait for each other", remedy)
    return Finding(PASS, f"{words}, OMP_NUM_THREADS={threads}")
