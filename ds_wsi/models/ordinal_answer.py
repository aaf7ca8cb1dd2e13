"""The numbers that CORAL and the cumulative link train beside an aggregator's score."""

import torch
from torch import Tensor, nn

from ds_wsi.runtime.numerics import widened
from ds_wsi.targets.ordinal import coral_biases, coral_logits, initial_link
from ds_wsi.targets.several import AnyTask, SeveralTargets

_WITH_NUMBERS = ("coral", "link")


class OrdinalAnswer(nn.Module):
    """Outputs of one score per bag.

    CORAL's are the logits [B, K - 1] of "above k". The link's are [B, K]: the score, then the raw numbers of the cuts,
    the same in each row, so that the loss has both with their graph.

    Args:
        loss: "coral" or "link".
        n_classes: K.
    """

    def __init__(self, loss: str, n_classes: int) -> None:
        super().__init__()
        assert loss in ("coral", "link"), loss
        self.loss = loss
        self.numbers = nn.Parameter(coral_biases(n_classes) if loss == "coral" else initial_link(n_classes))

    def forward(self, scores: Tensor) -> Tensor:
        """Outputs of scores [B, 1]."""
        if self.loss == "coral":
            return coral_logits(scores, self.numbers)
        wide = widened(scores)
        return torch.cat([wide, self.numbers.to(wide).expand(len(wide), -1)], dim=1)


class SeveralAnswers(nn.Module):
    """Outputs of several targets side by side: those of CORAL and of the link from their score, others as they are.

    Args:
        targets: the model's.
    """

    def __init__(self, targets: SeveralTargets) -> None:
        super().__init__()
        self.scores = [part.scores for part in targets.parts]
        answers = [answer_of(part.task) for part in targets.parts]
        self.parts = nn.ModuleList(nn.Identity() if answer is None else answer for answer in answers)

    def forward(self, scores: Tensor) -> Tensor:
        """Outputs of scores [B, aggregator's outputs]."""
        wide = widened(scores)
        return torch.cat([part(wide[:, columns]) for part, columns in zip(self.parts, self.scores, strict=True)], dim=1)


def answer_of(task: AnyTask | None) -> nn.Module | None:
    """What a task's model needs beside its aggregator."""
    if isinstance(task, SeveralTargets):
        return SeveralAnswers(task) if any(part.loss in _WITH_NUMBERS for part in task.tasks) else None
    if task is None or task.loss not in _WITH_NUMBERS:
        return None
    return OrdinalAnswer(task.loss, len(task.classes))
