"""Ordered classes: K - 1 questions "is the class above k?", how they are asked, and the class they give.

Four losses, y in 0 .. K - 1 and bit k = [y > k]:

- bits: a logit z_k of its own per question, the sum of the K - 1 binary cross-entropies.
- corn: z_k is the logit of y > k among those with y >= k; only they are asked.
- coral: z_k = f + b_k with one score f per bag, so that P(y > k) falls with k where the b_k do.
- link: P(y <= k) = sigmoid(c_k - f) with ordered cuts c_k, the likelihood of the class itself.

Source: bits, Cheng, Wang and Pollastri, "A neural network approach to ordinal regression", IJCNN 2008. Corn: Shi, Cao
and Raschka, "Deep neural networks for rank-consistent ordinal regression based on conditional probabilities", 2021.
Coral: Cao, Mirjalili and Raschka, "Rank consistent ordinal regression for neural networks", 2020. Link: McCullagh,
"Regression models for ordinal data", JRSS B 1980.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_wsi.runtime.numerics import widened
from ds_wsi.targets.sums import MISSING, masked_sum, single_output


def bits_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the labelled bags of the sum over the questions; its units are `labelled_units(labels)`.

    Of CORAL too, with `coral_logits`.

    Args:
        logits: [B, K - 1], of any floating type.
        labels: int64 [B], in [0, K), or `MISSING`.
        weights: [B], factors of the bags' losses; None: 1.

    Raises:
        IndexError: a class that the logits do not have (on a GPU its assertion).
    """
    losses, present = _bit_losses(logits, labels)
    return masked_sum(losses, present.expand_as(losses), weights)


def corn_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the labelled bags of the questions that each is asked; its units are `corn_units(labels, K)`.

    Args:
        logits: [B, K - 1], of any floating type.
        labels: int64 [B], in [0, K), or `MISSING`.
        weights: [B], factors of the bags' losses; None: 1.

    Raises:
        IndexError: a class that the logits do not have (on a GPU its assertion).
    """
    losses, present = _bit_losses(logits, labels)
    asked = torch.arange(losses.shape[1], device=labels.device) <= labels[:, None]
    return masked_sum(losses, present & asked, weights)


def coral_logits(scores: Tensor, biases: Tensor) -> Tensor:
    """CORAL's logits [B, K - 1], of scores f [B] or [B, 1] and biases [K - 1], which are trained."""
    return single_output(scores)[:, None] + widened(biases)


def coral_biases(n_classes: int) -> Tensor:
    """The biases that CORAL's training starts from: descending from 1 in steps of 1 / (K - 1), float32 [K - 1]."""
    return torch.arange(n_classes - 1, 0, -1) / (n_classes - 1)


def link_cuts(raw: Tensor) -> Tensor:
    """Ordered cuts c [K - 1] of the numbers that are trained: c_0 = raw_0, c_k = c_{k-1} + softplus(raw_k)."""
    numbers = widened(raw)
    return torch.cat([numbers[:1], F.softplus(numbers[1:])]).cumsum(0)


def initial_link(n_classes: int) -> Tensor:
    """What the training of cuts starts from: raw, float32 [K - 1], of cuts one apart around 0."""
    raw = torch.full((n_classes - 1,), 1.0).expm1().log()  # softplus of it is 1
    raw[0] = (2 - n_classes) / 2
    return raw


def link_loss(scores: Tensor, raw: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the labelled bags of -log P(y); its units are `labelled_units(labels)`.

    A difference of sigmoids near 0 or 1 would lose its digits. With a > b, sigmoid(a) - sigmoid(b) = sigmoid(a)
    sigmoid(-b) (1 - e^(b - a)), and 1 - e^-softplus(r) = sigmoid(r): -log P is a sum of three softplus.

    Args:
        scores: f [B] or [B, 1], of any floating type.
        raw: [K - 1], of the cuts: see `link_cuts`.
        labels: int64 [B], in [0, K), or `MISSING`.
        weights: [B], factors of the bags' losses; None: 1.

    Raises:
        IndexError: a class that the cuts do not have (on a GPU its assertion).
    """
    below = link_cuts(raw) - single_output(scores)[:, None]  # [B, K - 1], logits of y <= k
    present = labels != MISSING
    labels = torch.where(present, labels, 0)[:, None]
    edge = below.new_zeros(len(below), 1)  # P(y <= K - 1) = 1 and P(y <= -1) = 0: no term
    upper = torch.cat([F.logsigmoid(below), edge], dim=1)
    lower = torch.cat([edge, F.logsigmoid(-below)], dim=1)
    between = F.pad(F.logsigmoid(widened(raw)[1:]), (1, 1))  # [K]
    losses = -(upper + lower + between).gather(1, labels).squeeze(1)
    return masked_sum(losses, present, weights)


def chances_above(logits: Tensor) -> Tensor:
    """P(y > k), [B, K - 1], of the logits of `bits_loss`: those of bits need not fall with k."""
    return widened(logits).sigmoid()


def corn_chances_above(logits: Tensor) -> Tensor:
    """P(y > k) = prod_{j <= k} sigmoid(z_j), [B, K - 1], of the logits of `corn_loss`."""
    return F.logsigmoid(widened(logits)).cumsum(1).exp()


def link_chances_above(scores: Tensor, raw: Tensor) -> Tensor:
    """P(y > k) = sigmoid(f - c_k), [B, K - 1], of the scores and raw cuts of `link_loss`."""
    return (single_output(scores)[:, None] - link_cuts(raw)).sigmoid()


def class_chances(above: Tensor) -> Tensor:
    """Class probabilities [B, K] of P(y > k) [B, K - 1]: differences, at least 0, which sum to 1."""
    edge = above.new_ones(len(above), 1)
    chances = -torch.cat([edge, above, edge - 1], dim=1).diff(dim=1)
    chances = chances.clamp(min=0)
    return chances / chances.sum(1, keepdim=True)


def decided_class(above: Tensor) -> Tensor:
    """The class: how many P(y > k) exceed one half, int64 [B]. It need not be the most probable one."""
    return (above > 0.5).sum(1)


def raw_score(above: Tensor) -> Tensor:
    """The expected class sum_k P(y > k), [B]: for thresholds that are fitted on validation."""
    return above.sum(1)


def _bit_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The questions' cross-entropies [B, K - 1], and which bags are labelled, [B, 1]."""
    z, present = widened(logits), labels != MISSING
    n_questions = z.shape[1]
    bits_of = torch.ones(n_questions + 1, n_questions, dtype=z.dtype, device=z.device).tril(-1)  # [y, k] = [y > k]
    # Looked up, not compared: a class that does not exist would pass for the last or the first.
    bits = F.embedding(torch.where(present, labels, 0), bits_of)
    return F.binary_cross_entropy_with_logits(z, bits, reduction="none"), present[:, None]
