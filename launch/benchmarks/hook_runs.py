"""What `compression` runs on its ranks: the task, training by each hook to the target, and a step's time."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.compression.comm import CommPolicy
from ds_wsi.engines.accelerator.stepper import Stepper
from ds_wsi.engines.comm_hooks.register import attach
from ds_wsi.models.aggregators.abmil import ABMIL
from ds_wsi.models.aggregators.transmil import TransMIL
from ds_wsi.runtime.log import logger
from ds_wsi.stacking import stack_bags
from launch.benchmarks.link import bytes_sent
from launch.benchmarks.local_updates import LocalPolicy, Meeting

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


HOOKS: dict[str, CommPolicy | LocalPolicy] = {
    "none": CommPolicy(),
    "fp16": CommPolicy(hook="fp16"),
    **{f"topk {keep:.1%}": CommPolicy(hook="topk", keep=keep, values="fp16") for keep in KEEPS},
    **{f"dmgc {keep:.1%}": _dmgc(keep) for keep in KEEPS},
    "none ddp": CommPolicy(),
    "powersgd ddp": CommPolicy(hook="powersgd", dense_steps=POWERSGD_DENSE),
    "topk 1.0% ddp": CommPolicy(hook="topk", keep=0.01, values="fp16"),
    "dmgc 1.0% ddp": _dmgc(0.01),
    **{f"localsgd H{steps}": LocalPolicy(steps) for steps in (4, 8, 16)},
    **{f"diloco H{steps}": LocalPolicy(steps, "diloco") for steps in (8, 16, 30)},
    "diloco H8 bf16": LocalPolicy(8, "diloco", values="bf16"),
    # 0.4 is the outer rate of the authors' largest run, 1 the plain one; four sites send other entries each, hence 4.
    **{f"sparseloco H8 a{rate:g}": LocalPolicy(8, "topk", outer_lr=rate) for rate in (0.4, 1.0, 4.0)},
    **{f"sparseloco H{steps} a4": LocalPolicy(steps, "topk", outer_lr=4.0) for steps in (16, 30)},
}
ALIKE, ONE_CLASS = "alike", "one class each"
SKEWED = ("none ddp", "dmgc 1.0% ddp", "localsgd H8", "diloco H8", "sparseloco H8 a4")
Case = tuple[str, str, str]  # model, hook, sites


def under_ddp(hook: str) -> bool:
    """Whether a hook's rows are of DDP, not of ZeRO 1."""
    return hook.endswith("ddp") or isinstance(HOOKS[hook], LocalPolicy)


def make_bag(number: int, positive: bool) -> Tensor:
    """Features [TILES, DIM]; the shift's direction is the same for all bags."""
    generator = torch.Generator().manual_seed(number)
    bag = torch.randn(TILES, DIM, generator=generator)
    if positive:
        direction = torch.randn(DIM, generator=torch.Generator().manual_seed(0))
        bag[:SHIFTED] += SHIFT * direction / direction.norm()
    return bag


class Learner:
    """A rank's training.

    Args:
        model, hook: keys of `MODELS` and `HOOKS`.
        seed: seed of the weights and the bags.
        dense_steps: powersgd's, in place of the hook's own.
        sites: `ALIKE`, or `ONE_CLASS`: all bags of a rank are of the class rank % 2 == 0.

    Attributes:
        stepper: the model under its engine.
        period: steps after which all ranks have one model.
    """

    def __init__(self, model: str, hook: str, seed: int, dense_steps: int | None = None, sites: str = ALIKE) -> None:
        torch.manual_seed(seed)
        policy = HOOKS[hook]
        self._seed, self._number, self._sites = seed, 0, sites
        self.stepper = Stepper("ddp" if under_ddp(hook) else "zero1", MODELS[model](), "adam", RATE)
        self._meeting: Meeting | None = None
        self.period = 1
        if isinstance(policy, LocalPolicy):
            self._meeting, self.period = Meeting(policy, self.stepper), policy.steps
            return
        if dense_steps is not None and policy.hook == "powersgd":
            policy = replace(policy, dense_steps=dense_steps)
        attach(self.stepper.model, policy)

    def step(self) -> None:
        """One bag's step; of local updates it may be a round's last."""
        rank = dist.get_rank()
        number = 1 + (self._seed * 100_000 + self._number) * RANKS + rank
        positive = (rank if self._sites == ONE_CLASS else number + self._number) % 2 == 0
        self._number += 1
        output = self.stepper.model(stack_bags([make_bag(number, positive)]))
        self.stepper.backward(F.cross_entropy(output.logits, torch.tensor([int(positive)])))
        self.stepper.step()
        if self._meeting is not None:
            self._meeting.after_step()


@torch.no_grad()
def _accuracy(module: nn.Module, bags: Sequence[Tensor]) -> float:
    module.eval()
    logits = torch.cat([module(stack_bags([bag])).logits for bag in bags])
    module.train()
    labels = torch.arange(len(bags)) % 2
    return float((logits.argmax(1) == labels).float().mean())


def train(cases: Sequence[Case], seeds: int, steps: int) -> list[list[dict[str, float]]]:
    """Steps and bytes to the target, and the accuracy there, of each seed of each case; steps NaN where it is not met.

    Args:
        cases: what to train, one after the other.
        seeds: seeds of each.
        steps: steps at most; a round that began before is ended.
    """
    share = range(dist.get_rank(), VALIDATION_BAGS, RANKS)
    held_out = [make_bag(10**9 + number, number // RANKS % 2 == 1) for number in share]
    results = []
    for case in cases:
        results.append([_train_one(case, seed, steps, held_out) for seed in range(seeds)])
        if dist.get_rank() == 0:
            met = [(row["steps"], round(row["accuracy"], 3)) for row in results[-1]]
            logger.info("%s: %s", ", ".join(case), met)
    return results


def _train_one(case: Case, seed: int, steps: int, held_out: Sequence[Tensor]) -> dict[str, float]:
    model, hook, sites = case
    learner, accuracy, met = Learner(model, hook, seed, sites=sites), 0.0, float("nan")
    total, taken, every = 0, 0, max(EVERY, learner.period)
    dist.barrier()  # what building it sent has left
    while taken < steps and met != met:
        before = bytes_sent()
        for _ in range(every):
            learner.step()
        total, taken = total + bytes_sent() - before, taken + every
        part = torch.tensor(_accuracy(learner.stepper.module, held_out))
        dist.all_reduce(part)
        accuracy = float(part) / RANKS
        met = float(taken) if accuracy >= TARGET else met
    return {"steps": met, "taken": float(taken), "bytes": float(total), "accuracy": accuracy}


def time_steps(cases: Sequence[tuple[str, str]], timed_s: float) -> list[float]:
    """Mean seconds of a step of each (model, hook), after those in which buckets are rebuilt and connections opened.

    Of local updates whole rounds are timed.
    """
    step_s = []
    for model, hook in cases:
        learner = Learner(model, hook, 0, dense_steps=2)
        period = learner.period
        warm = _mean_seconds(learner, 3 if hook.startswith("powersgd") else period)
        # Of a step this long connections and new buckets are no part that counts.
        long = warm * period > 2 * timed_s and not hook.startswith("powersgd")
        first = warm if long else _mean_seconds(learner, period)
        # Small messages fit the token bucket for a few steps, which would then look faster than the link.
        rounds = min(60 // period, round(timed_s / (first * period)))
        step_s.append(_mean_seconds(learner, rounds * period) if rounds > 1 else first)
    return step_s


def _mean_seconds(learner: Learner, steps: int) -> float:
    """Mean seconds of a step, over the ranks too: the same on all of them."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        learner.step()
    dist.barrier()
    seconds = torch.tensor((time.perf_counter() - start) / steps)
    dist.all_reduce(seconds)
    return float(seconds) / RANKS
