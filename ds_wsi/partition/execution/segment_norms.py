"""The norms of a segment across its chunks: statistics in forward, reductions and corrections in backward."""

import torch
from torch import Tensor, fx

from ds_wsi.partition.execution.aliases import CallTensors
from ds_wsi.partition.execution.gradients import GradientSums
from ds_wsi.partition.graph.norm import Statistics
from ds_wsi.partition.graph.segments import Chunk, Segment


class SegmentNorms:
    """The norms of one segment in one call, over the call's populations.

    Args:
        segment: the segment whose norms they are.
        populations: how many the call has.
        device: the device that computes.
        track_images: the tiles or images of the call, by which running statistics are updated; None: they stay.
        tensors: the call's parameters.
    """

    def __init__(
        self,
        segment: Segment,
        populations: int,
        device: torch.device,
        track_images: int | None,
        tensors: CallTensors,
    ) -> None:
        self.segment, self.device, self.track_images, self.tensors = segment, device, track_images, tensors
        self.statistics = [{norm: Statistics() for norm in segment.sites} for _ in range(populations)]

    def of(self, chunk: Chunk) -> dict[fx.Node, Statistics]:
        """The statistics of the population that a chunk belongs to."""
        return self.statistics[chunk.population]

    def collect(self, value: fx.Node, part: Tensor, chunk: Chunk) -> None:
        """Merge a chunk's part of `value` into the statistics of the norms that read it."""
        for norm in self.segment.norms_of.get(value, ()):
            with torch.no_grad():
                self.segment.sites[norm].collect(self.of(chunk)[norm], part.detach())

    def finish(self, inputs: list[fx.Node]) -> None:
        """Make final the statistics of the norms that read these values.

        One all-gather for each norm and population where ranks share the population.
        """
        for z in inputs:
            for norm in self.segment.norms_of.get(z, ()):
                for statistics in self.statistics:
                    self.segment.sites[norm].finish(statistics[norm], self.device)

    def track(self) -> None:
        """Update running statistics, once the forward is complete, as a loop over the populations would.

        In the order of execution, not of levels: of a norm that is used twice the last use counts most.
        """
        if self.track_images is None:
            return
        for statistics in self.statistics:
            for norm, site in self.segment.sites.items():
                site.track(statistics[norm], self.track_images)

    def affine(self, norms: list[fx.Node], chunk: Chunk) -> list[Tensor]:
        """Gamma and beta of each of these norms, as leaves of the chunk's graph: their gradients are for `reduce`."""
        return [part for norm in norms for part in self.segment.sites[norm].affine(self.of(chunk)[norm])]

    def reduce(self, norm: fx.Node, chunk: Chunk, dgamma: Tensor, dbeta: Tensor) -> None:
        """Add a chunk's two sums."""
        self.segment.sites[norm].reduce(self.of(chunk)[norm], dgamma, dbeta)

    def conclude(self, norms: list[fx.Node], sums: GradientSums) -> None:
        """Fix the corrections of these norms, the last one first, and sum their parameters' gradients.

        One all-reduce for each norm and population where ranks share the population.
        """
        for norm in reversed(norms):
            site = self.segment.sites[norm]
            for statistics in self.statistics:
                reached = site.group is not None or statistics[norm].dgamma is not None
                gradients = self.conclude_one(norm, statistics[norm])
                if site.batch and site.leaf.affine and reached:
                    for parameter, gradient in self.tensors.of_affine(site.leaf, gradients):
                        sums.add([parameter], [gradient], [gradient])

    def conclude_one(self, norm: fx.Node, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Fix the correction of one norm in one population; see `NormSite.conclude`."""
        return self.segment.sites[norm].conclude(statistics)

    def correct(self, norm: fx.Node, chunk: Chunk, z: Tensor, grad: Tensor) -> Tensor:
        """`grad`, which flows to a chunk's part z of a norm's input, with the norm's correction."""
        return self.segment.sites[norm].correct(self.of(chunk)[norm], z, grad)
