"""Asked to end by a signal or by the clock, and started again: the weights of an uninterrupted run, bit by bit."""

import os
import random
import signal
import subprocess

import psutil
import pytest
from same_end import require_same_end

from runs import ROOT, TIMEOUT_S, environment, on_a_free_port, run, train_arguments

pytestmark = pytest.mark.launch
PYTHON = ["python", "launch/train.py"]
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node", "2", "launch/train.py"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "launch/train.py", "--deepspeed", "ds_configs/offload.json"],
    "accelerate": ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "launch/train.py"],
}
STOPPED = 75


def stop(command: list[str], number: int, after: str) -> str:
    """Start, send the signal when a line is printed; what was printed until all processes are gone."""
    process = subprocess.Popen(
        on_a_free_port(command),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    printed = []
    assert process.stdout is not None
    for line in process.stdout:
        printed.append(line)
        if after in line:
            break
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(number)
    rest, _ = process.communicate(timeout=TIMEOUT_S)
    _, alive = psutil.wait_procs(children, timeout=40)
    assert not alive, f"processes are left: {alive}"
    return "".join(printed) + rest


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=[pytest.mark.slow] * (name != "torchrun")) for name in LAUNCHERS]
)
def test_all_ranks_of_a_launcher_end_together(launcher, demo_manifest, tmp_path):
    """SIGTERM to the launcher: each sends it on in its own way, or is gone; the ranks agree after a step."""
    folder, options = tmp_path / "run", ("--dropout", "0.2", "--num_train_epochs", "3")
    if launcher == "torchrun":  # running statistics that each rank tracks for itself
        options += ("--norm_training", "bag")
    command = [*LAUNCHERS[launcher], *train_arguments(demo_manifest, folder, *options), "--resume_from_checkpoint"]
    printed = stop(command, signal.SIGTERM, after="epoch 1/3")
    assert "stopped by SIGTERM: the same command goes on" in printed, printed[-3000:]
    assert list(folder.glob("checkpoint-*")), printed[-3000:]
    assert "RankFailureError" not in printed, printed[-3000:]
    assert "resumed from" in run(command)
    if launcher == "torchrun":
        whole = tmp_path / "whole"
        run([*LAUNCHERS[launcher], *train_arguments(demo_manifest, whole, *options)])
        require_same_end(folder, whole)


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


def test_the_slurm_script_queues_a_stopped_job_again(demo_manifest, tmp_path):
    """Two ranks by a stand-in for srun: stopped by the clock, then to the end."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    requeued = tmp_path / "requeued"
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(random.randrange(20000)), "REQUEUED": str(requeued)}
    variables = environment() | slurm | {"DS_WSI_TRACEBACK": "1"}
    variables["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{variables['PATH']}"
    command = [
        "bash",
        "launch/slurm/train.sbatch",
        "launch/train.py",
        *train_arguments(demo_manifest, tmp_path / "run"),
    ]
    command += ["--resume_from_checkpoint", "--max_minutes"]
    codes = []
    for minutes in ("0.001", "0"):
        done = subprocess.run(
            [*command, minutes], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        codes.append(done.returncode)
    assert codes == [STOPPED, 0], done.stderr[-3000:]
    assert requeued.read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    assert "resumed from" in done.stderr
    assert "2 processes" in done.stderr
