"""Dual-stream pooling: instances attend to the one that most looks like the class.

Source: Li, Li, Eliceiri, "Dual-stream Multiple Instance Learning Network for Whole Slide Image Classification with
Self-supervised Contrastive Learning", CVPR 2021, section 3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.models.output import SlideOutput
from ds_wsi.runtime.numerics import widened
from ds_wsi.stacking.segment_ops import segment_ids, segment_softmax, segment_sum, segment_topk
from ds_wsi.stacking.stacked_bags import StackedBags


class DSMIL(nn.Module):
    """Critical instance m = argmax_k c(x_k) of each class; a_k = softmax_k(q_k . q_m / sqrt(Q)); z = sum_k a_k x_k.

    All classes' z together give the logits. They are those of the attention stream alone, and with labels the
    cross-entropy of the critical instances' scores is the auxiliary loss: the original minimises the mean of the two,
    which is proportional to their sum.

    Args:
        in_dim: width D of the features.
        num_classes: C.
        query_dim: width Q of the queries.
        dropout: the share of z that is dropped in training.

    Attributes:
        packed: bags of a stack are computed together.
    """

    packed = True
    needs_labels = True

    def __init__(self, in_dim: int, num_classes: int, query_dim: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_classes, self.scale = num_classes, query_dim**-0.5
        self.instance_classifier = nn.Linear(in_dim, num_classes)
        self.query = nn.Sequential(nn.Linear(in_dim, query_dim), nn.ReLU(), nn.Linear(query_dim, query_dim), nn.Tanh())
        self.dropout = nn.Dropout(dropout)
        # The original's convolution over the whole width, from C channels to C: this is that linear map.
        self.classifier = nn.Linear(num_classes * in_dim, num_classes)

    def forward(self, bags: StackedBags, labels: Tensor | None = None) -> SlideOutput:
        """Pool features [sum N, D] to logits [B, C] and attention [sum N, C]; with labels, the auxiliary loss too."""
        instance_logits, queries = self.instance_classifier(bags.values), self.query(bags.values)
        ids = segment_ids(bags.cu_seqlens, len(bags.values))
        attention, pooled, largest = [], [], []
        for class_logits in instance_logits.unbind(1):
            critical, _ = segment_topk(class_logits, bags.cu_seqlens, 1)  # [B]
            largest.append(class_logits[critical])
            scores = (queries * queries[critical][ids]).sum(1) * self.scale
            attention.append(segment_softmax(scores, bags.cu_seqlens))
            pooled.append(segment_sum(attention[-1].unsqueeze(1) * bags.values, bags.cu_seqlens))
        logits = self.classifier(self.dropout(torch.cat(pooled, 1)))
        loss = None
        if labels is not None:
            critical_logits = torch.stack(largest, 1)
            loss = F.cross_entropy(widened(critical_logits), labels, reduction="none")
        return SlideOutput(logits, torch.stack(attention, 1), loss)
