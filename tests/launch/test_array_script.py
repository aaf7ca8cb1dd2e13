"""The Slurm script of the commands that share slides, with stand-ins of srun, scontrol and a task that is stopped."""

import os
import subprocess

import pytest

from ds_wsi.slides.coords import read_grid
from runs import ROOT, TIMEOUT_S, environment

pytestmark = pytest.mark.launch
SCRIPT = str(ROOT / "launch" / "slurm" / "features.sbatch")
STOPPED = 75
SRUN = """#!/bin/bash
echo "$1" >> "$TOLD"; shift
tasks=()
for rank in $RANKS; do
    SLURM_STEP_ID=0 SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" &
    tasks+=($!)
done
code=0
for job in "${tasks[@]}"; do wait "$job" || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$TOLD"
"""
COMMAND = """#!/bin/bash
if [[ $SLURM_PROCID == 0 && -n $STOPS ]]; then exit 75; fi
exec python -m ds_wsi.cli "$@"
"""


def test_the_script_parses_and_asks_for_a_command():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


def test_a_stopped_task_is_queued_again_and_the_others_do_its_slides(demo_manifest, tmp_path):
    """A task of an array of two: one of its two processes is stopped at once; then one that finds all done."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ds-wsi", COMMAND)):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    told, tiles = tmp_path / "told", tmp_path / "tiles"
    variables = environment() | {"SLURM_JOB_ID": "71", "TOLD": str(told), "RANKS": "0 1", "STOPS": "yes"}
    variables |= {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "2"}
    variables["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{variables['PATH']}"
    command = ["bash", SCRIPT, "tile", "--manifest", str(demo_manifest), "--tile_size_px", "64"]
    command += ["--output_dir", str(tiles)]

    def submit(**more):
        return subprocess.run(
            command, cwd=ROOT, env=variables | more, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    done = submit()
    assert done.returncode == STOPPED, done.stderr[-3000:]
    assert told.read_text().splitlines() == ["--kill-on-bad-exit=0", "requeue 71"]
    written = {path.name: path.read_bytes() for path in tiles.iterdir()}
    assert sum(len(read_grid(path)) for path in tiles.glob("*.safetensors")) == 112
    assert "8 slides, 112 tiles" in done.stdout
    again = submit(STOPS="", RANKS="0")
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path.name: path.read_bytes() for path in tiles.iterdir()} == written
    assert "8 slides, 112 tiles" not in again.stdout  # another process has told it
