"""Bags of different length in one step: how fast, how soon at a target, how good.

The frameworks of the DPGS paper on feature bags: "classic" takes one step per bag, "padding" pads a stack to its
longest bag, "sampling" draws equally many instances of every bag, "dpgs" stacks them as they are, in packs that fit the
cache. All train the same model from the same weights on one device; bags have CAMELYON16's length distribution, scaled
by an option.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from ds_wsi.models import SlideOutput, build_aggregator
from ds_wsi.models.loss import stack_loss
from ds_wsi.runtime.contracts import needs_labels
from ds_wsi.runtime.log import logger
from ds_wsi.stacking.balance import assign_bags
from ds_wsi.stacking.frameworks import pad_bags, sample_bag
from ds_wsi.stacking.packs import plan_packs
from ds_wsi.stacking.stacked_bags import stack_bags
from ds_wsi.training.settings import DataSettings
from launch.benchmarks.stacking_bags import Bags, camelyon_lengths, demo_bags, digit_bags, witness_bags
from launch.benchmarks.table import Bound, Result

SIZES = {True: ((50, 512), (200, 1024), (1000, 1024)), False: ((50, 512), (200, 1024), (1000, 1024), (10_000, 1024))}
FRAMEWORKS = ("classic", "padding", "sampling", "dpgs")
BATCHES = (1, 8, 16, 32)
MODELS = ("abmil", "clam_mb", "transmil")
TARGET_AUC = 0.9
PACK_BYTES = 2 * 2**20  # of instances at a time on a CPU, so that they stay in its cache
TASKS = ("digits", "digits, heavy-tailed", "demo slides")
COLORS = {"classic": "#888888", "padding": "#c4713b", "sampling": "#5aa469", "dpgs": "#3b6ea5"}


@dataclass(frozen=True)
class Fit:
    """What a training run showed.

    Attributes:
        bags_per_s: over all steps, validation apart.
        target_s: seconds of training until the target; None where it was not reached.
        auc, accuracy: what the last weights reach on the held-out bags.
    """

    bags_per_s: float
    target_s: float | None
    auc: float
    accuracy: float


def measure(*, quick: bool, slides: Sequence[str], options: Mapping[str, str]) -> Result:
    """Speed by length, time to a target by model, accuracy over seeds, balance of ranks.

    Args:
        quick: shorter bags and fewer repeats.
        slides: not read.
        options: device, repeats, seeds, demo_dir, mean_tiles and width of the bags of the time to target.

    Raises:
        ValueError: an unknown option.
    """
    option_names = ("device", "repeats", "seeds", "mean_tiles", "width", "demo_dir")
    unknown = [name for name in options if name not in option_names]
    if unknown:
        raise ValueError(f"--option must be one of {', '.join(option_names)}, got {unknown[0]!r}")
    device = torch.device(options.get("device", "cuda" if torch.cuda.is_available() else "cpu"))
    repeats, seeds = int(options.get("repeats", 3 if quick else 5)), int(options.get("seeds", 5))
    mean_tiles, width = int(options.get("mean_tiles", 50)), int(options.get("width", 512))
    torch.set_num_threads(1) if device.type == "cpu" else None
    rows: list[dict[str, Any]] = []
    speeds = _speeds(SIZES[quick], device, repeats)
    for (tiles, features, framework, batch), rate in speeds.items():
        rows.append(_row("bags/s, abmil", f"{tiles} x {features}", framework, batch, rate, None, None, None))
    targets = _targets(mean_tiles, width, device, repeats=1 if quick else 3)
    for (model, framework, batch), fit in targets.items():
        size = f"{mean_tiles} x {width}"
        rows.append(
            _row(f"to AUC {TARGET_AUC}, {model}", size, framework, batch, fit.bags_per_s, fit.target_s, fit.auc, None)
        )
    accuracies = _accuracies(seeds, device, options.get("demo_dir", DataSettings().demo_folder))
    for (what, framework), fits in accuracies.items():
        aucs = [fit.auc for fit in fits]
        rows.append(
            _row(what, "10 x 64", framework, 16 if framework == "dpgs" else 1, 0.0, None, mean(aucs), _interval(aucs))
        )
    balance = {kind: _slowest(kind) for kind in ("lpt", "round_robin")}
    for kind, worst in balance.items():
        rows.append(_row(f"slowest of 8 ranks over their mean, {kind}", "10000", "dpgs", 64, 0.0, None, worst, None))
    notes = {
        "device": str(device),
        "repeats": repeats,
        "seeds": seeds,
        "pack_bytes": PACK_BYTES,
        "target_auc": TARGET_AUC,
    }
    return Result(
        "Stacking bags of different length",
        rows,
        _bounds(speeds, targets, accuracies, balance, device),
        lambda figure: _draw(figure, speeds, targets),
        notes,
    )


def _row(
    what: str, bags: str, framework: str, batch: int, rate: float, seconds: float | None, auc: float | None, spread: Any
) -> dict[str, Any]:
    return {
        "what": what,
        "mean bag": bags,
        "framework": framework,
        "B": batch,
        "bags/s": rate,
        "seconds to target": "" if seconds is None else seconds,
        "AUC or ratio": "" if auc is None else auc,
        "interval": "" if spread is None else spread,
    }


# ------------------------------------------------------------------------------------------------ bags


# ------------------------------------------------------------------------------------------------ training


class Trainer:
    """One model under one framework.

    Args:
        model: an aggregator's name.
        width: the features' width.
        framework: one of `FRAMEWORKS`.
        batch: bags per step; 1 under "classic".
        sample: instances of a bag under "sampling".
        learning_rate: Adam's at one bag per step; grows with the root of the bags.
        device: where everything is.
        embed: put a small network before the aggregator, trained with it, as the ABMIL paper does for digits.
    """

    def __init__(
        self,
        model: str,
        width: int,
        framework: str,
        batch: int,
        sample: int,
        learning_rate: float,
        device: torch.device,
        *,
        embed: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.framework, self.batch, self.sample = framework, batch, sample
        self.encoder = nn.Sequential(nn.Linear(width, 128), nn.ReLU()) if embed else nn.Identity()
        self.aggregator: nn.Module = build_aggregator(model, 128 if embed else width, 2, dropout=0.0)
        self.needs_labels = needs_labels(self.aggregator)
        both = nn.ModuleList([self.encoder, self.aggregator]).to(device).train()
        rate = learning_rate * batch**0.5
        self.optimizer = torch.optim.Adam(both.parameters(), lr=rate, weight_decay=weight_decay)
        if framework == "padding":
            pad_bags(self.aggregator, SlideOutput)
        # Packs of one step are worked on one after the other, forward and backward, as virtual workers are.
        self.pack_bytes = PACK_BYTES if framework == "dpgs" and device.type == "cpu" else 2**62

    def step(self, bags: Bags, chosen: Sequence[int], key: int) -> None:
        """One optimizer step on the chosen bags."""
        features = [bags.features[index] for index in chosen]
        if self.framework == "sampling":
            features = [sample_bag(bag, self.sample, key + position) for position, bag in enumerate(features)]
        labels = bags.labels[list(chosen)]
        self.optimizer.zero_grad()
        row_bytes = features[0].shape[1] * features[0].element_size()
        for first, last in plan_packs([len(bag) for bag in features], self.pack_bytes // row_bytes):
            stack, pack_labels = stack_bags(features[first:last]), labels[first:last]
            stack = stack.with_values(self.encoder(stack.values))
            output = self.aggregator(stack, pack_labels) if self.needs_labels else self.aggregator(stack)
            (stack_loss(output, pack_labels) / len(chosen)).backward()
        self.optimizer.step()

    def evaluate(self, bags: Bags) -> tuple[float, float]:
        """(AUC, accuracy) on whole bags, one at a time."""
        self.aggregator.eval()
        with torch.no_grad():
            logits = torch.cat([self.aggregator(stack_bags([self.encoder(bag)])).logits for bag in bags.features])
        self.aggregator.train()
        scores, labels = logits.softmax(1)[:, 1].cpu(), bags.labels.cpu()
        return float(roc_auc_score(labels, scores)), float(((scores > 0.5).long() == labels).float().mean())


def fit(trainer: Trainer, train: Bags, held_out: Bags, *, epochs: int, seed: int, target: float | None = None) -> Fit:
    """Train, and validate after every epoch; with a target, stop there. Validation takes none of the seconds."""
    generator = torch.Generator().manual_seed(seed)
    seconds, seen = 0.0, 0
    for epoch in range(epochs):
        order = torch.randperm(len(train.features), generator=generator).tolist()
        _wait(train.labels)
        start = time.perf_counter()
        for first in range(0, len(order), trainer.batch):
            trainer.step(train, order[first : first + trainer.batch], seed * 10_000 + epoch * 1_000 + first)
        _wait(train.labels)
        seconds += time.perf_counter() - start
        seen += len(order)
        if target is not None:
            auc, accuracy = trainer.evaluate(held_out)
            if auc >= target:
                return Fit(seen / seconds, seconds, auc, accuracy)
    return Fit(seen / seconds, None, *trainer.evaluate(held_out))


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _speeds(
    sizes: Sequence[tuple[int, int]], device: torch.device, repeats: int
) -> dict[tuple[int, int, str, int], float]:
    """Bags per second of ABMIL, medians; frameworks take their turns repeat by repeat."""
    speeds: dict[tuple[int, int, str, int], float] = {}
    for mean_tiles, width in sizes:
        bags = witness_bags(32, mean_tiles, width, device, seed=0)
        trainers = {}
        for framework in FRAMEWORKS:
            for batch in BATCHES if framework != "classic" else (1,):
                torch.manual_seed(0)
                trainers[framework, batch] = Trainer("abmil", width, framework, batch, mean_tiles, 1e-4, device)
        times: dict[tuple[str, int], list[float]] = {key: [] for key in trainers}
        rounds = max(1, 1_600 // mean_tiles) if device.type == "cpu" else 4
        for repeat in range(repeats + 1):  # the first warms up
            for key, trainer in trainers.items():
                _wait(bags.labels)
                start = time.perf_counter()
                for _ in range(rounds if repeat else 1):
                    for first in range(0, 32, trainer.batch):
                        trainer.step(bags, range(first, first + trainer.batch), first)
                _wait(bags.labels)
                if repeat:
                    times[key].append((time.perf_counter() - start) / rounds)
        for (framework, batch), values in times.items():
            speeds[mean_tiles, width, framework, batch] = 32 / median(values)
        classic = speeds[mean_tiles, width, "classic", 1]
        shown = ", ".join(f"{f} {speeds[mean_tiles, width, f, 32] / classic:.2f}" for f in FRAMEWORKS[1:])
        logger.info(
            "bags of %d x %d: classic %.0f bags/s; at B = 32, times that: %s", mean_tiles, width, classic, shown
        )
    return speeds


def _targets(mean_tiles: int, width: int, device: torch.device, repeats: int) -> dict[tuple[str, str, int], Fit]:
    """Time to the target, median of the repeats' seeds."""
    train = witness_bags(128, mean_tiles, width, device, seed=1)
    held_out = witness_bags(64, mean_tiles, width, device, seed=2)
    targets = {}
    for model in MODELS:
        for framework in FRAMEWORKS:
            for batch in (1, 32) if framework == "dpgs" else (1,) if framework == "classic" else (32,):
                fits = []
                for seed in range(repeats):
                    torch.manual_seed(seed)
                    trainer = Trainer(model, width, framework, batch, mean_tiles, 2e-4, device)
                    fits.append(fit(trainer, train, held_out, epochs=20, seed=seed, target=TARGET_AUC))
                reached = [one for one in fits if one.target_s is not None]
                chosen = sorted(reached, key=lambda one: one.target_s or 0.0)[len(reached) // 2] if reached else fits[0]
                targets[model, framework, batch] = chosen
                logger.info("%s, %s, B = %d: %s s to AUC %.2f", model, framework, batch, chosen.target_s, TARGET_AUC)
    return targets


def _accuracies(seeds: int, device: torch.device, demo_dir: str) -> dict[tuple[str, str], list[Fit]]:
    """ABMIL on bags of digits and on the demo's tiles: classic against dpgs at B = 16, over seeds."""
    accuracies: dict[tuple[str, str], list[Fit]] = {}
    demo = demo_bags(demo_dir, device)
    for what in TASKS:
        for framework, batch in (("classic", 1), ("dpgs", 16)):
            fits = []
            for seed in range(seeds):
                if what == "demo slides":
                    train, test = demo
                else:
                    heavy = what == "digits, heavy-tailed"
                    train = digit_bags(200, seed, device, heavy=heavy)
                    test = digit_bags(400, 1_000 + seed, device, heavy=heavy, test=True)
                torch.manual_seed(seed)
                width = train.features[0].shape[1]
                trainer = Trainer("abmil", width, framework, batch, 10, 5e-4, device, embed=True, weight_decay=5e-3)
                fits.append(fit(trainer, train, test, epochs=60, seed=seed))
            accuracies[what, framework] = fits
            aucs = [one.auc for one in fits]
            logger.info("%s, %s: AUC %.3f %s", what, framework, mean(aucs), _interval(aucs))
    return accuracies


def _interval(values: Sequence[float]) -> str:
    """The 95% interval of the mean, by the normal approximation."""
    half = 1.96 * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"[{mean(values) - half:.3f}, {mean(values) + half:.3f}]"


def _slowest(balance: str, steps: int = 50) -> float:
    """The slowest of 8 ranks over their mean, at 64 bags of CAMELYON16's lengths per step; the worst of the steps."""
    ratios = []
    for seed in range(steps):
        lengths = camelyon_lengths(64, 10_000, seed)
        loads = [sum(lengths[index] for index in rank_bags) for rank_bags in assign_bags(lengths, 8, balance=balance)]
        ratios.append(max(loads) / mean(loads))
    return max(ratios)


# ------------------------------------------------------------------------------------------------ result


def _bounds(
    speeds: dict[tuple[int, int, str, int], float],
    targets: dict[tuple[str, str, int], Fit],
    accuracies: dict[tuple[str, str], list[Fit]],
    balance: dict[str, float],
    device: torch.device,
) -> list[Bound]:
    bounds = []
    sizes = list(dict.fromkeys((tiles, width) for tiles, width, _, _ in speeds))
    for tiles, width in sizes:
        dpgs = speeds[tiles, width, "dpgs", 32]
        least = 3.0 if (tiles, width) == (50, 512) and device.type == "cpu" else 1.0
        classic = speeds[tiles, width, "classic", 1]
        bounds.append(Bound(f"bags of {tiles} x {width}, B = 32: at least {least:g} x classic", dpgs / classic, least))
        padding = speeds[tiles, width, "padding", 32]
        bounds.append(Bound(f"bags of {tiles} x {width}, B = 32: at least as fast as padding", dpgs / padding, 1.0))
    classic_s, ours_s = targets["abmil", "classic", 1].target_s, targets["abmil", "dpgs", 32].target_s
    if device.type == "cuda":
        ratio = classic_s / ours_s if classic_s and ours_s else 0.0
        bounds.append(Bound("ABMIL, B = 32: at least 31 x sooner at the target than classic", ratio, 31.0))
    for what in TASKS:
        gains = [
            one.auc - other.auc
            for one, other in zip(accuracies[what, "dpgs"], accuracies[what, "classic"], strict=True)
        ]
        half = 1.96 * stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        words = f"{what}: AUC of dpgs at B = 16 over classic's, upper end of the 95% interval"
        bounds.append(Bound(words, mean(gains) + half, 0.0))
    bounds.append(Bound("digits: AUC of dpgs at B = 16", mean(one.auc for one in accuracies["digits", "dpgs"]), 0.95))
    bounds.append(Bound("the slowest of 8 ranks over their mean", balance["lpt"], 1.05, at_most=True))
    return bounds


def _draw(
    figure: Figure, speeds: dict[tuple[int, int, str, int], float], targets: dict[tuple[str, str, int], Fit]
) -> None:
    left, right = figure.subplots(1, 2)
    sizes = list(dict.fromkeys((tiles, width) for tiles, width, _, _ in speeds))
    for framework in FRAMEWORKS[1:]:
        for (tiles, width), style in zip(sizes, ("-", "--", ":", "-."), strict=False):
            classic = speeds[tiles, width, "classic", 1]
            values = [speeds[tiles, width, framework, batch] / classic for batch in BATCHES]
            label = framework if style == "-" else None
            left.plot(BATCHES, values, style, marker=".", color=COLORS[framework], label=label)
    left.axhline(1, color=COLORS["classic"], linewidth=0.8, label="classic")
    left.set_xscale("log", base=2)
    left.set_yscale("log", base=2)
    left.set_xlabel("bags per step, B")
    left.set_ylabel("bags/s over classic (ABMIL)")
    left.set_title("; ".join(f"{t} x {w}" for t, w in sizes) + ": solid to dotted", fontsize=8)
    left.legend(fontsize=7)
    keys = list(targets)
    names = [f"{model}, {framework} {batch}" for model, framework, batch in keys]
    values = [targets[key].target_s or 0.0 for key in keys]
    right.barh(names[::-1], values[::-1], color=[COLORS[framework] for _, framework, _ in keys[::-1]])
    right.set_xlabel(f"seconds to AUC {TARGET_AUC} (none: not reached)")
    right.tick_params(axis="y", labelsize=6)
