"""What a check has found."""

from collections.abc import Iterable
from typing import NamedTuple

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"


class Finding(NamedTuple):
    """A check's answer.

    Attributes:
        status: "PASS"; "WARN", what works and could be better; "FAIL", what does not work.
        found: what is there, in words.
        remedy: what to do; empty where nothing is to be done.
    """

    status: str
    found: str
    remedy: str = ""


def worst(findings: Iterable[Finding]) -> Finding:
    """The first of the worst findings."""
    return min(findings, key=lambda one: (FAIL, WARN, PASS).index(one.status))
