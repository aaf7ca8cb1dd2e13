"""A benchmark's result on disk: JSON with the environment, a Markdown table, a PNG."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ds_wsi.runtime.environment import environment
from ds_wsi.runtime.files import atomic_path, json_number, write_json, write_text


@dataclass(frozen=True)
class Bound:
    """A claim of the README: `measured` at least (or at most) `limit`."""

    words: str
    measured: float
    limit: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether the claim is true of this run."""
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


@dataclass(frozen=True)
class Result:
    """A benchmark's rows, bounds, and how to draw it."""

    title: str
    rows: Sequence[dict[str, Any]]
    bounds: Sequence[Bound]
    draw: Callable[[Figure], None]
    notes: dict[str, Any]


def write_result(name: str, result: Result, directory: Path) -> None:
    """Write NAME.json, NAME.md and NAME.png, each atomically."""
    bounds = [{**asdict(bound), "holds": bound.holds} for bound in result.bounds]
    record = {"title": result.title, "environment": environment(), "notes": result.notes}
    write_json(directory / f"{name}.json", _as_json({**record, "rows": list(result.rows), "bounds": bounds}))
    write_text(directory / f"{name}.md", markdown(result))
    figure = Figure(figsize=(8, 4), layout="constrained")
    result.draw(figure)
    with atomic_path(directory / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=150)


def markdown(result: Result) -> str:
    """The rows as a Markdown table, then the bounds."""
    columns = list(result.rows[0])
    lines = [f"# {result.title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in result.rows]
    lines += ["", "| bound | measured | holds |", "|---|---|---|"]
    lines += [f"| {bound.words} | {bound.measured:.3f} | {'yes' if bound.holds else 'no'} |" for bound in result.bounds]
    return "\n".join(lines) + "\n"


def _as_json(value: Any) -> Any:
    """The value, with null for numbers that are not finite, such as the time to a target that was not met."""
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return json_number(value) if isinstance(value, float) else value


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
