"""Time and bytes to a fixed validation accuracy over a slow link, by communication hook.

Four processes, one bag each a step, Adam. The task is synthetic: bags of features of which a positive one has a few
instances shifted along one direction. The target is fixed before the run. Three things are measured:

    steps and bytes to the target   on a link without limit, seed by seed; a seed that does not meet it says so
    a step's time                   on each link (namespaces and `tbf`, or a model of the link where they cannot be)
    time to the target              their product; validation is not in it

Hooks run under DeepSpeed's ZeRO 1, where dmgc's pull takes the place of the all-gather of the weights, which other
hooks leave dense. Torch's powersgd and three more rows run under DDP, whose ranks each have the whole optimizer: there
topk's messages go to everyone, and dmgc pulls means of gradients. topk and dmgc send values as float16, and dmgc pulls
twice the share that it pushes; neither has a warm-up. Bytes are the kernel's count of what left the ranks' interfaces:
headers and acknowledgements are in them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ds_wsi.compression.comm import CommPolicy
from ds_wsi.engines.accelerator.stepper import Stepper
from ds_wsi.engines.comm_hooks.register import attach
from ds_wsi.models.aggregators.abmil import ABMIL
from ds_wsi.models.aggregators.transmil import TransMIL
from ds_wsi.runtime.files import write_json
from ds_wsi.runtime.log import logger
from ds_wsi.stacking import stack_bags
from launch.benchmarks.link import LimitedLink, bytes_sent
from launch.benchmarks.ranks import run_ranks
from launch.benchmarks.table import Bound, Result

RANKS = 4
DIM, TILES, SHIFTED, SHIFT = 512, 48, 4, 6.0
VALIDATION_BAGS, TARGET, EVERY = 128, 0.9, 2
POWERSGD_DENSE = 10
RATE = 1e-3
MODELS = {
    "ABMIL": lambda: ABMIL(DIM, 2, hidden_dim=512),  # 264,195 values: about the 979.7 kB of the paper's message
    "TransMIL": lambda: TransMIL(DIM, 2, landmarks=16),  # fewer than a bag has tokens; as many weights as the original
}
KEEPS = (0.001, 0.01, 0.1)


def _dmgc(keep: float) -> CommPolicy:
    return CommPolicy(hook="dmgc", keep=keep, pull_keep=2 * keep, values="fp16")


HOOKS: dict[str, CommPolicy] = {
    "none": CommPolicy(),
    "fp16": CommPolicy(hook="fp16"),
    **{f"topk {keep:.1%}": CommPolicy(hook="topk", keep=keep, values="fp16") for keep in KEEPS},
    **{f"dmgc {keep:.1%}": _dmgc(keep) for keep in KEEPS},
    "none ddp": CommPolicy(),
    "powersgd ddp": CommPolicy(hook="powersgd", dense_steps=POWERSGD_DENSE),
    "topk 1.0% ddp": CommPolicy(hook="topk", keep=0.01, values="fp16"),
    "dmgc 1.0% ddp": _dmgc(0.01),
}
COLORS = {"none": "#666666", "fp16": "#c4713b", "topk": "#5aa469", "powersgd": "#8a5aa5", "dmgc": "#3b6ea5"}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        mbps: links.
        steps: training steps at most.
        timed_s: seconds that a hook's steps are timed for on a link, about; 60 steps at most.
        trained: file of steps and bytes, read where it exists, else written: they do not depend on the link.
    """

    models: tuple[str, ...]
    hooks: tuple[str, ...]
    mbps: tuple[float, ...]
    seeds: int
    steps: int
    timed_s: float
    trained: Path | None


def measure(*, quick: bool, slides: Sequence[str], options: Mapping[str, str]) -> Result:
    """Measure every hook on every link.

    Args:
        quick: ABMIL, one link of 20 Mbps, two seeds.
        slides: not read.
        options: seeds, steps, timed_s, trained, mbps (comma-separated), models, hooks (comma-separated, by prefix).

    Raises:
        ValueError: an unknown option.
    """
    option_names = ("seeds", "steps", "timed_s", "trained", "mbps", "models", "hooks")
    unknown = [name for name in options if name not in option_names]
    if unknown:
        raise ValueError(f"--option must be one of {', '.join(option_names)}, got {unknown[0]!r}")
    prefixes = tuple(options.get("hooks", ",".join(HOOKS)).split(","))
    plan = Plan(
        models=tuple(options.get("models", "ABMIL" if quick else "ABMIL,TransMIL").split(",")),
        hooks=tuple(name for name in HOOKS if name.startswith(("none", *prefixes))),
        mbps=tuple(float(part) for part in options.get("mbps", "20" if quick else "5,10,20,50,1000").split(",")),
        seeds=int(options.get("seeds", 2 if quick else 5)),
        steps=int(options.get("steps", 400)),
        timed_s=float(options.get("timed_s", 6)),
        trained=Path(options["trained"]) if "trained" in options else None,
    )
    limited = LimitedLink.available()
    logger.info("link: %s", "namespaces and tbf" if limited else "a model, because namespaces cannot be made here")
    with LimitedLink(RANKS) if limited else nullcontext() as link:
        enter = link.enter if link is not None else None
        trained = _train_all(plan, enter)
        step_s = {mbps: _time_all(plan, link, mbps, trained) for mbps in plan.mbps}
    rows = [_row(plan, trained, step_s, model, hook) for model in plan.models for hook in plan.hooks]
    notes: dict[str, Any] = {
        "link": "network namespaces and tbf" if limited else "modelled: bytes / bandwidth added to the step",
        "target": f"validation accuracy {TARGET}",
        "seeds": plan.seeds,
        "at most steps": plan.steps,
        "M1": "bytes of a step against none's; M2: bytes to the target against none's",
    }
    for model in plan.models:
        at = {row["hook"]: row.get("s at 20 Mbps", float("nan")) for row in rows if row["model"] == model}
        if {"topk 1.0% ddp", "dmgc 1.0% ddp"} <= set(at):
            # No bound: with four ranks, one message to everyone is no more than one to owners and one back.
            notes[f"{model} under DDP, 20 Mbps, topk 1.0% over dmgc 1.0%"] = at["topk 1.0% ddp"] / at["dmgc 1.0% ddp"]
    return Result(
        f"Communication hooks over a slow link: {RANKS} processes, {plan.seeds} seed(s), {notes['link']}",
        rows,
        _bounds(plan, rows),
        lambda figure: _draw(figure, plan, rows),
        notes,
    )


def _train_all(plan: Plan, enter: Any) -> dict[tuple[str, str], list[dict[str, float]]]:
    trained: dict[tuple[str, str], list[dict[str, float]]] = {}
    kept = json.loads(plan.trained.read_text()) if plan.trained and plan.trained.exists() else {}
    for model in plan.models:
        for hook in plan.hooks:
            key = f"{model}, {hook}, {plan.seeds} seeds, {plan.steps} steps"
            if key in kept:
                trained[model, hook] = kept[key]
                continue
            by_rank = run_ranks(_train, RANKS, model, hook, plan.seeds, plan.steps, enter=enter)
            seeds = by_rank[0]
            for number, row in enumerate(seeds):
                row["bytes"] = sum(rank[number]["bytes"] for rank in by_rank) / (1 if enter else RANKS)
            trained[model, hook] = kept[key] = seeds
            logger.info("%s, %s: %s", model, hook, [(row["steps"], round(row["accuracy"], 3)) for row in seeds])
            if plan.trained:
                write_json(plan.trained, kept)
    return trained


def _time_all(plan: Plan, link: LimitedLink | None, mbps: float, trained: Any) -> dict[tuple[str, str], float]:
    """Seconds of a step on a link; without one, a model's."""
    if link is not None:
        link.limit(mbps)
    cases = [(model, hook) for model in plan.models for hook in plan.hooks]
    seconds = run_ranks(_time, RANKS, cases, plan.timed_s, enter=None if link is None else link.enter)[0]
    step_s = dict(zip(cases, seconds, strict=True))
    if link is None:
        for case in cases:
            rows = trained[case]
            sent = fmean(row["bytes"] / row["taken"] for row in rows) / RANKS
            step_s[case] += sent / (mbps * 1e6 / 8)
    logger.info("%g Mbps: %s", mbps, {case: round(value, 3) for case, value in step_s.items()})
    return step_s


# --- on a rank ---


def make_bag(number: int, positive: bool) -> Tensor:
    """Features [TILES, DIM]; the shift's direction is the same for all bags."""
    generator = torch.Generator().manual_seed(number)
    bag = torch.randn(TILES, DIM, generator=generator)
    if positive:
        direction = torch.randn(DIM, generator=torch.Generator().manual_seed(0))
        bag[:SHIFTED] += SHIFT * direction / direction.norm()
    return bag


class _Learner:
    def __init__(self, model: str, hook: str, seed: int, dense_steps: int | None = None) -> None:
        torch.manual_seed(seed)
        policy = HOOKS[hook]
        if dense_steps is not None and policy.hook == "powersgd":
            policy = replace(policy, dense_steps=dense_steps)
        self.seed, self.number = seed, 0
        self.stepper = Stepper("ddp" if hook.endswith("ddp") else "zero1", MODELS[model](), "adam", RATE)
        attach(self.stepper.model, policy)

    def step(self) -> None:
        rank = dist.get_rank()
        number = 1 + (self.seed * 100_000 + self.number) * RANKS + rank
        positive = (number + self.number) % 2 == 0
        self.number += 1
        output = self.stepper.model(stack_bags([make_bag(number, positive)]))
        self.stepper.backward(F.cross_entropy(output.logits, torch.tensor([int(positive)])))
        self.stepper.step()


@torch.no_grad()
def _accuracy(module: nn.Module, bags: Sequence[Tensor]) -> float:
    module.eval()
    logits = torch.cat([module(stack_bags([bag])).logits for bag in bags])
    module.train()
    labels = torch.arange(len(bags)) % 2
    return float((logits.argmax(1) == labels).float().mean())


def _train(model: str, hook: str, seeds: int, steps: int) -> list[dict[str, float]]:
    """Steps and bytes to the target, and the accuracy there, of each seed; steps NaN where it is not met."""
    share = range(dist.get_rank(), VALIDATION_BAGS, RANKS)
    held_out = [make_bag(10**9 + number, number // RANKS % 2 == 1) for number in share]
    results = []
    for seed in range(seeds):
        learner, accuracy, met = _Learner(model, hook, seed), 0.0, float("nan")
        total, taken = 0, 0
        while taken < steps and met != met:
            before = bytes_sent()
            for _ in range(EVERY):
                learner.step()
            total, taken = total + bytes_sent() - before, taken + EVERY
            part = torch.tensor(_accuracy(learner.stepper.module, held_out))
            dist.all_reduce(part)
            accuracy = float(part) / RANKS
            met = float(taken) if accuracy >= TARGET else met
        results.append({"steps": met, "taken": float(taken), "bytes": float(total), "accuracy": accuracy})
    return results


def _time(cases: Sequence[tuple[str, str]], timed_s: float) -> list[float]:
    """Mean seconds of a step of each case, after those in which buckets are rebuilt and connections opened."""
    step_s = []
    for model, hook in cases:
        learner = _Learner(model, hook, 0, dense_steps=2)
        warm = _mean_seconds(learner, 3 if hook.startswith("powersgd") else 1)
        # Of a step this long connections and new buckets are no part that counts.
        first = warm if warm > 2 * timed_s and not hook.startswith("powersgd") else _mean_seconds(learner, 1)
        # Small messages fit the token bucket for a few steps, which would then look faster than the link.
        steps = min(60, round(timed_s / first))
        step_s.append(_mean_seconds(learner, steps) if steps > 1 else first)
    return step_s


def _mean_seconds(learner: _Learner, steps: int) -> float:
    """Mean seconds of a step, over the ranks too: the same on all of them."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        learner.step()
    dist.barrier()
    seconds = torch.tensor((time.perf_counter() - start) / steps)
    dist.all_reduce(seconds)
    return float(seconds) / RANKS


# --- the table ---


def _row(plan: Plan, trained: Any, step_s: Any, model: str, hook: str) -> dict[str, Any]:
    none = "none ddp" if hook.endswith("ddp") else "none"
    seeds, dense = trained[model, hook], trained[model, none]
    met = [row for row in seeds if row["steps"] == row["steps"]]
    steps = fmean(row["steps"] for row in met) if met else float("nan")
    sent = fmean(row["bytes"] for row in met) if met else float("nan")
    row: dict[str, Any] = {
        "model": model,
        "hook": hook,
        "seeds at target": f"{len(met)}/{len(seeds)}",
        "steps": steps,
        "sd": stdev(row["steps"] for row in met) if len(met) > 1 else float("nan"),
        "accuracy": fmean(row["accuracy"] for row in seeds),
        "kB per step": sum(row["bytes"] for row in seeds) / sum(row["taken"] for row in seeds) / 1e3,
        "MB to target": sent / 1e6,
        "M1": _per_step(seeds) / _per_step(dense),
        "M2": sent / fmean(row["bytes"] for row in dense),
    }
    for mbps in plan.mbps:
        slow = min(steps, POWERSGD_DENSE) if hook.startswith("powersgd") else 0
        total = (steps - slow) * step_s[mbps][model, hook] + slow * step_s[mbps][model, none]
        row[f"s at {mbps:g} Mbps"] = total
    return row


def _per_step(seeds: Sequence[Mapping[str, float]]) -> float:
    return sum(row["bytes"] for row in seeds) / sum(row["taken"] for row in seeds)


def _bounds(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[Bound]:
    bounds = []
    column = "s at 20 Mbps"
    for model in plan.models if 20.0 in plan.mbps else ():
        by_hook = {row["hook"]: row for row in rows if row["model"] == model and row[column] == row[column]}
        dmgc = [row for name, row in by_hook.items() if name.startswith("dmgc") and not name.endswith("ddp")]
        peers = [name for name in by_hook if name.startswith(("fp16", "topk")) and not name.endswith("ddp")]
        others = [by_hook[name] for name in (*peers, "powersgd ddp") if name in by_hook]
        if not dmgc or "none" not in by_hook:
            continue
        best = min(dmgc, key=lambda row: row[column])
        words = f"{model}, 20 Mbps: none's time to the target over {best['hook']}'s, at least 4"
        bounds.append(Bound(words, by_hook["none"][column] / best[column], 4.0))
        if others:
            other = min(others, key=lambda row: row[column])
            words = f"{model}, 20 Mbps: {other['hook']}'s time over {best['hook']}'s, at least 1"
            bounds.append(Bound(words, other[column] / best[column], 1.0))
        saving = max(1 - row["M2"] for row in dmgc)
        bounds.append(Bound(f"{model}: bytes to the target that dmgc saves, at least 0.99", saving, 0.99))
    return bounds


def _draw(figure: Figure, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    for number, model in enumerate(plan.models):
        axes = figure.add_subplot(1, len(plan.models), number + 1)
        for row in rows:
            if row["model"] != model:
                continue
            kind, *more = row["hook"].split()
            style = {"0.1%": ":", "1.0%": "-", "10.0%": "--", "ddp": "-."}[more[-1]] if more else "-"
            times = [row[f"s at {mbps:g} Mbps"] for mbps in plan.mbps]
            axes.plot(plan.mbps, times, style, marker="o", color=COLORS[kind], label=row["hook"])
        axes.set(title=model, xlabel="link, Mbps", ylabel="seconds to the target", xscale="log", yscale="log")
        axes.legend(fontsize=6)
