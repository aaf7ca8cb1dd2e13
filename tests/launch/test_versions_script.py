"""`tests/versions.sh`: what it would run is there, and nothing is run by `--dry_run`."""

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch
ROOT = Path(__file__).resolve().parents[2]


def script(*arguments):
    command = [str(ROOT / "tests" / "versions.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def test_a_dry_run_prints_commands_of_files_that_are_there(tmp_path):
    done = script("--dry_run", "--folder", str(tmp_path / "versions"))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert all(line.startswith("+ ") for line in lines)
    assert f"{tmp_path}/versions/oldest/bin/pip install -q -e .[test] -c constraints/oldest.txt" in done.stdout
    tests = [word for line in lines for word in line.split() if word.startswith("tests/")]
    assert len(tests) > 5
    assert [name for name in tests if not (ROOT / name).is_file()] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("--nothing",), ("--constraints", "none.txt"), ("--folder",)])
def test_what_is_not_known_is_refused(arguments):
    done = script(*arguments)
    assert done.returncode == 2
    assert "usage: tests/versions.sh" in done.stderr
