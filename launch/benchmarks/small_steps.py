"""Small steps: a run on features on disk beside a bare loop of plain PyTorch, and what a run adds to a bag.

Both train on the same bags with the same model. The bare loop holds them in memory and does forward, backward and the
optimizer's step, nothing else. What is compared is processor time of all processes, reading ones too, from an epoch's
first step to its last: what else the machine does counts little. The two are timed in turn, repeat by repeat, and a
bound is on the median of the repeats' ratios, or differences. The times by the clock are told beside.

A free model, one linear layer of a bag's first instance, on bags of one instance tells what a run adds to each bag.
"""

import csv
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ds_wsi.bags.features import write_features
from ds_wsi.models.aggregators.abmil import GatedABMIL
from ds_wsi.models.output import SlideOutput
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.temporary import temporary_folder
from ds_wsi.stacking.stacked_bags import StackedBags
from ds_wsi.training.loop import train
from ds_wsi.training.settings import DataSettings, ModelSettings, OptimSettings, RunSettings, TrainSettings
from launch.benchmarks.table import Bound, Result

WIDTH, SLIDES, LENGTHS = 1024, 300, (100, 1500)
RATIO_BOUND, OVERHEAD_BOUND_S = 1.1, 1e-3
EPOCHS = 2  # of a repeat: in the first the files are read


class Spent(NamedTuple):
    """A step's mean seconds: of the processors, and by the clock."""

    processor_s: float
    clock_s: float


class Clock:
    """Times epochs of so many steps from their first step to their last; `steps` is called once in each."""

    def __init__(self, steps: int) -> None:
        self.steps, self.taken, self.epochs = steps, 0, list[Spent]()
        self._began = 0.0, 0.0

    def step(self) -> None:
        """A step begins."""
        index = self.taken % self.steps
        self.taken += 1
        if index == 0:
            self._began = _processor_s(), time.perf_counter()
        if index == self.steps - 1:
            ended, (processor, clock) = (_processor_s(), time.perf_counter()), self._began
            self.epochs.append(Spent((ended[0] - processor) / index, (ended[1] - clock) / index))


class Timed:
    """The clock of the run that is timed: the aggregators below, which the run builds, tell it their steps."""

    clock = Clock(2)


class TimedABMIL(GatedABMIL):
    """Gated attention that tells `Timed.clock` when a step begins."""

    def forward(self, bags: StackedBags) -> SlideOutput:
        """See `GatedABMIL`."""
        if self.training:
            Timed.clock.step()
        return super().forward(bags)


class TimedFree(nn.Module):
    """Logits from a bag's first instance, and `Timed.clock` told when a step begins."""

    def __init__(self, in_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(in_dim, num_classes)

    def forward(self, bags: StackedBags) -> SlideOutput:
        """Logits [B, C]."""
        if self.training:
            Timed.clock.step()
        return SlideOutput(self.classifier(bags.values[bags.cu_seqlens[:-1]]), None)


class PlainABMIL(nn.Module):
    """Gated attention of one bag, as a loop of one's own has it."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(WIDTH, 128), nn.Linear(WIDTH, 128)
        self.w, self.classifier = nn.Linear(128, 1), nn.Linear(WIDTH, 2)

    def forward(self, bag: Tensor) -> Tensor:
        """Logits [1, 2] of features [N, D]."""
        scores = self.w(self.v(bag).tanh() * self.u(bag).sigmoid())
        return self.classifier(scores.softmax(0).T @ bag)


class PlainFree(nn.Module):
    """What `TimedFree` computes."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, bag: Tensor) -> Tensor:
        """Logits [1, 2] of features [N, D]."""
        return self.classifier(bag[:1])


class Case(NamedTuple):
    """A cohort and a model on it."""

    name: str
    lengths: tuple[int, int]
    aggregator: str
    plain: type[nn.Module]


CASES = (
    Case(f"gated ABMIL, {LENGTHS[0]} to {LENGTHS[1]:,} instances", LENGTHS, f"{__name__}:TimedABMIL", PlainABMIL),
    Case("free model, 1 instance", (1, 1), f"{__name__}:TimedFree", PlainFree),
)


def measure(*, quick: bool, slides: Sequence[str], options: Mapping[str, str] | None = None) -> Result:
    """Measure a run's steps beside the bare loop's.

    Args:
        quick: a third of the slides, and fewer repeats.
        slides: not read.
        options: repeats; only (a part of a case's name).
    """
    options = dict(options or {})
    torch.set_num_threads(1)
    repeats = int(options.get("repeats", 3 if quick else 5))
    count = SLIDES // 3 if quick else SLIDES
    rows, bounds = [], []
    for case in CASES:
        if options.get("only", "") not in case.name:
            continue
        with temporary_folder(Path("runs")) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            bags = write_cohort(folder, count, case.lengths)
            pairs = [(_bare(case, bags, EPOCHS), _run(case, folder, count, f"run_{one}")) for one in range(repeats)]
        rows += _rows(case.name, pairs)
        if case.plain is PlainFree:
            words = f"{case.name}: a run adds at most {1000 * OVERHEAD_BOUND_S:g} ms per bag (measured: ms)"
            bounds.append(Bound(words, 1000 * _added(pairs), 1000 * OVERHEAD_BOUND_S, at_most=True))
        else:
            words = f"{case.name}: a run's step at most {RATIO_BOUND} x the bare loop's"
            bounds.append(Bound(words, _ratio(pairs), RATIO_BOUND, at_most=True))
    notes = {"repeats": repeats, "slides": count, "width": WIDTH, "epochs": EPOCHS}
    return Result("Steps on features on disk", rows, bounds, lambda figure: _draw(figure, rows), notes)


Found = Sequence[tuple[list[Spent], list[Spent]]]


def _mean_s(epochs: Sequence[Spent]) -> float:
    return sum(epoch.processor_s for epoch in epochs) / len(epochs)


def _ratio(repeats: Found) -> float:
    return median(_mean_s(run) / _mean_s(bare) for bare, run in repeats)


def _added(repeats: Found) -> float:
    return median(_mean_s(run) - _mean_s(bare) for bare, run in repeats)


def _rows(name: str, repeats: Found) -> list[dict[str, Any]]:
    """A row of the bare loop, one of the run's every epoch."""
    kinds = {"bare loop": [[spent for spent in bare] for bare, _ in repeats]}
    kinds |= {f"ds_wsi, epoch {epoch + 1}": [[run[epoch]] for _, run in repeats] for epoch in range(EPOCHS)}
    bare = [_mean_s(one) for one in kinds["bare loop"]]
    rows = []
    for loop, epochs in kinds.items():
        of_processors = [_mean_s(one) for one in epochs]
        row = {
            "case": name,
            "loop": loop,
            "ms per step, of processors": 1000 * median(of_processors),
            "ms per step, by the clock": 1000 * median(spent.clock_s for one in epochs for spent in one),
            "ratio": median(one / other for one, other in zip(of_processors, bare, strict=True)),
        }
        logger.info("%s", row)
        rows.append(row)
    return rows


def write_cohort(folder: Path, count: int, lengths: tuple[int, int]) -> list[Tensor]:
    """Write files of features of so many slides to train on, and of four others; a table; return those to train on."""
    rng = np.random.default_rng(0)
    features = folder / "features"
    features.mkdir()
    bags = []
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("slide_id", "label", "patient_id", "split"))
        for index in range(count + 4):
            split = "train" if index < count else "validation" if index < count + 2 else "test"
            rows = int(rng.integers(lengths[0], lengths[1] + 1))
            bag = torch.from_numpy(rng.standard_normal((rows, WIDTH), dtype=np.float32))
            coords = torch.arange(rows).unsqueeze(1).expand(-1, 2) * 256
            write_features(features / f"slide_{index}.safetensors", bag, coords, 256.0, {})
            writer.writerow((f"slide_{index}", ("normal", "tumor")[index % 2], f"patient_{index}", split))
            if split == "train":
                bags.append(bag)
    return bags


def _run(case: Case, folder: Path, count: int, name: str) -> list[Spent]:
    """The epochs of a run of ds_wsi with its own defaults."""
    Timed.clock = Clock(count)
    settings = replace(
        TrainSettings(),
        data=DataSettings(manifest=str(folder / "table.csv"), features_dir=str(folder / "features")),
        model=ModelSettings(aggregator=case.aggregator),
        optim=OptimSettings(num_train_epochs=EPOCHS),
        run=RunSettings(output_dir=str(folder / name), disable_tqdm=True),
    )
    train(settings)
    return Timed.clock.epochs


def _bare(case: Case, bags: Sequence[Tensor], epochs: int) -> list[Spent]:
    """The epochs of the bare loop."""
    torch.manual_seed(0)
    model = case.plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=1e-4)
    labels = [torch.tensor([index % 2]) for index in range(len(bags))]
    clock = Clock(len(bags))
    for _ in range(epochs):
        for index in torch.randperm(len(bags)).tolist():
            clock.step()
            loss = F.cross_entropy(model(bags[index]), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return clock.epochs


def _processor_s() -> float:
    """Seconds of the processors until now: of this process, with all its threads, and of those that it has started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text("ascii").split()
    return time.process_time() + sum(_of_process(child) for child in children)


def _of_process(pid: str) -> float:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text("ascii").split()[0]) / 1e9
    except (OSError, IndexError):  # it has ended
        return 0.0


def _draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    axes = figure.subplots()
    axes.barh(
        [f"{row['case']}\n{row['loop']}" for row in rows],
        [row["ms per step, of processors"] for row in rows],
        color="#3b6ea5",
    )
    axes.set_xscale("log")
    axes.set_xlabel("ms per step, of processors")
    axes.tick_params(labelsize=7)
