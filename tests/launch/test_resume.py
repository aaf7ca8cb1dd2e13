"""Killed at any moment and started again: the weights of an uninterrupted run, bit by bit."""

import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from same_end import require_same_end

from ds_wsi.cli import main
from runs import ROOT, environment, run, train_arguments

pytestmark = pytest.mark.launch
LAUNCHERS = {
    "python": ["python", "launch/train.py"],
    # One rank: more are equal to rounding only, for gloo sums in the order of arrival.
    "deepspeed": ["python", "launch/train.py", "--deepspeed", str(ROOT / "ds_configs" / "offload.json")],
}


def kill_after(command: list[str], folder: Path, step: int, delay_s: float) -> bool:
    """Start, wait for the checkpoint of `step` and `delay_s` more, kill -9; whether the run was still going."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not (folder / f"checkpoint-{step}").exists():
        assert time.monotonic() < deadline, f"no checkpoint-{step} in two minutes"
        time.sleep(0.005)
    time.sleep(delay_s)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(launcher, demo_manifest, tmp_path):
    options = ("--save_steps", "1", "--dropout", "0.2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run([*LAUNCHERS[launcher], *train_arguments(demo_manifest, whole, *options)])
    command = [*LAUNCHERS[launcher], *train_arguments(demo_manifest, killed, *options), "--resume_from_checkpoint"]
    delays = random.Random(0)  # anywhere within a step, a save or a validation
    kills = [kill_after(command, killed, step, delays.uniform(0, 0.5)) for step in (1, 3, 5)]
    assert any(kills), "every run ended before it was killed: the test proved nothing"
    # A checkpoint that a disk fault tore: named, passed over for the one before it.
    newest = max(killed.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    torn = next(path for path in sorted(newest.rglob("*")) if path.suffix in (".safetensors", ".pt", ".bin"))
    torn.write_bytes(torn.read_bytes()[:-100])
    printed = run(command)
    assert f"{newest} is torn ({torn.relative_to(newest)} has" in printed
    assert "resumed from" in printed
    require_same_end(killed, whole)
    assert not list(killed.glob(".*tmp*")), "a half-written file was left"


def test_a_resumed_run_must_be_the_same_run(demo_manifest, tmp_path, capfd):
    arguments = ["train", *train_arguments(demo_manifest, tmp_path / "run", "--num_train_epochs", "1")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert re.search(r"must be a new folder[\s\S]*HINT", capfd.readouterr().err)
    assert main([*arguments, "--resume_from_checkpoint", "--seed", "1"]) == 2
    assert "seed must be the checkpoint's, 0" in capfd.readouterr().err
