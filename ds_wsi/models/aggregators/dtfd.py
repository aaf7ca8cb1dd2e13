"""Double-tier pooling: attention over random parts of a bag, then over what they pass on.

Source: Zhang et al., "DTFD-MIL: Double-Tier Feature Distillation Multiple Instance Learning for Histopathology Whole
Slide Image Classification", CVPR 2022, section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.models.aggregators.gated_attention import GatedAttention, xavier_linears
from ds_wsi.models.output import SlideOutput
from ds_wsi.stacking.randomness import bag_draws, stack_bounds
from ds_wsi.stacking.segment_ops import (
    segment_ids,
    segment_mean,
    segment_softmax,
    segment_sum,
    segment_topk,
    widened,
)
from ds_wsi.stacking.stacked_bags import StackedBags, bounds_on, lengths_of

DISTILLATIONS = ("maxs", "maxmins", "afs")


class DTFD(nn.Module):
    """Pseudo-bags of h_k = ReLU(W x_k) are pooled by gated attention (tier 1), and pass features on to tier 2.

    What a pseudo-bag passes on: "afs" its pooled feature; "maxs" its instance of the highest score; "maxmins" those of
    the highest and of the lowest. A score is the last class's probability that tier 1's classifier gives a_k h_k. In
    training the split is random, drawn from torch's default generator bag by bag, in order; in evaluation instance k
    belongs to pseudo-bag k modulo their number, so that predictions repeat (the original draws there too).

    With labels the mean over the pseudo-bags of tier 1's cross-entropy is the auxiliary loss. The original gives each
    tier an optimizer; here both losses add up, as an encoder that is trained along needs one. Attention is tier 1's,
    times the weight that tier 2 gives its pseudo-bag ("afs": how much of the instance is in the bag's feature).

    Args:
        in_dim: width D of the features.
        num_classes: C.
        embed_dim: width D' of h.
        hidden_dim: width of either attention's hidden layer.
        pseudo_bags: how many a bag is split into; a bag with fewer instances has one for each.
        distillation: "maxs", "maxmins" or "afs".
        dropout: the share of either classifier's input that is dropped in training.

    Attributes:
        packed: bags of a stack are computed together: a pseudo-bag is a bag of a finer stack.
    """

    packed = True
    needs_labels = True

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 512,
        hidden_dim: int = 128,
        pseudo_bags: int = 4,
        distillation: str = "afs",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if distillation not in DISTILLATIONS:
            raise ValueError(f"distillation must be one of {', '.join(DISTILLATIONS)}, got {distillation!r}")
        if pseudo_bags < 1:
            raise ValueError(f"pseudo_bags must be >= 1, got {pseudo_bags}")
        self.pseudo_bags, self.distillation = pseudo_bags, distillation
        self.embedding = nn.Sequential(nn.Linear(in_dim, embed_dim, bias=False), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.attention_1 = GatedAttention(embed_dim, hidden_dim)
        self.classifier_1 = _ClassifierWithEvidence(embed_dim, num_classes)
        self.attention_2 = GatedAttention(embed_dim, hidden_dim)
        self.classifier_2 = nn.Linear(embed_dim, num_classes)
        xavier_linears(self)

    def forward(self, bags: StackedBags, labels: Tensor | None = None) -> SlideOutput:
        """Pool features [sum N, D] to logits [B, C] and attention [sum N]; with labels, the auxiliary loss too."""
        rows, instance_bounds, pseudo_bounds = self.split(bags.cu_seqlens)
        embedded = self.embedding(bags.values)[rows]
        within = segment_softmax(self.attention_1(embedded), instance_bounds)  # [sum N, 1]
        pooled = segment_sum(within * embedded, instance_bounds)  # [sum P, D']
        # One call for both, as a layer's weights may be there (ZeRO-3) in its own forward only.
        with stack_bounds(pseudo_bounds):
            dropped = self.dropout(pooled)
        judged = self.classifier_1(dropped, None if self.distillation == "afs" else embedded)
        guesses, evidence = judged.split([len(pooled), len(judged) - len(pooled)])
        passed_on, per_pseudo_bag = pooled, 1
        if self.distillation != "afs":
            chosen = self._choose(widened(evidence) * widened(within), instance_bounds)
            passed_on, per_pseudo_bag = embedded[chosen.flatten()], chosen.shape[1]
        bounds = pseudo_bounds * per_pseudo_bag
        across = segment_softmax(self.attention_2(passed_on), bounds)
        logits = self.classifier_2(self.dropout(segment_sum(across * passed_on, bounds)))
        shares = across.reshape(-1, per_pseudo_bag).sum(1)  # [sum P]
        attention = within.squeeze(1) * shares[segment_ids(instance_bounds, len(embedded))]
        loss = None
        if labels is not None:
            targets = labels[segment_ids(pseudo_bounds, len(pooled))]
            loss = segment_mean(F.cross_entropy(widened(guesses), targets, reduction="none"), pseudo_bounds)
        return SlideOutput(logits, attention[rows.argsort()], loss)

    def split(self, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split each bag into pseudo-bags whose sizes differ by one at most.

        Returns:
            The rows of the stack pseudo-bag by pseudo-bag, int64 [sum N]; the bounds of the pseudo-bags in them, int64
            [sum P + 1]; the bounds of the bags in the pseudo-bags, int64 [B + 1].
        """
        device = cu_seqlens.device
        rows: list[Tensor] = []
        sizes: list[int] = []
        counts: list[int] = []
        start = 0
        for bag, length in enumerate(lengths_of(cu_seqlens)):
            count = min(self.pseudo_bags, length)
            if self.training:
                with bag_draws(bag, device):
                    order = torch.randperm(length, device=device)
            else:
                order = torch.cat([torch.arange(first, length, count, device=device) for first in range(count)])
            rows.append(start + order)
            sizes += [length // count + (index < length % count) for index in range(count)]
            counts.append(count)
            start += length
        return torch.cat(rows), bounds_on(device, sizes), bounds_on(device, counts)

    def _choose(self, evidence: Tensor, bounds: Tensor) -> Tensor:
        """The instances that each pseudo-bag passes on, int64 [P, 1 or 2], by the evidence (a_k h_k) W^T [sum N, C]."""
        # The log-odds of the last class order as its probability does, and do not saturate.
        scores = evidence[:, -1] - evidence[:, :-1].logsumexp(1)
        highest, _ = segment_topk(scores, bounds, 1)
        if self.distillation == "maxs":
            return highest.unsqueeze(1)
        return torch.stack([highest, segment_topk(-scores, bounds, 1)[0]], 1)


class _ClassifierWithEvidence(nn.Linear):
    """Logits of pooled features [P, D'], and under them h_k W^T of instances [N, D'], without bias and gradient."""

    def forward(self, pooled: Tensor, instances: Tensor | None = None) -> Tensor:
        logits = super().forward(pooled)
        if instances is None:
            return logits
        with torch.no_grad():
            evidence = F.linear(instances, self.weight)
        return torch.cat([logits, evidence])
