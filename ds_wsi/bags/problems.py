"""What is wrong with a cohort, all of it in one message: like problems on one line, with their count and examples."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

SHOWN = 5  # examples of one kind of problem
_HINT = re.compile(r"\.? HINT: ")
# What a message says of one slide alone: names, paths and numbers are no part of its kind.
_NAMED = re.compile(r"\b(slide|patient|row|rows) \S+|'[^']*'|\"[^\"]*\"|\d+")


class ManifestError(ValueError):
    """Everything that is wrong with a cohort, in one message.

    Attributes:
        problems: one entry each.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source, self.problems = source, tuple(problems)
        lines = "\n".join(f"  {number}. {line}" for number, line in enumerate(condensed(self.problems), 1))
        count = len(self.problems)
        super().__init__(f"{source} has {count:,} problem{'' if count == 1 else 's'}:\n{lines}")


class _Parts(NamedTuple):
    """A message in parts: "<rule>, got <value> (<place>). HINT: <hint>"."""

    rule: str
    value: str
    place: str
    hint: str

    @property
    def example(self) -> str:
        return f"{self.value} ({self.place})" if self.place else self.value


def condensed(problems: Sequence[str]) -> list[str]:
    """The problems as lines, in their order: more than five of one kind become one line, with count and examples.

    Of a kind with a few values (labels, say) each value is a kind of its own.
    """
    parts = [_parts(problem) for problem in problems]
    rules = [_NAMED.sub(r"\1", each.rule) for each in parts]
    values: dict[str, set[str]] = defaultdict(set)
    for rule, each in zip(rules, parts, strict=True):
        values[rule].add(each.value)
    kinds = [(rule, each.value if len(values[rule]) <= SHOWN else "") for rule, each in zip(rules, parts, strict=True)]
    counts = Counter(kinds)
    lines: list[str] = []
    told = set()
    for kind, problem in zip(kinds, problems, strict=True):
        if counts[kind] <= SHOWN:
            lines.append(problem)
        elif kind not in told:
            told.add(kind)
            lines.append(_line([each for each, its in zip(parts, kinds, strict=True) if its == kind]))
    return lines


def _line(group: Sequence[_Parts]) -> str:
    shown, more = group[:SHOWN], len(group) - SHOWN
    first = group[0]
    if all(each.rule == first.rule and each.value == first.value and each.place for each in group):
        examples = f"{first.rule}, got {first.value} ({'; '.join(each.place for each in shown)}; and {more:,} more)"
    elif all(each.rule == first.rule and each.value for each in group):
        examples = f"{first.rule}, got {'; '.join(each.example for each in shown)}; and {more:,} more"
    else:
        whole = (f"{each.rule}, got {each.example}" if each.value else each.rule for each in shown)
        examples = f"{'; '.join(whole)}; and {more:,} more"
    hint = f". HINT: {first.hint}" if first.hint else ""
    return f"{len(group):,} times: {examples}{hint}"


def _parts(problem: str) -> _Parts:
    text, *hint = _HINT.split(problem, maxsplit=1)
    where = ""
    if text.endswith(")"):
        depth = 0
        for start in range(len(text) - 1, -1, -1):
            depth += (text[start] == ")") - (text[start] == "(")
            if depth == 0:
                text, where = text[:start].rstrip(), text[start + 1 : -1]
                break
    rule, _, value = text.partition(", got ")
    return _Parts(rule, value, where, hint[0] if hint else "")
