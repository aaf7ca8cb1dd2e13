"""Starts the real commands on the small demo cohort."""

import os
import subprocess
import sys
from pathlib import Path

from ds_wsi.engines.machine.cpu import free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_S = 300
# The launchers' default port is the same for all, and files of tests run beside each other.
PORT_OPTION = {"deepspeed": (1, "--master_port"), "accelerate": (2, "--main_process_port")}


def train_arguments(manifest: Path, output_dir: Path, *extra: str) -> list[str]:
    """Options of a run of a few seconds; the encoder is small, the path is the main job's."""
    options = ["--manifest", str(manifest), "--output_dir", str(output_dir), "--tile_size_px", "64"]
    return [*options, "--encoder", "resnet10t", "--num_train_epochs", "2", *extra]


def environment() -> dict[str, str]:
    """This process's variables, one thread per rank, and the environment's commands on the path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def run(command: list[str]) -> str:
    """Run to the end from the project's root; returns what was printed, raises with it where it failed."""
    done = subprocess.run(
        on_a_free_port(command),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{printed[-4000:]}"
    return printed


def on_a_free_port(command: list[str]) -> list[str]:
    """The command, of a launcher with a port that is free now."""
    if command[0] not in PORT_OPTION:
        return command
    position, option = PORT_OPTION[command[0]]
    return [*command[:position], option, str(free_port()), *command[position:]]
