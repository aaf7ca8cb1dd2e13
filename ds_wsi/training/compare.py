"""End to end against a frozen encoder on the demo cohort, in the form of Big-Layers' Table 1.

Every training is a process of its own, one after the other: the memory of one is gone before the next, and what is
finished is not trained again.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ds_wsi.evaluation import record
from ds_wsi.evaluation.comparison import read_predictions
from ds_wsi.evaluation.record import RunFolderError, RunRecord
from ds_wsi.models import AGGREGATORS
from ds_wsi.models.packaged import ENCODER
from ds_wsi.runtime.files import read_json, write_json, write_text
from ds_wsi.runtime.fingerprint import file_fingerprint
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.words import counted
from ds_wsi.slides.policy import DEMO_DIRS

ARMS: Mapping[str, tuple[str, ...]] = {"frozen": ("--freeze_encoder",), "end_to_end": ()}
METRICS = ("auc", "accuracy")
LOG_LOSS = "log loss"  # in nats; it still tells two models apart where both metrics are 1
# Of both arms. Tiles drawn anew in each epoch keep an aggregator from learning 64 slides by heart.
SETTINGS = ("--tiles_per_slide", "16", "--num_train_epochs", "20")
# Bags of 16 among 256 landmarks are next to nothing; at the trainer's rate some seeds stay at chance, at this one some
# of ABMIL's do; and a rate that falls may have fallen before chance is left.
SETTINGS_OF: Mapping[str, tuple[str, ...]] = {
    "transmil": (
        *("--aggregator_options", "landmarks=64", "--learning_rate", "1e-4", "--max_grad_norm", "1"),
        *("--lr_scheduler_type", "constant", "--num_train_epochs", "40"),
    )
}


@dataclass(frozen=True)
class ComparedRun:
    """One training: aggregator, a key of `ARMS`, seed."""

    aggregator: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.aggregator}_{self.arm}_seed{self.seed}"

    def command(self, cohort: "ComparedCohort", folder: Path) -> list[str]:
        """The training as a command; it goes on where it was killed."""
        which = ["--aggregator", self.aggregator, "--seed", str(self.seed)]
        train = [sys.executable, "-m", "ds_wsi.cli", "train"]
        kept = ["--output_dir", str(folder), "--resume_from_checkpoint"]
        return [*train, *cohort.options(self.aggregator), *which, *ARMS[self.arm], *kept]


@dataclass(frozen=True)
class ComparedCohort:
    """The slides of all trainings, and what their encoder starts from.

    Args:
        demo: a key of `DEMOS`.
        demo_dir: where its slides are.
        weights: a file of `packaged.ENCODER`'s weights, from which both arms start, with the trainer's own settings;
            None: ResNet-18 and random weights, with settings of this comparison.
    """

    demo: str = "plain"
    demo_dir: str = DEMO_DIRS["plain"]
    weights: str | None = None

    def options(self, aggregator: str) -> list[str]:
        """Options of `ds-wsi train`, the same for both arms."""
        slides = ["--demo", self.demo, "--demo_dir", self.demo_dir]
        if self.weights is not None:
            return [*slides, "--encoder", ENCODER, "--encoder_weights", self.weights]
        return [*slides, "--encoder", "resnet18", *SETTINGS, *SETTINGS_OF.get(aggregator, ())]


def compared_runs(aggregators: Sequence[str], seeds: Iterable[int]) -> tuple[ComparedRun, ...]:
    """Both arms of every aggregator and seed.

    Raises:
        ValueError: an unknown aggregator, one given twice, or no seed.
    """
    names = [name.strip() for name in aggregators]
    unknown = [name for name in names if name not in AGGREGATORS]
    if unknown:
        raise ValueError(f"--compare must be of {', '.join(AGGREGATORS)}, got {unknown[0]!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"--compare must name an aggregator once, got {', '.join(names)}")
    runs = tuple(ComparedRun(name, arm, seed) for name, seed, arm in product(names, seeds, ARMS))
    if not runs:
        raise ValueError("--seeds must be at least 1, got 0")
    return runs


def compare(runs: Sequence[ComparedRun], output_dir: Path, cohort: ComparedCohort) -> str:
    """Train what is not finished, write compare.md and return it.

    Raises:
        subprocess.CalledProcessError: a training failed.
        ValueError: a finished run is of other options or weights; names it.
    """
    for run in runs:
        _require_same(run, output_dir, cohort)
    for number, run in enumerate(runs, 1):
        folder = output_dir / run.name
        if _is_finished(folder):
            logger.info("run %d of %d, %s, is finished: skipped", number, len(runs), run.name)
            continue
        logger.info("run %d of %d: %s", number, len(runs), run.name)
        write_json(_mark(run, output_dir), _made_of(run, cohort))
        subprocess.run(run.command(cohort, folder), check=True)
    results = {
        run: {**read_metrics(output_dir / run.name), LOG_LOSS: read_log_loss(output_dir / run.name)} for run in runs
    }
    text = format_table(results, cohort.demo)
    write_text(output_dir / "compare.md", text + "\n")
    return text


def _mark(run: ComparedRun, output_dir: Path) -> Path:
    """The file beside the run's folder that holds what it was started with."""
    return output_dir / f"{run.name}.json"


def _made_of(run: ComparedRun, cohort: ComparedCohort) -> dict[str, Any]:
    weights = cohort.weights
    return {
        "options": [word for word in cohort.options(run.aggregator) if word != weights],
        "weights_sha256": file_fingerprint(weights).sha256 if weights and Path(weights).is_file() else None,
    }


def _require_same(run: ComparedRun, output_dir: Path, cohort: ComparedCohort) -> None:
    """A finished run is kept where it was made of the same; of an earlier version's nothing is known."""
    if not _is_finished(output_dir / run.name):
        return
    mark = _mark(run, output_dir)
    if not mark.is_file():
        logger.warning("%s is of an earlier version, which did not record its options: kept", output_dir / run.name)
        return
    begun, asked = read_json(mark, "the record of a run's options"), _made_of(run, cohort)
    if begun != asked:
        raise ValueError(
            f"a finished run must be of the same options and weights, {asked}, got {begun} ({mark}). "
            "HINT: give another --output_dir."
        )


def _is_finished(folder: Path) -> bool:
    try:
        RunRecord.read(folder)
    except RunFolderError:
        return False
    return True


def read_metrics(folder: Path) -> dict[str, float]:
    """The test metrics of a finished run, keys of `METRICS`; NaN where undefined."""
    metrics = record.read_metrics(folder)
    return {name: float("nan") if metrics[name]["value"] is None else metrics[name]["value"] for name in METRICS}


def read_log_loss(folder: Path) -> float:
    """The mean over a finished run's test slides of minus the logarithm of the label's probability, in nats."""
    predictions = read_predictions(folder)
    of_labels = predictions.probabilities[np.arange(len(predictions.labels)), predictions.labels]
    return float(-np.log(np.maximum(of_labels, np.finfo(np.float64).eps)).mean())  # 36 nats where it is 0


def format_table(results: Mapping[ComparedRun, Mapping[str, float]], demo: str = "plain") -> str:
    """Rows of aggregators and metrics: frozen, end to end, and the difference of the runs of one seed.

    Means over the seeds, with the standard deviation (n - 1) where there are several; metrics in percentage points, and
    the log loss, where the results hold it, in thousandths of a nat.
    """
    seeds = sorted({run.seed for run in results})
    lines = [
        f"demo cohort{'' if demo == 'plain' else ' ' + demo}, test split, % (log loss: 1e-3), "
        f"{counted(len(seeds), 'seed')} from {seeds[0]}" + (", mean ± standard deviation" if len(seeds) > 1 else ""),
        "",
        "| aggregator | metric | frozen encoder | end to end | difference |",
        "|---|---|---|---|---|",
    ]
    shown = [metric for metric in (*METRICS, LOG_LOSS) if all(metric in values for values in results.values())]
    for name, metric in product(dict.fromkeys(run.aggregator for run in results), shown):
        scale = 1000 if metric == LOG_LOSS else 100
        frozen, trained = (
            [scale * results[ComparedRun(name, arm, seed)][metric] for seed in seeds]
            for arm in ("frozen", "end_to_end")
        )
        gains = [of_trained - of_frozen for of_trained, of_frozen in zip(trained, frozen, strict=True)]
        lines.append(f"| {name} | {metric} | {_spread(frozen)} | {_spread(trained)} | {_spread(gains, sign='+')} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = format(statistics.fmean(values), f"{sign}.2f")
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
