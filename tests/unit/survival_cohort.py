"""A small survival cohort with ties in times and risks, and a writing-out of resamples: for the tests of metrics."""

import numpy as np

from ds_wsi.evaluation.task_metrics.follow_up import FollowUp, follow_up


def numbers(text: str) -> np.ndarray:
    """Numbers that stand in a row."""
    return np.array([float(word) for word in text.split()])


# Months; drawn once, and given to the other libraries as they stand.
TRAINING = follow_up(
    numbers("72 40 8 34 3 10 20 5 11 7 9 9 60 6 20 8 7 8 24 43 19 1 12 46 67 18 28 12 54 2 49 18 3 3 3 42 64 14 5 69"),
    numbers("0 1 1 1 1 0 1 1 0 1 0 1 0 1 1 1 0 0 0 0 1 1 1 1 0 1 1 1 0 1 0 1 1 1 1 0 0 1 0 0"),
)
TRAINING_RISKS = numbers(
    "1.0 0.7 -0.6 -2.3 2.2 -0.9 0.3 0.1 2.2 0.3 1.2 -1.4 0.3 3.0 0.3 0.0 -0.6 -0.6 -0.3 1.4 "
    "0.9 0.1 -1.9 -0.4 -1.0 0.1 0.0 -0.1 2.6 1.6 -0.9 0.0 -0.8 1.4 2.2 -0.6 0.2 1.0 -2.5 -1.3"
)
TEST = follow_up(
    numbers("15 23 2 33 9 23 24 55 14 16 30 42 47 6 21 6 10 40 8 2 4 17 19 4"),
    numbers("0 0 1 1 1 1 1 0 1 0 0 0 0 1 1 1 0 0 1 1 1 1 0 1"),
)
RISKS = numbers(
    "1.5 -1.1 1.1 0.9 2.2 0.3 -0.5 -1.9 -1.5 -0.6 -2.7 -1.3 -2.0 -1.4 0.5 0.2 -1.7 1.3 2.6 1.4 2.4 -1.2 1.9 2.2"
)
TIMES = np.array([6.0, 12.0, 20.0, 30.0])
SURVIVAL = np.exp(-np.outer(np.exp(0.6 * RISKS), TIMES / 40))  # [24, 4]


def written_out(counts: np.ndarray) -> np.ndarray:
    """The rows of a resample, each as often as it counts."""
    return np.repeat(np.arange(len(counts)), counts)


def censoring_by_hand(training: FollowUp, time: float) -> float:
    """G(t), factor by factor; who has the event at a time is no longer at risk of being censored then."""
    product = 1.0
    for earlier in sorted(set(training.times.tolist())):
        if earlier <= time:
            censored = sum(t == earlier and not d for t, d in zip(training.times, training.events, strict=True))
            leaving = sum(t == earlier and d for t, d in zip(training.times, training.events, strict=True))
            exposed = sum(t >= earlier for t in training.times) - leaving
            product *= 1 - censored / exposed if exposed else 1
    return product


def c_by_hand(of: FollowUp, risks: np.ndarray, weight=lambda time: 1.0, strata=None) -> float:
    """Every ordered pair, one after the other."""
    concordant = comparable = 0.0
    for i in range(len(of)):
        for j in range(len(of)):
            later = of.times[i] < of.times[j] or (of.times[i] == of.times[j] and not of.events[j])
            if not of.events[i] or not later or (strata is not None and strata[i] != strata[j]):
                continue
            comparable += weight(of.times[i])
            concordant += weight(of.times[i]) * (1.0 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0.0)
    return concordant / comparable if comparable else float("nan")
