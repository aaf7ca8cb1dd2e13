"""`ds-wsi doctor`: whether this machine can do what ds_wsi asks of it."""

import argparse
import json

from ds_wsi.commands.parser import add_command
from ds_wsi.doctor.checks import Checked, run_checks
from ds_wsi.doctor.finding import FAIL, PASS, WARN
from ds_wsi.runtime.streams import show

_NAME_WIDTH = 18


def add_doctor(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi doctor`."""
    parser = add_command(subparsers, "doctor", run_doctor)
    parser.add_argument("--quick", action="store_true", help="leave out the two steps of each engine (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON (default: a line per check)")


def run_doctor(options: argparse.Namespace) -> int:
    """`ds-wsi doctor`: exit status 1 where a check fails."""
    done: list[Checked] = []
    for checked in run_checks(options.quick):
        done.append(checked)
        if not options.json:
            show(_line(checked))
    counts = {status: sum(one.finding.status == status for one in done) for status in (PASS, WARN, FAIL)}
    if options.json:
        rows = [{"name": one.name, **one.finding._asdict(), "seconds": round(one.seconds, 1)} for one in done]
        show(json.dumps({"checks": rows, "counts": counts}, indent=2))
    else:
        seconds = sum(one.seconds for one in done)
        show(", ".join(f"{count} {status}" for status, count in counts.items()) + f" in {seconds:.0f} s")
    return 1 if counts[FAIL] else 0


def _line(checked: Checked) -> str:
    status, words, remedy = checked.finding
    hint = f"\n{'':{_NAME_WIDTH + 6}}HINT: {remedy}." if remedy else ""
    return f"{status:<6}{checked.name:<{_NAME_WIDTH}}{words}{hint}"
