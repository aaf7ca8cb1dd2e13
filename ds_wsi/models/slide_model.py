"""Encoder and aggregator as one module."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ds_wsi.models.encoder import IMAGENET_MEAN, IMAGENET_STD, NoEncoder
from ds_wsi.models.freezing import Untrained
from ds_wsi.models.output import SlideOutput
from ds_wsi.stacking.randomness import bag_draws
from ds_wsi.stacking.stacked_bags import StackedBags


class SlideModel(nn.Module):
    """Bags of tiles (or of features) to slide predictions, trained end to end.

    The encoder sees one bag at a time, so that train-mode BatchNorm has the bag as its population, as in training
    with batch size 1: a bag's gradient does not depend on what it was stacked with. An encoder whose forward says
    `encodes_stacks` (a partitioned one) is given the whole stack with its bounds, and treats bags as its policy says.

    Args:
        encoder: tiles [N, 3, S, S] -> features [N, D]; `NoEncoder` in a model of features.
        aggregator: StackedBags of features -> SlideOutput; one that says `needs_labels` is given the labels too.
        mean, std: of the channels in [0, 1], for uint8 tiles; floating tiles are taken as normalised.

    Attributes:
        warming_up: train the aggregator alone for now, the encoder in evaluation mode and without a graph. Its
            parameters keep `requires_grad`, which engines must not see change, and get gradients of zero. Set it before
            `train`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        aggregator: nn.Module,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.aggregator = aggregator
        self.warming_up = False
        # Not part of the weights: config.json holds them.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether no parameter of the encoder is trained, for now or at all."""
        return self.warming_up or not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> "SlideModel":
        """Set the mode; what is frozen of the encoder stays in evaluation mode, BatchNorm statistics included."""
        super().train(mode)
        if self.encoder_is_frozen:
            self.encoder.eval()
        for name in getattr(self.encoder, "frozen_parts", ()):
            self.encoder.get_submodule(name).eval()
        return self

    def forward(self, bags: StackedBags, labels: Tensor | None = None) -> SlideOutput:
        """Predict from tiles (uint8 or floating [sum N, 3, S, S]) or from features (floating [sum N, D]).

        Labels, int64 [B], change no prediction: with them an aggregator that needs them has its auxiliary loss.
        """
        if isinstance(self.encoder, NoEncoder):
            features = self.encoder(bags.values)
            return self.aggregate(bags.with_values(features.to(self.aggregator_dtype)), labels)
        if bags.values.dim() == 2:
            return self.aggregate(bags, labels)
        if getattr(self.encoder.forward, "encodes_stacks", False):
            # It knows the bags' bounds, normalises a chunk at a time, and never holds the stack's activations.
            with torch.no_grad() if self.encoder_is_frozen else nullcontext():
                features = self.encoder(bags.values, cu_seqlens=bags.cu_seqlens, prepare=self.normalise)
        else:
            parts = []
            for bag, tiles in enumerate(bags.split()):
                with bag_draws(bag, tiles.device):
                    parts.append(self.encode(tiles))
            features = torch.cat(parts)
        if self.warming_up and torch.is_grad_enabled():
            features = Untrained.apply(features, *(p for p in self.encoder.parameters() if p.requires_grad))
        return self.aggregate(bags.with_values(features), labels)

    def aggregate(self, bags: StackedBags, labels: Tensor | None = None) -> SlideOutput:
        """Predict from features (floating [sum N, D])."""
        if getattr(self.aggregator, "needs_labels", False):
            return self.aggregator(bags, labels)
        return self.aggregator(bags)

    def encode(self, tiles: Tensor) -> Tensor:
        """Features [N, D] of tiles [N, 3, S, S], in the dtype of the aggregator's parameters."""
        with torch.no_grad() if self.encoder_is_frozen else nullcontext():
            return self.encoder(self.normalise(tiles))

    def normalise(self, tiles: Tensor) -> Tensor:
        """uint8 tiles to the encoder's normalised input, on the tiles' device; floating tiles pass."""
        if tiles.dtype != torch.uint8:
            return tiles
        # Float32 first: in half precision x / 255 would round before the mean is taken off.
        scaled = (tiles.float() / 255 - self.mean.float()) / self.std.float()
        return scaled.to(self.aggregator_dtype)

    @property
    def aggregator_dtype(self) -> torch.dtype:
        """The dtype of the aggregator's parameters, which an engine in bf16 or fp16 has changed."""
        return next(self.aggregator.parameters()).dtype
