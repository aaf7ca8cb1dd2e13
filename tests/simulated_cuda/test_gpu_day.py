"""`launch/gpu_day.sh` on the simulated device: what has ended well is not run again, what fails is named."""

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ds_wsi.partition.planning.rates import ASSUMED

from .lane import ROOT, TIMEOUT_S, environment

SCRIPT = ROOT / "launch" / "gpu_day.sh"


def gpu_day(variables: dict[str, str], *arguments: str) -> tuple[int, str]:
    """The script's exit status, and what it printed."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def _with_deepspeed(folder: Path, status: int) -> None:
    """Put one that exits with this status in place of the launcher, which takes long."""
    folder.mkdir(exist_ok=True)
    (folder / "deepspeed").write_text(f"#!/bin/sh\necho started with $*\nexit {status}\n", encoding="utf-8")
    (folder / "deepspeed").chmod(0o755)


@pytest.mark.slow
def test_the_script_names_what_fails_and_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    rates = {"Simulated CUDA device": asdict(replace(ASSUMED["cuda"], measured=True))}  # measuring takes a minute
    cache, launchers, marks = tmp_path / "cache", tmp_path / "bin", tmp_path / "gpu_day"
    (cache / "ds_wsi").mkdir(parents=True)
    (cache / "ds_wsi" / "rates.json").write_text(json.dumps(rates), encoding="utf-8")
    _with_deepspeed(launchers, status=3)
    variables = environment()
    variables |= {"PATH": f"{launchers}:{variables['PATH']}", "XDG_CACHE_HOME": str(cache)}
    command = ("--quick", "--only", "exact,train_deepspeed", "--output_dir", str(marks))

    status, printed = gpu_day(variables, *command)
    assert status == 1, printed
    assert "exact: done in" in printed
    assert "failed: train_deepspeed (status 3)" in printed
    assert {path.name for path in marks.glob("*.done")} == {"exact.done"}
    assert "--deepspeed ds_configs/papers.json --manifest" in (marks / "train_deepspeed.log").read_text()
    results = json.loads((marks / "results" / "partition_gpu.json").read_text(encoding="utf-8"))
    assert [(row["part"], row["ratio"] < 1e-10) for row in results["rows"]] == [("exact", True)]
    assert results["notes"]["rates"] == rates["Simulated CUDA device"]
    assert (marks / "results" / "partition_gpu.png").stat().st_size > 0

    _with_deepspeed(launchers, status=0)
    status, printed = gpu_day(variables, *command)
    assert status == 0, printed
    assert "exact: done before" in printed
    assert "train_deepspeed: done in" in printed
    assert "all parts are done" in printed
    assert {path.name for path in marks.glob("*.done")} == {"exact.done", "train_deepspeed.done"}


def test_the_script_refuses_what_it_does_not_know() -> None:
    for arguments, word in (
        (("--only", "exact,trains"), "unknown part trains"),
        (("--only",), "--only must have a value"),
        (("--fast",), "unknown argument --fast"),
    ):
        status, printed = gpu_day(environment(""), *arguments)
        assert status == 2
        assert f"launch/gpu_day.sh: {word}; usage:" in printed
        assert "partition_gpu" in printed
