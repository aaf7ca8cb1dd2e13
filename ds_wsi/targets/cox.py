r"""Cox's partial likelihood of an optimizer step, its gradient in closed form, and what backward starts from.

With d_i whether bag i's event was seen at T_i, theta_i its score, E the events of the step, and per distinct event time
t_k: m_k events H_k, S_k the sum of e^theta over T_j >= t_k, D_k that over H_k,

    L = (1 / E) sum_k [sum_{r < m_k} log(S_k - c_r D_k) - sum_{H_k} theta],   c_r = r / m_k (Efron) or 0 (Breslow)

    dL/dtheta_i = (1 / E) [e^theta_i sum_{t_k <= T_i} sum_r 1 / (S_k - c_r D_k)
                           - d_i e^theta_i sum_r c_r / (S_k - c_r D_k) at its own time - d_i]

Risk sets are of one stratum; strata share E. A bag that is censored at an event's time belongs to its risk set. The
loss couples the step's bags, but by B scores alone: all ranks gather those (`gather_table`), each computes the gradient
of all, and the backward of its own bags starts from its own part (`cox_surrogate`). Two passes are needed where a rank
has several stacks, because the scores of all of them must be known before the first backward.

The loss of a step depends on which bags meet in it: of a cohort dealt over steps it is not the classical likelihood.

Source: Cox, "Regression models and life-tables", JRSS B 1972; Breslow's discussion of it; Efron, "The efficiency of
Cox's likelihood function for censored data", JASA 1977. Two passes: Gao et al., "Scaling deep contrastive learning
batch size under memory limited setup", RepL4NLP 2021.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_wsi.targets.choices import TIES
from ds_wsi.targets.sums import single_output
from ds_wsi.targets.survival_table import SurvivalTable


class CoxStep(NamedTuple):
    """A step's loss and gradient.

    Attributes:
        loss: L; 0 without an event.
        gradient: float64 [B] on the host, dL/dtheta in the order of the table; 0 for bags without a target.
        n_events: E.
    """

    loss: float
    gradient: Tensor
    n_events: int


def cox_step(table: SurvivalTable, ties: str = "efron") -> CoxStep:
    """The loss of all the step's bags and its gradient, in float64 on the host; no collective.

    Computed in the order (stratum, time, id): every rank has the same bits, however the bags were dealt. In logarithms:
    finite for scores of any finite size. A score that is not finite makes gradients NaN, and raises nothing: with a
    scaled loss the engine skips such a step.

    Args:
        table: the step's bags, all ranks' and all stacks'.
        ties: one of `TIES`.

    Raises:
        ValueError: unknown `ties`, an id that occurs twice, or a step of one bag.
    """
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
    if len(table) == 1:
        raise ValueError(
            "a step must have two bags or more for a Cox loss, got 1, whose gradient is 0 whatever it is. "
            "HINT: --bags_per_step 64"
        )
    table = table.to_host()
    gradient = torch.zeros(len(table), dtype=torch.float64)
    n_events, loss = 0, torch.zeros((), dtype=torch.float64)
    for rows in strata_rows(table):
        events = table.events[rows]
        if events.any():
            part_loss, part = _stratum(table.scores[rows], table.times[rows], events, ties)
            n_events += int(events.sum())
            loss += part_loss
            gradient[rows] = part
    if n_events == 0:
        return CoxStep(0.0, gradient, 0)
    return CoxStep((loss / n_events).item(), gradient / n_events, n_events)


def strata_rows(table: SurvivalTable) -> tuple[Tensor, ...]:
    """Row numbers of each stratum's bags that have a target, by (time, id): int64 on the host, stratum by stratum."""
    order = table.canonical_order()
    _, counts = table.strata[order].unique_consecutive(return_counts=True)
    parts: tuple[Tensor, ...] = order.split(counts.tolist())
    return parts


def log_risk_sums(scores: Tensor, times: Tensor, at: Tensor) -> Tensor:
    """Log of the sum of e^score over the bags whose time is `at` or later, per time of `at`: those censored then too.

    Args:
        scores, times: float64 [n], sorted by time.
        at: float64 [m], none of them later than the last of `times`.
    """
    return scores.flip(0).logcumsumexp(0).flip(0)[torch.searchsorted(times, at)]


def _stratum(scores: Tensor, times: Tensor, events: Tensor, ties: str) -> tuple[Tensor, Tensor]:
    """E L and E dL/dtheta of a stratum that has an event: scores, times, events [n] sorted by time."""
    scores = scores - scores.max()  # the quotients do not change, and their logarithms are rounded less
    own_scores, own_times = scores[events], times[events]  # [E], one row per event
    log_risk = log_risk_sums(scores, times, own_times)
    _, tie, sizes = own_times.unique_consecutive(return_inverse=True, return_counts=True)
    place_in_tie = torch.arange(len(tie)) - (sizes.cumsum(0) - sizes)[tie]
    c = place_in_tie / sizes[tie].double() if ties == "efron" else torch.zeros_like(own_scores)
    chance = (own_scores - log_risk).exp()  # e^theta / S, at most 1
    tied_chance = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, tie, chance)  # D / S
    kept = 1 - c * tied_chance[tie]  # (S - c D) / S, at least 1 / m
    log_denominators = log_risk + kept.log()
    loss = (log_denominators - own_scores).sum()
    # e^theta / (S - c D) is at most m for whoever is in that risk set: nothing overflows.
    log_sums = (-log_denominators).logcumsumexp(0)
    n_before = torch.searchsorted(own_times, times, right=True)  # events at this time or earlier
    gradient = torch.where(n_before > 0, (scores + log_sums[n_before - 1]).exp(), torch.zeros_like(scores))
    left_out = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, tie, c / kept)
    gradient[events] -= chance * left_out[tie] + 1
    return loss, gradient


def cox_surrogate(scores: Tensor, gradient: Tensor) -> Tensor:
    """Sum of g_i theta_i over a stack's own bags: its backward is that of the step's loss. Its value means nothing.

    It is multiplied by W P, `target_factor(1, world_size, accumulation)`, because engines take the mean over W ranks
    and P micro-steps. A scaler multiplies it too, so g is not scaled. Without bags, or where every g is 0, its
    backward gives zeros and still passes through the graph.

    Args:
        scores: [b] or [b, 1], with their graph: the same as in the table that `gradient` was computed of.
        gradient: float64 [b], the stack's rows of `CoxStep.gradient`.

    Raises:
        ValueError: not one gradient per score.
    """
    theta = single_output(scores)
    if gradient.shape != theta.shape:
        raise ValueError(
            f"gradient must have one number per bag of the stack, [{len(theta)}], got {list(gradient.shape)}. HINT: "
            "split CoxStep.gradient[rows] by the bags of each stack."
        )
    return (theta * gradient.to(theta.device, theta.dtype)).sum()


def check_cox_steps(bags_in_steps: Sequence[int]) -> None:
    """Refuse, before anything is trained, a plan with a step of one bag, from which a Cox loss learns nothing.

    Raises:
        ValueError: names the step.
    """
    for step, n_bags in enumerate(bags_in_steps, 1):
        if n_bags == 1:
            raise ValueError(
                f"each step must have two bags or more for a Cox loss, got 1 in step {step} of {len(bags_in_steps)}. "
                "HINT: --bags_per_step 64, or another number that leaves no slide alone in the last step."
            )


def few_events_chance(event_rate: float, n_bags: int) -> tuple[float, float]:
    """Chance that a step has no event, and that it has one: of bags dealt without regard to events.

    Args:
        event_rate: p, the cohort's share of bags whose event was seen.
        n_bags: B; the chances are (1 - p)^B and B p (1 - p)^(B - 1).
    """
    return (1 - event_rate) ** n_bags, n_bags * event_rate * (1 - event_rate) ** (n_bags - 1)
