"""Builds the simulated runtime and starts Python on it."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
SOURCES = ("cuda_runtime.cpp", "streams.h")
TIMEOUT_S = 240
LATE_WRITES = 16  # kernels
SCHEDULES: dict[str, dict[str, str]] = {
    "late_copies": {"SIMULATED_CUDA_LATE_COPIES": "1"},
    "late_writes": {"SIMULATED_CUDA_LATE_WRITES": str(LATE_WRITES)},
    "sanitizer": {"SIMULATED_CUDA_SANITIZER": "1"},
}


@cache
def missing() -> str:
    """Why the device cannot be simulated here; empty where it can."""
    if sys.platform != "linux":
        return f"the simulated CUDA device needs Linux's LD_PRELOAD, this is {sys.platform}"
    if torch.version.cuda is None:
        return "the simulated CUDA device needs torch's CUDA build, this is the CPU's"
    if not torch.version.cuda.startswith("13."):
        return f"the simulated CUDA runtime is one of CUDA 13, torch is built for {torch.version.cuda}"
    if shutil.which("g++") is None:
        return "the simulated CUDA device needs g++"
    if not (_headers() / "cuda_runtime_api.h").is_file():
        return "the simulated CUDA device needs the CUDA headers of triton's wheel"
    return ""


def _headers() -> Path:
    spec = importlib.util.find_spec("triton")
    return Path(spec.origin).parent / "backends/nvidia/include" if spec and spec.origin else Path("triton")


@cache
def library() -> Path:
    """The compiled runtime, in a folder of the user's cache that is named by its source.

    Raises:
        RuntimeError: it does not compile; with what g++ said.
    """
    source = b"".join((FOLDER / name).read_bytes() for name in SOURCES)
    name = hashlib.sha256(source + str(torch.version.cuda).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_wsi"
    # Of this name, because torch's libraries ask for the driver too.
    target = root / f"simulated_cuda-{name}" / "libcuda.so.1"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            options = ["-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-std=c++17", f"-I{_headers()}"]
            command = ["g++", *options, str(FOLDER / SOURCES[0]), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ must compile {SOURCES[0]}, got:\n{done.stderr[-4000:]}")
            built.replace(target)  # at once, because other processes may be building it too
    return target


def environment(schedule: str = "late_copies", **more: str) -> dict[str, str]:
    """This process's variables, and those that simulate the device in every Python process below.

    Args:
        schedule: one of `SCHEDULES`, or "" for a process without a device.
        more: variables besides, such as SIMULATED_CUDA_MIB.
    """
    present = dict(os.environ)
    if not schedule:
        return {**present, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1", **more}
    runtime = library()
    paths = {
        "LD_LIBRARY_PATH": (str(runtime.parent),),
        "PYTHONPATH": (str(FOLDER / "site"), str(FOLDER.parent)),
        "PATH": (str(Path(sys.executable).parent),),
    }
    joined = {
        name: os.pathsep.join((*first, present[name]) if present.get(name) else first) for name, first in paths.items()
    }
    simulated = {"LD_PRELOAD": str(runtime), "SIMULATED_CUDA": "1", "OMP_NUM_THREADS": "1"}
    # Where there is a GPU, torch asks its management library how many devices there are.
    simulated["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(int(more.get("SIMULATED_CUDA_DEVICES", "1")))))
    return {**present, **joined, **simulated, **SCHEDULES[schedule], **more}


def measure(case: str, *arguments: str, schedule: str = "late_copies", **more: str) -> Any:
    """What the module `simulated_cuda.cases.<case>` measures, in a process of its own: its last line, as JSON."""
    command = [sys.executable, "-m", f"simulated_cuda.cases.{case}", *arguments]
    return json.loads(run(command, environment(schedule, **more)).splitlines()[-1])


def run(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Run to the end from the project's root; returns what was printed.

    Raises:
        AssertionError: it failed; with the end of what was printed.
    """
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    printed = done.stderr + done.stdout
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{printed[-6000:]}"
    return printed
