"""Encoder and aggregator as one module."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.models.encoder import IMAGENET_MEAN, IMAGENET_STD, NoEncoder
from ds_wsi.models.freezing import Untrained
from ds_wsi.models.output import SlideOutput
from ds_wsi.norms.policy import EVALUATION, TRAINING
from ds_wsi.norms.population import takes_population
from ds_wsi.norms.roles import batch_norms, is_shared, named_batch_norms, normalise_with, set_evaluated
from ds_wsi.runtime.contracts import PartlyFrozen, encodes_stacks, needs_labels
from ds_wsi.runtime.log import logger
from ds_wsi.stacking.host_tiles import HostTiles, PreparedTiles
from ds_wsi.stacking.randomness import bag_draws
from ds_wsi.stacking.stacked_bags import StackedBags


class SlideModel(nn.Module):
    """Bags of tiles (or of features) to slide predictions, trained end to end.

    What the encoder's BatchNorm averages over is said by `set_norms`. At first that is each bag by itself: the encoder
    sees one bag at a time, and a bag's gradient does not depend on what it was stacked with; in evaluation running
    statistics, which are another model's then (docs/batchnorm.md). An encoder whose forward says `encodes_stacks` (a
    partitioned one) is given the whole stack, with its bounds where bags are populations.

    Args:
        encoder: tiles [N, 3, S, S] -> features [N, D]; `NoEncoder` in a model of features.
        aggregator: StackedBags of features -> SlideOutput; one that says `needs_labels` is given the labels too.
        mean, std: the channels' statistics in [0, 1], for uint8 tiles; floating tiles are taken as normalised.
        answer: what makes of the aggregator's outputs [B, ...] the model's, with parameters of its own; None: nothing.
        scale_embedding: what maps the magnification of each tile, int64 [N], to what is added to its features [N, D];
            None adds nothing.

    Attributes:
        warming_up: train the aggregator alone for now, the encoder in evaluation mode and without a graph. Its
            parameters keep `requires_grad`, which engines must not see change, and get gradients of zero. Set it before
            `train`.
        memory_format: the order in memory of the encoder's input; None leaves tiles as they were read.
        norms_from: what said what the norms average over: None where nothing did, "set_norms", or "config.json" of the
            folder that the weights came from.
        tells_features: give the output the features that the aggregator was given.
        evaluation_precision: what `ds_wsi.evaluation` lets the encoder compute in, one of `PRECISIONS`; "no" is the
            weights' own.
    """

    mean: Tensor
    std: Tensor
    evaluation_precision = "no"
    memory_format: torch.memory_format | None = None
    norm_training = "bag"
    norm_evaluation = "running"
    norms_from: str | None = None
    _given_fixed: frozenset[str] = frozenset()
    _fixed: frozenset[str] = frozenset()
    tells_features = False
    _idle = _told_other_norms = False

    def __init__(
        self,
        encoder: nn.Module,
        aggregator: nn.Module,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        answer: nn.Module | None = None,
        scale_embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.aggregator = aggregator
        self.answer = answer
        self.scale_embedding = scale_embedding
        self.warming_up = False
        # Not part of the weights: config.json holds them.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether no parameter of the encoder is trained, for now or at all."""
        return self.warming_up or not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def set_norms(
        self, training: str | None = None, evaluation: str | None = None, fixed: Iterable[str] | None = None
    ) -> "SlideModel":
        """Say what the encoder's BatchNorm averages over, from now on; None leaves it as it is.

        Args:
            training: "bag", "stack", "step" or "frozen" of a `NormPolicy`. "stack" and "step" encode a call's bags
                together; for "step" the caller hands over all bags of the step in one call, and shares the norms among
                the ranks (`ds_wsi.norms.shared.share_norms`).
            evaluation: "running" or "bag"; "recalibrated" is "running", of the statistics that the weights came with.
                The model's `eval` sets it: the encoder's own takes running statistics, whatever was said.
            fixed: names of norms of the encoder that keep their running statistics in every mode.

        Raises:
            ValueError: `fixed` names no norm of the encoder.
        """
        if training is not None:
            assert training in TRAINING[1:], training
            self.norm_training, self.norms_from = training, "set_norms"
        if evaluation is not None:
            assert evaluation in EVALUATION[1:], evaluation
            self.norm_evaluation = evaluation
        if fixed is not None:
            self._given_fixed = frozenset(fixed)
            unknown = sorted(self._given_fixed - set(named_batch_norms(self.encoder)))
            if unknown:
                raise ValueError(
                    f"fixed norms must be BatchNorms of {type(self.encoder).__name__}, got {unknown[0]!r}. "
                    "HINT: ds_wsi.norms.named_batch_norms(encoder) has their names."
                )
            self._fixed = self._given_fixed
        return self.train(self.training)

    @property
    def fixed_norms(self) -> tuple[str, ...]:
        """Names of the encoder's norms that were in evaluation mode while the others trained, or were given as such.

        They are no part of what is averaged over, in evaluation either: with a slide's own statistics, or with running
        ones that are taken anew, they would be others than those that were trained.
        """
        return tuple(name for name in named_batch_norms(self.encoder) if name in self._fixed)

    @property
    def population_norms(self) -> list[Any]:
        """The encoder's other norms: those that average over a population where they are asked to."""
        return [norm for name, norm in named_batch_norms(self.encoder).items() if name not in self._fixed]

    def train(self, mode: bool = True) -> "SlideModel":
        """Set the mode; what is frozen of the encoder stays in evaluation mode, BatchNorm statistics included.

        In training mode it is noted which norms stay behind by themselves: see `fixed_norms`.
        """
        super().train(mode)
        for name in self.encoder.frozen_parts if isinstance(self.encoder, PartlyFrozen) else ():
            self.encoder.get_submodule(name).eval()
        norms = named_batch_norms(self.encoder)
        if mode and not self._told_other_norms:
            self._tell_other_norms()
        if mode:  # before the encoder as a whole rests: what it says of its norms is no matter of an epoch
            self._fixed = self._given_fixed | {name for name, norm in norms.items() if not norm.training}
        if self.encoder_is_frozen:
            self.encoder.eval()
        set_evaluated(norms.values(), not mode)
        for name, norm in norms.items():
            if not mode:
                averages = self.norm_evaluation == "bag" and name not in self._fixed
                normalise_with(norm, "own" if averages else "running")
            else:
                frozen = self.norm_training == "frozen" or not norm.training or name in self._fixed
                normalise_with(norm, "running" if frozen else "tracked")
        return self

    def _tell_other_norms(self) -> None:
        """Say once that the aggregator has norms, which no policy reaches: no aggregator of the papers has."""
        self._told_other_norms = True
        names = list(named_batch_norms(self.aggregator))
        if names:
            logger.warning(
                "BatchNorm in the aggregator %s (%s) is outside of the norm policy: it averages over the rows of a "
                "call in training, and takes running statistics in evaluation, which is another model where a call has "
                "few slides. HINT: LayerNorm.",
                *(type(self.aggregator).__name__, ", ".join(names[:5])),
            )

    @property
    def _is_one_population(self) -> bool:
        """Whether the bags of a call are encoded together."""
        if not self.training or self.norm_training not in ("stack", "step"):
            return False
        return any(takes_population(norm) for norm in batch_norms(self.encoder))

    @contextmanager
    def idling(self) -> Iterator[None]:
        """Let a process without a bag take part in the others' collectives: it is given one blank instance.

        Nothing is drawn, and no running statistic moves but for those of a population that the ranks share: there the
        encoder is called with no tile.
        """
        modes = [(part, part.training) for part in self.modules()]
        joins = self._is_one_population and is_shared(self.encoder)
        if joins:
            self.aggregator.eval()
        else:
            self.eval()
            for norm in batch_norms(self.encoder):  # one blank tile has no statistics of its own
                normalise_with(norm, "running")
        self._idle = joins
        try:
            yield
        finally:
            self._idle = False
            self.train(dict(modes)[self])
            for part, training in modes:
                part.training = training

    def forward(self, bags: StackedBags, labels: Tensor | None = None, scales: Tensor | None = None) -> SlideOutput:
        """Predict from tiles (uint8 or floating [sum N, 3, S, S]); without an encoder from features [sum N, D].

        Labels, int64 [B], change no prediction: with them an aggregator that needs them has its auxiliary loss. Scales,
        int64 [sum N], are the tiles' magnifications, the finest 0, for a model with an embedding of them.

        Raises:
            ValueError: features for a model with an encoder, or tiles for one without.
        """
        if isinstance(self.encoder, NoEncoder):
            features = self.encoder(bags.values)
            return self.aggregate(bags.with_values(features.to(self.aggregator_dtype)), labels, scales)
        if bags.values.dim() != 4:
            raise ValueError(
                f"a model with an encoder must be given tiles [sum N, 3, S, S], got {list(bags.values.shape)}. "
                "HINT: model.aggregate(bags) takes features that are there; build the model with NoEncoder(D) to "
                "train on them."
            )
        if self._idle:
            nothing = self._encode_stack(StackedBags(bags.values[:0], bags.cu_seqlens[:1]))
            blank = nothing.new_zeros(len(bags.values), nothing.shape[1]) + nothing.sum() * 0.0
            return self.aggregate(bags.with_values(blank), labels, scales)
        features = self._encode_stack(bags)
        if self.warming_up and torch.is_grad_enabled():
            features = Untrained.apply(features, *(p for p in self.encoder.parameters() if p.requires_grad))
        output = self.aggregate(bags.with_values(features), labels, scales)
        return output._replace(features=features) if self.tells_features else output

    def _encode_stack(self, bags: StackedBags) -> Tensor:
        """Features [sum N, D] of a stack of tiles."""
        together = self._is_one_population
        if encodes_stacks(self.encoder.forward):
            # It knows the bags' bounds, normalises a chunk at a time, and never holds the stack's activations.
            bounds = None if together else bags.cu_seqlens
            tiles, prepare = bags.values, self.normalise
            if isinstance(tiles, HostTiles):
                tiles, prepare = tiles.tiles, PreparedTiles(tiles, self.normalise)
            with torch.no_grad() if self.encoder_is_frozen else nullcontext():
                return self.encoder(tiles, cu_seqlens=bounds, prepare=prepare)
        if together:
            return self.encode(bags.values)
        parts = []
        for bag, tiles in enumerate(bags.split()):
            with bag_draws(bag, tiles.device):
                parts.append(self.encode(tiles))
        return torch.cat(parts)

    def aggregate(self, bags: StackedBags, labels: Tensor | None = None, scales: Tensor | None = None) -> SlideOutput:
        """Predict from features (floating [sum N, D]); see `forward`.

        Raises:
            ValueError: no scales for a model with an embedding of them.
        """
        if self.scale_embedding is not None:
            if scales is None:
                raise ValueError(
                    "a model with a scale embedding must be given the magnification of each tile, got none. HINT: "
                    "model(bags, scales=...), int64 [sum N], the finest 0."
                )
            bags = bags.with_values(bags.values + self.scale_embedding(scales).to(bags.values.dtype))
        output: SlideOutput = self.aggregator(bags, labels) if needs_labels(self.aggregator) else self.aggregator(bags)
        return output if self.answer is None else output._replace(logits=self.answer(output.logits))

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
        if self.memory_format is None:
            return scaled.to(self.aggregator_dtype)
        return scaled.to(self.aggregator_dtype, memory_format=self.memory_format)

    @property
    def aggregator_dtype(self) -> torch.dtype:
        """The dtype of the aggregator's parameters, which an engine in bf16 or fp16 has changed."""
        return next(self.aggregator.parameters()).dtype
