"""What a part of the house may say of itself, by attribute, to those that do not know its class.

An aggregator or an encoder is any module, a user's own too: one that says nothing is asked nothing.
`isinstance(aggregator, NeedsLabels)` is whether it says something, `aggregator.needs_labels` is what; `needs_labels`
and `encodes_stacks` ask both.

[Note: as it answers] A part is asked through its own `__getattr__`: there a module has its submodules, and a wrapper
(`torch.compile`'s, PEFT's) what it wraps. From Python 3.12 on `typing.runtime_checkable` alone looks past it, so the
metaclass asks.
"""

from abc import ABCMeta
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    _ProtocolMeta = ABCMeta
else:
    _ProtocolMeta = type(Protocol)


class _AsItAnswers(_ProtocolMeta):
    """A contract asks an object for every name that it annotates, as [Note: as it answers] says."""

    def __instancecheck__(cls, instance: object) -> bool:  # noqa: N805
        return all(hasattr(instance, name) for name in cls.__annotations__)


@runtime_checkable
class EncodesStacks(Protocol, metaclass=_AsItAnswers):
    """A forward of an encoder: whether it takes a whole stack of bags, with `cu_seqlens` and `prepare`."""

    encodes_stacks: bool


@runtime_checkable
class TakesHostTiles(Protocol, metaclass=_AsItAnswers):
    """A forward of an encoder: whether the stack may lie in host memory."""

    takes_host_tiles: bool


@runtime_checkable
class OfModule(Protocol, metaclass=_AsItAnswers):
    """A forward: the module that it was made for; a shallow copy of the module has the same forward."""

    module: nn.Module


@runtime_checkable
class PartlyFrozen(Protocol, metaclass=_AsItAnswers):
    """An encoder: names of the submodules that stay in evaluation mode, see `keep_in_eval`."""

    frozen_parts: Sequence[str]


@runtime_checkable
class SaysWeights(Protocol, metaclass=_AsItAnswers):
    """What builds an encoder of the user's own: whether that starts from weights."""

    has_weights: bool


@runtime_checkable
class NeedsLabels(Protocol, metaclass=_AsItAnswers):
    """An aggregator, or its class: whether it takes the labels too, for an auxiliary loss over classes."""

    needs_labels: bool


@runtime_checkable
class Pools(Protocol, metaclass=_AsItAnswers):
    """An aggregator: "attention", "mean" or "max" over a bag's instances, by its `embed`, `scores` and `head`."""

    pooling: str


@runtime_checkable
class Packs(Protocol, metaclass=_AsItAnswers):
    """An aggregator: whether it computes the bags of a stack together; False is one after another."""

    packed: bool


@runtime_checkable
class Orders(Protocol, metaclass=_AsItAnswers):
    """An aggregator, or its class: whether it takes a bag's order for the tiles' places on one slide."""

    order_matters: bool


@runtime_checkable
class HasEncoder(Protocol, metaclass=_AsItAnswers):
    """A model: its part that turns tiles into features."""

    encoder: nn.Module


@runtime_checkable
class HasAggregator(Protocol, metaclass=_AsItAnswers):
    """A model: its part that turns a slide's features into its prediction."""

    aggregator: nn.Module


@runtime_checkable
class SaysNorms(Protocol, metaclass=_AsItAnswers):
    """A model: what its norms average over, see `SlideModel.set_norms`."""

    norm_training: str
    norm_evaluation: str


@runtime_checkable
class HasLengths(Protocol, metaclass=_AsItAnswers):
    """A data set of bags: the instances of each."""

    lengths: Sequence[int]


@runtime_checkable
class PreparesAt(Protocol, metaclass=_AsItAnswers):
    """What prepares chunks of tiles on the device: `at(part, first)`, where it must know the chunk's first tile."""

    at: Callable[[Tensor, int], Tensor]


@runtime_checkable
class CountsBytes(Protocol, metaclass=_AsItAnswers):
    """A communication hook's state: a `ds_wsi.compression.meter.ByteCount` of what it sent, or another's attribute."""

    count: Any


def encodes_stacks(forward: object) -> bool:
    """Whether a forward of an encoder takes a whole stack of bags; False where it says nothing."""
    return isinstance(forward, EncodesStacks) and bool(forward.encodes_stacks)


def needs_labels(aggregator: object) -> bool:
    """Whether an aggregator, or its class, takes the labels too; False where it says nothing."""
    return isinstance(aggregator, NeedsLabels) and bool(aggregator.needs_labels)


def order_matters(aggregator: object) -> bool:
    """Whether an aggregator, or its class, takes the order of a bag for places on a slide; False where it says not."""
    return isinstance(aggregator, Orders) and bool(aggregator.order_matters)
