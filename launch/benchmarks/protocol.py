"""End to end against a frozen encoder on the demo cohort, aggregator by aggregator: Big-Layers' Table 1 in small.

It trains as `ds-wsi demo --compare` does, goes on with what is finished, and measures no time.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from ds_wsi.slides.policy import DEMO_DIRS
from ds_wsi.training.compare import (
    ARMS,
    METRICS,
    SETTINGS,
    SETTINGS_OF,
    ComparedCohort,
    ComparedRun,
    compare,
    compared_runs,
    read_metrics,
)
from launch.benchmarks.table import Bound, Result

AGGREGATORS = "abmil,dtfd,transmil"
COLORS = {"frozen": "#999999", "end_to_end": "#3b6ea5"}
WORDS = {"frozen": "frozen encoder", "end_to_end": "end to end"}


def measure(*, quick: bool, slides: Sequence[str], options: Mapping[str, str]) -> Result:
    """Train both arms of every aggregator and seed.

    Args:
        quick: one seed in place of three.
        slides: not read.
        options: aggregators (comma-separated), seeds, runs (the folder of the runs), demo_dir.

    Raises:
        ValueError: an unknown option.
    """
    option_names = ("aggregators", "seeds", "runs", "demo_dir")
    unknown = [name for name in options if name not in option_names]
    if unknown:
        raise ValueError(f"--option must be one of {', '.join(option_names)}, got {unknown[0]!r}")
    folder = Path(options.get("runs", "runs/compare"))
    names = options.get("aggregators", AGGREGATORS).split(",")
    runs = compared_runs(names, range(int(options.get("seeds", 1 if quick else 3))))
    compare(runs, folder, ComparedCohort(demo_dir=options.get("demo_dir", DEMO_DIRS["plain"])))
    results = {run: read_metrics(folder / run.name) for run in runs}
    rows: list[dict[str, Any]] = [
        {"aggregator": run.aggregator, "encoder": WORDS[run.arm], "seed": run.seed, **values}
        for run, values in results.items()
    ]
    bounds = []
    for name, metric in product(names, METRICS):
        means = {arm: fmean(_values(results, name, arm, metric)) for arm in ARMS}
        words = f"{name}: {metric} end to end over frozen, mean of the seeds, above 0"
        bounds.append(Bound(words, means["end_to_end"] - means["frozen"], 1e-9))
    title = "Trained end to end or with a frozen encoder: the demo's test split"
    notes = {"metrics": "all tiles", "options of both arms": " ".join(SETTINGS)}
    notes |= {f"more of {name}": " ".join(SETTINGS_OF[name]) for name in names if name in SETTINGS_OF}
    return Result(title, rows, bounds, lambda figure: _draw(figure, names, results), notes)


def _values(results: Mapping[ComparedRun, Mapping[str, float]], name: str, arm: str, metric: str) -> list[float]:
    return [values[metric] for run, values in results.items() if (run.aggregator, run.arm) == (name, arm)]


def _draw(figure: Figure, names: Sequence[str], results: Mapping[ComparedRun, Mapping[str, float]]) -> None:
    for number, metric in enumerate(METRICS):
        axes = figure.add_subplot(1, len(METRICS), number + 1)
        for index, arm in product(range(len(names)), ARMS):
            values = _values(results, names[index], arm, metric)
            at = index + (0.15 if arm == "end_to_end" else -0.15)
            axes.bar(at, fmean(values), 0.28, color=COLORS[arm], label=WORDS[arm] if index == 0 else None)
            axes.plot([at] * len(values), values, "k.", markersize=5)
        axes.set(xticks=range(len(names)), xticklabels=names, ylim=(0, 1.05), title=f"test {metric}, each seed a dot")
    axes.legend(loc="lower right", fontsize=8)
