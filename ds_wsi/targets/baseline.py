"""Breslow's estimate of the baseline hazard, with which a Cox model's score is a survival curve.

Source: Breslow, discussion of Cox, JRSS B 1972: H0(t) = sum over event times t_k <= t of m_k / S_k.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_wsi.targets.cox import log_risk_sums, strata_rows
from ds_wsi.targets.survival_table import SurvivalTable


@dataclass(frozen=True)
class Baseline:
    """A cumulative baseline hazard, a step function; numbers as JSON has them.

    Attributes:
        times: distinct event times of the training split, ascending.
        log_hazards: log H0 from each of them on; 0 is H0 before the first. In logarithms, because scores far from 0
            make hazards that no float holds.
        last_time: the longest time of the training split, up to which the estimate says anything.
    """

    times: tuple[float, ...]
    log_hazards: tuple[float, ...]
    last_time: float

    def survival(self, scores: Tensor, times: Tensor) -> Tensor:
        """S(t|x) = exp(-H0(t) e^theta), float64 [B, T] on the host; NaN after `last_time`.

        Args:
            scores: theta, [B] or [B, 1], of the model that the baseline was estimated with.
            times: t, [T], in the unit of the training times.
        """
        at = times.detach().cpu().double()
        log_hazards = torch.tensor([-torch.inf, *self.log_hazards], dtype=torch.float64)
        steps = torch.searchsorted(torch.tensor(self.times, dtype=torch.float64), at, right=True)
        survival = torch.exp(-torch.exp(log_hazards[steps] + scores.detach().cpu().double().reshape(-1, 1)))
        return survival.masked_fill(at > self.last_time, torch.nan)


def breslow_baseline(table: SurvivalTable) -> Mapping[int, Baseline]:
    """The baseline of each stratum of the TRAINING split, by its number.

    Args:
        table: the whole split, scored by the model as it is kept.

    Raises:
        ValueError: a stratum has no event.
    """
    table, baselines = table.to_host(), {}
    for rows in strata_rows(table):
        stratum, times, events = int(table.strata[rows[0]]), table.times[rows], table.events[rows]
        if not events.any():
            raise ValueError(
                f"each stratum must have an event for a baseline hazard, got none in stratum {stratum}, which has "
                f"{len(rows)} bags. HINT: train without strata, or leave it out."
            )
        event_times, sizes = times[events].unique_consecutive(return_counts=True)
        log_steps = sizes.double().log() - log_risk_sums(table.scores[rows], times, event_times)
        log_hazards = log_steps.logcumsumexp(0)
        baselines[stratum] = Baseline(tuple(event_times.tolist()), tuple(log_hazards.tolist()), float(times[-1]))
    return baselines
