"""The checks in their order, and how one is run."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ds_wsi.doctor.compilers import OPS_S, check_ops
from ds_wsi.doctor.device import DEVICE_S, check_device
from ds_wsi.doctor.engines import ENGINE_S, INSTEAD, engine_check
from ds_wsi.doctor.finding import FAIL, Finding
from ds_wsi.doctor.limits import (
    check_open_files,
    check_shared_memory,
    check_temporary_folder,
    check_threads,
    check_working_folder,
)
from ds_wsi.doctor.ranks import RANKS_S, check_ranks
from ds_wsi.doctor.slide import SLIDE_S, check_slide
from ds_wsi.doctor.versions import IMPORTS_S, check_imports, check_versions
from ds_wsi.runtime.errors import SHOW_ALL

_GRACE_S = 20  # beyond the limit of a check's processes: to start and to end them
_REPORT = f"{SHOW_ALL}=1 ds-wsi doctor shows all output; report it in the project's issue tracker"


@dataclass(frozen=True)
class Check:
    """A check.

    Args:
        name: the check's name in the list.
        run: the check.
        timeout_s: the time after which it has failed.
        quick: whether `--quick` runs it.
    """

    name: str
    run: Callable[[], Finding]
    timeout_s: float = 30
    quick: bool = True


@dataclass(frozen=True)
class Checked:
    """A check's name, what it found, and the seconds that it took."""

    name: str
    finding: Finding
    seconds: float


CHECKS = (
    Check("versions", check_versions),
    Check("imports", check_imports, IMPORTS_S + _GRACE_S),
    Check("device", check_device, DEVICE_S + _GRACE_S),
    Check("working folder", check_working_folder),
    Check("temporary folder", check_temporary_folder),
    Check("/dev/shm", check_shared_memory),
    Check("open files", check_open_files),
    Check("threads", check_threads),
    Check("slide", check_slide, SLIDE_S + _GRACE_S),
    Check("ranks", check_ranks, RANKS_S + _GRACE_S),
    Check("compiled ops", check_ops, OPS_S + _GRACE_S),
    *(Check(f"engine {name}", engine_check(name), ENGINE_S + DEVICE_S + _GRACE_S, quick=False) for name in INSTEAD),
)


def run_checks(quick: bool = False) -> Iterator[Checked]:
    """Run the checks one after the other.

    Args:
        quick: leave out the engines.
    """
    for check in CHECKS:
        if check.quick or not quick:
            began = time.monotonic()
            finding = run_check(check)
            yield Checked(check.name, finding, time.monotonic() - began)


def run_check(check: Check) -> Finding:
    """A check's finding; FAIL where it raises, and where it gives none in time.

    It runs in a thread that is left behind at its limit: a disk that does not answer holds it for ever.
    """
    findings: list[Finding] = []

    def run() -> None:
        try:
            findings.append(check.run())
        except Exception as error:
            lines = str(error).splitlines() or [""]
            findings.append(Finding(FAIL, f"{type(error).__name__}: {lines[0]}", _REPORT))

    thread = threading.Thread(target=run, name=f"ds_wsi-{check.name}", daemon=True)
    thread.start()
    thread.join(check.timeout_s)
    return findings[0] if findings else Finding(FAIL, f"no answer within {check.timeout_s:g} s", _REPORT)
