"""Tiles through an encoder without a gradient, with running statistics, a slide's own, or those of many slides."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.bags.bag import BagPart, read_chunks
from ds_wsi.bags.joined import Grids
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.models.slide_model import SlideModel
from ds_wsi.norms.passes import encode_population, fits_in_one_chunk, recalibrate
from ds_wsi.norms.roles import batch_norms, named_batch_norms
from ds_wsi.runtime.contracts import encodes_stacks
from ds_wsi.runtime.memory import free_bytes, free_host_bytes
from ds_wsi.runtime.numerics import autocast_to
from ds_wsi.runtime.signals import asked

_HOST_SHARE = 4  # one byte in so many of the host's free ones holds a slide's tiles


Order = Sequence[int | BagPart]
Chunks = Callable[[], Iterable[Tensor]]


class HeldTiles:
    """Tiles in host memory, or, where they do not fit there, read again each time.

    Args:
        slides, grids: the cohort's, row by row.
        policy: how tiles are read.

    Attributes:
        chunks: uint8 [n, 3, S, S] each; None where they are read again.
        count: the number of tiles.
        first: one of them [1, 3, S, S], or a chunk without any.
    """

    def __init__(
        self,
        slides: Sequence[SlideEntry],
        grids: Grids,
        policy: ReadPolicy,
    ) -> None:
        self.slides, self.grids, self.policy = slides, grids, policy
        self.limit_bytes = free_host_bytes() // _HOST_SHARE
        self.chunks: list[Tensor] | None = []
        self.count, self.held_bytes = 0, 0
        self.first: Tensor | None = None

    def add(self, tiles: Tensor) -> None:
        """Another chunk, uint8 [n, 3, S, S]."""
        self.count += len(tiles)
        self.held_bytes += tiles.nbytes
        if self.first is None or not len(self.first):
            self.first = tiles[:1]
        if self.held_bytes > self.limit_bytes:
            self.chunks = None
        if self.chunks is not None and len(tiles):
            self.chunks.append(tiles)

    def clear(self) -> None:
        """Forget the slide; called before another one."""
        self.chunks, self.count, self.held_bytes, self.first = [], 0, 0, None

    def read(self, order: Order) -> Iterator[Tensor]:
        """The chunks that were added, of these slides or parts; one at least, perhaps without a tile.

        Raises:
            RuntimeError: other tiles could be read this time than before.
        """
        if self.chunks is not None:
            yield from self.chunks or ([] if self.first is None else [self.first])
            return
        n_tiles = 0
        for chunk in read_chunks(self.slides, self.grids, order, self.policy):
            n_tiles += len(chunk.tiles)
            if len(chunk.tiles):
                yield chunk.tiles
            if asked():
                return
        if n_tiles != self.count:
            names = ", ".join(self.slides[item.slide if isinstance(item, BagPart) else item].slide_id for item in order)
            raise RuntimeError(
                f"slides must be read alike each time, got {n_tiles} tiles after {self.count} ({names[:200]}). "
                "HINT: replace the files, or their drive."
            )


class TileEncoder:
    """An evaluating model's encoder, a chunk of tiles on the host at a time: uint8 [n, 3, S, S] -> [n, D] on the host.

    The encoder alone computes in the model's `evaluation_precision`; features are of the weights' dtype in any.

    Args:
        model: a model in evaluation mode, with running statistics.
    """

    def __init__(self, model: SlideModel) -> None:
        self.model = model
        self.device, self.dtype = next(model.parameters()).device, model.aggregator_dtype

    def __call__(self, tiles: Tensor) -> Tensor:
        """See the class."""
        with autocast_to(self.model.evaluation_precision, self.device):
            features = self.model.encode(tiles.to(self.device, non_blocking=True))
        # Widened on the host: in half precision half as much is copied.
        return features.cpu() if self.model.evaluation_precision == "no" else features.cpu().to(self.dtype)

    def norms_over_tiles(self, evaluation: str) -> list[nn.Module]:
        """The norms that average over a slide's tiles in this evaluation; those without running statistics in all."""
        of_bags = self.model.population_norms if evaluation == "bag" else []
        return [norm for norm in batch_norms(self.model.encoder) if norm in of_bags or norm.running_mean is None]

    @contextmanager
    def statistics(self, values: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Take other running statistics meanwhile, by their names in the encoder's state_dict."""
        if values is None:
            yield
            return
        state = self.model.encoder.state_dict(keep_vars=True)
        before = {name: state[name].detach().clone() for name in values}
        _copy(state, values)
        try:
            yield
        finally:
            _copy(state, before)

    def over_all(self, tiles: HeldTiles, order: Order, norms: Sequence[nn.Module]) -> list[Tensor]:
        """Features of all tiles that were held of `order`, which these norms average over, as one population."""
        one_chunk = tiles.chunks is not None and self._fit(tiles.first, tiles.count)
        whole = [torch.cat(list(tiles.read(order)))] if one_chunk else []
        chunks: Chunks = (lambda: whole) if one_chunk else (lambda: tiles.read(order))
        with _as_one_call(self.model.encoder):
            features, _ = encode_population(self, chunks, norms, one_chunk=one_chunk)
        return features

    def together(self, bags: Sequence[Tensor]) -> list[Tensor]:
        """Features of each of these bags, all of which the norms average over as one population."""
        one_chunk = self._fit(bags[0], sum(map(len, bags)))
        chunks = [torch.cat(list(bags))] if one_chunk else bags
        with _as_one_call(self.model.encoder):
            norms = self.norms_over_tiles("bag")
            features, _ = encode_population(self, lambda: chunks, norms, one_chunk=one_chunk)
        return list(features[0].split([len(bag) for bag in bags])) if one_chunk else features

    def recalibrated(self, tiles: HeldTiles, order: Order, group: Any = None) -> dict[str, Tensor]:
        """Running statistics over all these tiles, by their names in the encoder's state_dict; it keeps its own.

        They are of the norms that average over a population in training.

        Args:
            tiles: what was held of `order`; each rank of the group has its own, one chunk at least.
            order: what they were read from.
            group: the ranks that share the population, see `encode_population`.
        """
        state = self.model.encoder.state_dict(keep_vars=True)
        norms = [norm for norm in self.model.population_norms if norm.running_mean is not None]
        names = statistics_names(self.model.encoder, norms)
        before = {name: state[name].detach().clone() for name in names}
        one_chunk = self._all_fit(tiles, group)
        whole = [torch.cat(list(tiles.read(order)))] if one_chunk else []
        chunks: Chunks = (lambda: whole) if one_chunk else (lambda: tiles.read(order))
        try:
            with _as_one_call(self.model.encoder):
                recalibrate(norms, self, chunks, group=group, one_chunk=one_chunk)
            return {name: state[name].detach().cpu().clone() for name in names}
        finally:
            _copy(state, before)

    def _fit(self, tile: Tensor | None, count: int) -> bool:
        if tile is None or not len(tile):
            return True
        with _as_one_call(self.model.encoder):
            return fits_in_one_chunk(self.model.encoder, self, tile[:1], count, free_bytes(self.device))

    def _all_fit(self, tiles: HeldTiles, group: Any) -> bool:
        """Whether every rank's tiles fit at once: all take the same passes. One all-reduce of one number."""
        fits = tiles.chunks is not None and self._fit(tiles.first, tiles.count)
        if group is None:
            return fits
        answer = torch.tensor([float(fits)], device=self.device)
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN, group=group)
        return bool(answer.item())


@contextmanager
def _as_one_call(encoder: nn.Module) -> Iterator[None]:
    """Let parts of the encoder that compute in chunks of their own run as they are: passes stop at a norm's call."""
    forwards: list[tuple[nn.Module, Any]] = [(part, part.__dict__.get("forward")) for part in encoder.modules()]
    lifted: list[tuple[nn.Module, Any]] = [(part, forward) for part, forward in forwards if encodes_stacks(forward)]
    for part, forward in lifted:
        part.forward = forward.original
    try:
        yield
    finally:
        for part, forward in lifted:
            part.forward = forward


def statistics_names(encoder: nn.Module, norms: Sequence[nn.Module]) -> list[str]:
    """The names of these norms' running means and variances in the encoder's state_dict."""
    return [
        f"{name}.{leaf}" if name else leaf
        for name, norm in named_batch_norms(encoder).items()
        if norm in norms
        for leaf in ("running_mean", "running_var")
    ]


@torch.no_grad()
def _copy(state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        state[name].copy_(value)
