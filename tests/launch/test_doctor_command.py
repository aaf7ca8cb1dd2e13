"""`ds-wsi doctor` as a user starts it."""

import json
import subprocess
import sys

import pytest

from ds_wsi.doctor.checks import CHECKS

pytestmark = pytest.mark.launch
START = "import sys\nfrom ds_wsi.cli import main\nstatus = main(['doctor', '--quick', '--json'])\n"
SAY = "print([name for name in ('torch', 'numpy', 'deepspeed') if name in sys.modules], file=sys.stderr)\n"


def test_the_quick_doctor_passes_here_and_imports_no_torch():
    command = [sys.executable, "-c", f"{START}{SAY}sys.exit(status)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    report = json.loads(done.stdout)
    failed = [row for row in report["checks"] if row["status"] == "FAIL"]
    assert (done.returncode, failed) == (0, []), done.stderr
    assert [row["name"] for row in report["checks"]] == [check.name for check in CHECKS if check.quick]
    assert done.stderr.splitlines()[-1] == "[]", "a broken torch would end the process that tells of it"
