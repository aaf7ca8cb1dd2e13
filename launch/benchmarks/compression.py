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

Local updates (`launch/benchmark.py local_updates`) run under DDP too, with Adam as each site's own optimizer. H is in
their names; their target is looked for where a round ends, because before it there is no common model. Their step's
time is a round's / H. Rows of sites with "one class each" have bags of one class alone on each rank, two ranks of each.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from ds_wsi.compression.comm import CommPolicy
from ds_wsi.runtime.files import write_json
from ds_wsi.runtime.log import logger
from launch.benchmarks.hook_runs import (
    ALIKE,
    HOOKS,
    MODELS,
    ONE_CLASS,
    POWERSGD_DENSE,
    RANKS,
    SKEWED,
    TARGET,
    Case,
    time_steps,
    train,
    under_ddp,
)
from launch.benchmarks.link import LimitedLink
from launch.benchmarks.local_updates import LocalPolicy, payload_bytes
from launch.benchmarks.ranks import run_ranks
from launch.benchmarks.table import Bound, Result

COLORS = {"none": "#666666", "fp16": "#c4713b", "topk": "#5aa469", "powersgd": "#8a5aa5", "dmgc": "#3b6ea5"}
COLORS |= {"localsgd": "#b0a030", "diloco": "#c05080", "sparseloco": "#40a0a0"}


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

    def cases(self) -> list[Case]:
        """All that is trained: models, hooks, and of some hooks sites that have one class each."""
        hooks = [(hook, ALIKE) for hook in self.hooks]
        if any(isinstance(HOOKS[hook], LocalPolicy) for hook in self.hooks):
            hooks += [(hook, ONE_CLASS) for hook in self.hooks if hook in SKEWED]
        return [(model, *hook) for model in self.models for hook in hooks]


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
    of_gradients = [name for name, policy in HOOKS.items() if isinstance(policy, CommPolicy)]
    prefixes = tuple(options.get("hooks", ",".join(of_gradients)).split(","))
    chosen = [name for name in HOOKS if name.startswith(prefixes)]
    plan = Plan(
        models=tuple(options.get("models", "ABMIL" if quick else "ABMIL,TransMIL").split(",")),
        hooks=tuple(name for name in HOOKS if name in {*chosen, *map(_dense, chosen)}),
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
    rows = [_row(plan, trained, step_s, case) for case in plan.cases()]
    notes: dict[str, Any] = {
        "link": "network namespaces and tbf" if limited else "modelled: bytes / bandwidth added to the step",
        "target": f"validation accuracy {TARGET}",
        "seeds": plan.seeds,
        "at most steps": plan.steps,
        "M1": "bytes of a step against none's; M2: bytes to the target against none's",
    }
    for model in plan.models:
        sizes = [parameter.numel() for parameter in MODELS[model]().parameters()]
        local = {name: policy for name in plan.hooks if isinstance(policy := HOOKS[name], LocalPolicy)}
        notes[f"{model}: payload of a round of all ranks together, bytes, by formula"] = {
            name: payload_bytes(policy, sizes, RANKS) for name, policy in local.items()
        }
        alike = [row for row in rows if row["model"] == model and row["sites"] == ALIKE]
        at = {row["hook"]: row.get("s at 20 Mbps", float("nan")) for row in alike}
        if {"topk 1.0% ddp", "dmgc 1.0% ddp"} <= set(at):
            # No bound: with four ranks, one message to everyone is no more than one to owners and one back.
            notes[f"{model} under DDP, 20 Mbps, topk 1.0% over dmgc 1.0%"] = at["topk 1.0% ddp"] / at["dmgc 1.0% ddp"]
    return Result(
        f"Communication hooks over a slow link: {RANKS} processes, {plan.seeds} seed(s), {notes['link']}",
        rows,
        [*_bounds(plan, rows), *_local_bounds(plan, rows)],
        lambda figure: _draw(figure, plan, rows),
        notes,
    )


def _train_all(plan: Plan, enter: Any) -> dict[Case, list[dict[str, float]]]:
    kept = json.loads(plan.trained.read_text()) if plan.trained and plan.trained.exists() else {}
    keys = {case: f"{', '.join(case)}, {plan.seeds} seeds, {plan.steps} steps" for case in plan.cases()}
    for model in plan.models:
        missing = [case for case, key in keys.items() if case[0] == model and key not in kept]
        if not missing:
            continue
        by_rank = run_ranks(train, RANKS, missing, plan.seeds, plan.steps, enter=enter, timeout_s=4 * 3600)
        for number, case in enumerate(missing):
            seeds = by_rank[0][number]
            for seed, row in enumerate(seeds):
                row["bytes"] = sum(rank[number][seed]["bytes"] for rank in by_rank) / (1 if enter else RANKS)
            kept[keys[case]] = seeds
        if plan.trained:
            write_json(plan.trained, kept)
    return {case: kept[key] for case, key in keys.items()}


def _time_all(plan: Plan, link: LimitedLink | None, mbps: float, trained: Any) -> dict[tuple[str, str], float]:
    """Seconds of a step on a link; without one, a model's."""
    if link is not None:
        link.limit(mbps)
    cases = [(model, hook) for model in plan.models for hook in plan.hooks]
    seconds = run_ranks(time_steps, RANKS, cases, plan.timed_s, enter=None if link is None else link.enter)[0]
    step_s = dict(zip(cases, seconds, strict=True))
    if link is None:
        for case in cases:
            rows = trained[*case, ALIKE]
            sent = fmean(row["bytes"] / row["taken"] for row in rows) / RANKS
            step_s[case] += sent / (mbps * 1e6 / 8)
    logger.info("%g Mbps: %s", mbps, {case: round(value, 3) for case, value in step_s.items()})
    return step_s


# --- the table ---


def _dense(hook: str) -> str:
    """The row that a hook's is compared with."""
    return "none ddp" if under_ddp(hook) else "none"


def _row(plan: Plan, trained: Any, step_s: Any, case: Case) -> dict[str, Any]:
    model, hook, sites = case
    none = _dense(hook)
    seeds, dense = trained[case], trained[model, none, sites]
    met = [row for row in seeds if row["steps"] == row["steps"]]
    steps = fmean(row["steps"] for row in met) if met else float("nan")
    sent = fmean(row["bytes"] for row in met) if met else float("nan")
    row: dict[str, Any] = {
        "model": model,
        "hook": hook,
        "sites": sites,
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
        alike = [row for row in rows if row["model"] == model and row["sites"] == ALIKE]
        by_hook = {row["hook"]: row for row in alike if row[column] == row[column]}
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


def _local_bounds(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[Bound]:
    """What holds of dmgc beside local updates; where it does not win there is no bound, and the rows say so."""
    bounds = []
    for model in plan.models:
        of = {(row["hook"], row["sites"]): row for row in rows if row["model"] == model}
        local_sgd = [
            row["MB to target"] for (hook, sites), row in of.items() if (hook[:8], sites) == ("localsgd", ALIKE)
        ]
        if not local_sgd or not {("dmgc 1.0% ddp", ALIKE), ("diloco H8", ONE_CLASS)} <= set(of):
            continue
        none, dmgc, column = of["none ddp", ALIKE], of["dmgc 1.0% ddp", ALIKE], "s at 20 Mbps"
        if column in none:
            words = f"{model}, 20 Mbps: none ddp's time to the target over dmgc 1.0% ddp's, at least 4"
            bounds.append(Bound(words, none[column] / dmgc[column], 4.0))
        words = f"{model}: the fewest bytes of localsgd over dmgc 1.0% ddp's, at least 2"
        bounds.append(Bound(words, min(local_sgd) / dmgc["MB to target"], 2.0))
        words = f"{model}, one class each: diloco H8's steps over dmgc 1.0% ddp's, at least 1"
        skewed = of["diloco H8", ONE_CLASS]["steps"] / of["dmgc 1.0% ddp", ONE_CLASS]["steps"]
        bounds.append(Bound(words, skewed, 1.0))
    return bounds


def _draw(figure: Figure, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    for number, model in enumerate(plan.models):
        axes = figure.add_subplot(1, len(plan.models), number + 1)
        for row in rows:
            if row["model"] != model or row["sites"] != ALIKE:
                continue
            kind, *more = row["hook"].split()
            style = {"0.1%": ":", "10.0%": "--", "ddp": "-.", "H16": "--", "H30": ":"}.get((more or ["-"])[-1], "-")
            times = [row[f"s at {mbps:g} Mbps"] for mbps in plan.mbps]
            axes.plot(plan.mbps, times, style, marker="o", color=COLORS[kind], label=row["hook"])
        axes.set(title=model, xlabel="link, Mbps", ylabel="seconds to the target", xscale="log", yscale="log")
        axes.legend(fontsize=4)
