"""Survival in bins of time: one hazard per bin, and a likelihood that is a sum over bags.

h_k = sigmoid(z_k) is the chance that an event that has not come before bin k comes in it. With y the bag's bin, its
loss is -[sum_{k < y} log(1 - h_k) + log h_y] where the event was seen and -sum_{k <= y} log(1 - h_k) where it was
censored. Logarithms are logsigmoid(z) and logsigmoid(-z): a hazard that is clamped away from 0 has no gradient there.

Source: Brown, "On the use of indicator variables for studying the time-dependence of parameters in a response-time
model", Biometrics 1975; Zadeh and Schmid, "Bias in cross-entropy-based training of deep survival networks", TPAMI 2020
(the factor of the censored).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_wsi.runtime.numerics import widened
from ds_wsi.runtime.words import counted
from ds_wsi.targets.sums import MISSING, masked_sum


@dataclass(frozen=True)
class TimeBins:
    """Bins of time (a, b]: a time on a border is in the bin that ends there, so that S_k is P(T > b_k).

    Attributes:
        borders: between the bins, ascending: K - 1 numbers for K bins. The first bin begins at 0, the last never ends.
        n_requested: how many bins were asked for.
    """

    borders: tuple[float, ...]
    n_requested: int

    @property
    def n_bins(self) -> int:
        """K, the model's number of outputs."""
        return len(self.borders) + 1

    @property
    def shortfall(self) -> str:
        """What to tell where there are fewer bins than were asked for; else empty."""
        if self.n_bins == self.n_requested:
            return ""
        return (
            f"{counted(self.n_bins, 'time bin')} instead of {self.n_requested}: quantiles of the training split's "
            "event times coincide"
        )

    def bin_of(self, times: Tensor) -> Tensor:
        """The bins of times [B], int64 [B]; `MISSING` where a time is NaN."""
        bins = torch.bucketize(times.double(), torch.tensor(self.borders, dtype=torch.float64, device=times.device))
        return torch.where(times.isnan(), MISSING, bins)


def time_bins(times: Sequence[float] | Tensor, events: Sequence[bool] | Tensor, n_bins: int = 4) -> TimeBins:
    """Bins between quantiles of the event times of the TRAINING split; each holds an event.

    Others' times would leak into training what is to be tested; censored times say when observation ended.

    Args:
        times: [B], of the training split; NaN: no target.
        events: bool [B]; False: censored.
        n_bins: K, two or more; where quantiles coincide there are fewer bins.

    Raises:
        ValueError: too few bins, or no event.
    """
    if n_bins < 2:
        raise ValueError(f"time bins must be two or more, got {n_bins}. HINT: --time_bins 4")
    all_times = torch.as_tensor(times, dtype=torch.float64)
    seen = all_times[torch.as_tensor(events, dtype=torch.bool) & ~all_times.isnan()]
    if len(seen) == 0:
        raise ValueError(
            f"the training split must have an event to bin times by, got none in {counted(len(all_times), 'bag')}. "
            "HINT: look whether the event column's meaning is the other one (--censorship_column)."
        )
    # The quantile is an event's own time, and none is the last one's: no bin is without an event.
    ordered = sorted(seen.tolist())
    quantiles = {ordered[-(-k * len(ordered) // n_bins) - 1] for k in range(1, n_bins)}
    return TimeBins(tuple(sorted(quantiles - {ordered[-1]})), n_bins)


def hazard_loss(
    logits: Tensor, bins: Tensor, events: Tensor, *, alpha: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Sum over the labelled bags of the negative log-likelihood; its units are `labelled_units(bins)`.

    Args:
        logits: z [B, K], of any floating type.
        bins: int64 [B], in [0, K), or `MISSING`.
        events: bool [B]; False: censored.
        alpha: the loss of the censored is multiplied by 1 - alpha; 0 is the likelihood.
        weights: [B], factors of the bags' losses; None: 1.

    Raises:
        ValueError: alpha outside of [0, 1].
        IndexError: a bin that the logits do not have (on a GPU its assertion).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha:g}. HINT: --nll_alpha 0 is the likelihood.")
    z, present = widened(logits), bins != MISSING
    last = torch.where(present, bins, 0)[:, None]  # [B, 1]
    log_hazards = F.logsigmoid(z).gather(1, last).squeeze(1)
    # Masked, not subtracted from the sum through the bin: of a hazard near 1 the difference would keep nothing.
    n_survived = last + ~events[:, None]
    survived = torch.arange(z.shape[1], device=z.device) < n_survived  # [B, K]
    log_survival = torch.where(survived, F.logsigmoid(-z), torch.zeros_like(z)).sum(1)
    losses = torch.where(events, -(log_survival + log_hazards), -(1 - alpha) * log_survival)
    return masked_sum(losses, present, weights)


def hazard_survival(logits: Tensor) -> Tensor:
    """S_k = prod_{j <= k} (1 - h_j), the chance of no event through bin k: [B, K] of logits [B, K]."""
    return F.logsigmoid(-widened(logits)).cumsum(1).exp()


def hazard_risk(logits: Tensor) -> Tensor:
    """Risk scores -sum_k S_k, [B]: the larger, the sooner the event is expected."""
    return -hazard_survival(logits).sum(1)


def survival_curve(logits: Tensor, bins: TimeBins, times: Tensor) -> Tensor:
    """S(t), float64 [B, T] on the host at times [T], linear between the borders, 1 at 0; NaN after the last border.

    Args:
        logits: [B, K].
        bins: those that the model was trained on, K of them.
        times: [T], 0 or later.

    Raises:
        ValueError: logits of another number of bins.
    """
    if logits.shape[1] != bins.n_bins:
        raise ValueError(
            f"logits must be of {bins.n_bins} time bins, got {list(logits.shape)}. HINT: take the model's own bins."
        )
    at = times.detach().cpu().double()
    knots = torch.tensor([0.0, *bins.borders], dtype=torch.float64)
    if len(knots) == 1:  # one bin, which never ends
        return torch.where(at == 0, 1.0, torch.nan).expand(len(logits), -1).double()
    survival = hazard_survival(logits.detach().cpu().double())[:, :-1]
    heights = torch.cat([torch.ones(len(logits), 1, dtype=torch.float64), survival], dim=1)  # [B, K]
    right = torch.searchsorted(knots, at).clamp(1, len(knots) - 1)
    share = (at - knots[right - 1]) / (knots[right] - knots[right - 1])
    curve = heights[:, right - 1] + share * (heights[:, right] - heights[:, right - 1])
    return curve.masked_fill((at < 0) | (at > knots[-1]), torch.nan)
