"""Clustering-constrained attention: attention pooling with a loss that separates the most from the least attended.

Source: Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide images", Nature
Biomedical Engineering 2021, equations 1 and 2 (attention and pooling), and its instance-level clustering.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.models.aggregators.gated_attention import GatedAttention, xavier_linears
from ds_wsi.models.aggregators.pooled import PooledAggregator, attention_pool
from ds_wsi.models.output import SlideOutput
from ds_wsi.runtime.numerics import widened
from ds_wsi.stacking.segment_ops import segment_ids, segment_mean, segment_topk
from ds_wsi.stacking.stacked_bags import StackedBags

BAG_WEIGHT = 0.7  # of the bag's loss in the original's weighted mean; the instances' loss has the rest


class CLAMSB(PooledAggregator):
    """CLAM with a single branch: h_k = ReLU(W x_k), one gated attention, one classifier of the pooled bag.

    With labels the instance loss is the auxiliary loss: each class has a classifier of instances into evidence for the
    class and none. Of the bag's class, the k instances with most attention are its evidence and the k with least are
    not. With `subtyping` (classes exclude each other), those with most attention are no evidence of another class
    either, and the sum is divided by C. The original minimises 0.7 bag + 0.3 instance: weighted by 0.3 / 0.7 here, so
    that it is proportional to bag + auxiliary.

    Args:
        in_dim: width D of the features.
        num_classes: C.
        embed_dim: width D' of h.
        hidden_dim: width of the attention's hidden layer.
        k_sample: k; a bag with fewer instances gives all it has to either side.
        subtyping: see above.
        dropout: the share of h, and inside the attention, that is dropped in training.
    """

    needs_labels = True
    multi_branch = False

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 512,
        hidden_dim: int = 256,
        k_sample: int = 8,
        subtyping: bool = False,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.num_classes, self.k_sample, self.subtyping = num_classes, k_sample, subtyping
        self.embedding = nn.Sequential(nn.Linear(in_dim, embed_dim), nn.ReLU(), nn.Dropout(dropout))
        self.attention = GatedAttention(embed_dim, hidden_dim, num_classes if self.multi_branch else 1, dropout)
        # One layer for all classes, so that a stack takes one call: pairs (no evidence, evidence) of each.
        self.instance_classifier = nn.Linear(embed_dim, 2 * num_classes)
        self._build_classifier(embed_dim)
        xavier_linears(self)
        # As if each class had a layer of its own: Xavier's deviation depends on the number of outputs.
        for pair in self.instance_classifier.weight.detach().split(2):
            nn.init.xavier_normal_(pair)

    def _build_classifier(self, embed_dim: int) -> None:
        self.classifier = nn.Linear(embed_dim, self.num_classes)

    def embed(self, features: Tensor) -> Tensor:
        """Features [N, D] to h [N, D']."""
        return self.embedding(features)

    def scores(self, embedded: Tensor) -> Tensor:
        """Attention scores before the softmax: [N, 1], or [N, C] of the multi-branch form."""
        return self.attention(embedded)

    def head(self, pooled: Tensor) -> Tensor:
        """Logits [B, C] of pooled bags [B, 1, D']."""
        return self.classifier(pooled.squeeze(1))

    def forward(self, bags: StackedBags, labels: Tensor | None = None) -> SlideOutput:
        """Pool features [sum N, D]; with labels int64 [B], the auxiliary loss too."""
        embedded = self.embed(bags.values)
        scores = self.scores(embedded)
        attention, pooled = attention_pool(embedded, scores, bags.cu_seqlens)
        loss = None if labels is None else self.instance_loss(embedded, scores, bags.cu_seqlens, labels)
        return SlideOutput(self.head(pooled), attention.squeeze(-1), loss)

    def candidates(self, scores: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Rows of a part of the bags that the instance loss could choose: int64, sorted.

        The k best of a whole bag are among the k best of each of its parts: with the candidates of all parts
        `instance_loss` is that of the whole.
        """
        signed = [sign * branch for branch in scores.unbind(1) for sign in (1, -1)]
        return torch.cat([segment_topk(one, cu_seqlens, self.k_sample)[0] for one in signed]).unique()

    def instance_loss(self, embedded: Tensor, scores: Tensor, cu_seqlens: Tensor, labels: Tensor) -> Tensor:
        """The weighted clustering loss of each bag, [B], from scores rather than attention: no ties by rounding."""
        bag_labels = labels[segment_ids(cu_seqlens, len(embedded))]
        class_scores = scores.gather(1, bag_labels.unsqueeze(1)).squeeze(1) if self.multi_branch else scores[:, 0]
        top, bounds = segment_topk(class_scores, cu_seqlens, self.k_sample)
        bottom, _ = segment_topk(-class_scores, cu_seqlens, self.k_sample)
        samples = [(top, bag_labels[top], True), (bottom, bag_labels[bottom], False)]
        if self.subtyping:
            for step in range(1, self.num_classes):
                others = (bag_labels + step) % self.num_classes
                if self.multi_branch:
                    scores_of_others = scores.gather(1, others.unsqueeze(1)).squeeze(1)
                    top, _ = segment_topk(scores_of_others, cu_seqlens, self.k_sample)
                samples.append((top, others[top], False))
        logits = self.instance_classifier(embedded[torch.cat([rows for rows, _, _ in samples])])
        pairs = widened(logits).unflatten(1, (self.num_classes, 2))
        margins = (pairs[..., 1] - pairs[..., 0]).gather(1, torch.cat([classes for _, classes, _ in samples])[:, None])
        losses = [
            # The smooth top-1 SVM loss of two classes, at temperature and margin 1.
            segment_mean(F.softplus(1 - margin if evidence else 1 + margin), bounds)
            for margin, (_, _, evidence) in zip(margins.squeeze(1).split(len(top)), samples, strict=True)
        ]
        own_class = (losses[0] + losses[1]) / 2  # one mean over its 2k instances
        total = torch.stack([own_class, *losses[2:]]).sum(0) / (self.num_classes if self.subtyping else 1)
        return total * ((1 - BAG_WEIGHT) / BAG_WEIGHT)


class CLAMMB(CLAMSB):
    """CLAM with a branch for each class: an attention and a classifier [1 x D'] each; attention is [sum N, C]."""

    multi_branch = True

    def _build_classifier(self, embed_dim: int) -> None:
        self.classifiers = nn.ModuleList(nn.Linear(embed_dim, 1) for _ in range(self.num_classes))

    def head(self, pooled: Tensor) -> Tensor:
        """Logits [B, C] of pooled bags [B, C, D']: each class from its own branch."""
        branches = zip(self.classifiers, pooled.unbind(1), strict=True)
        return torch.cat([classifier(branch) for classifier, branch in branches], 1)
