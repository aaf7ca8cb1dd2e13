"""A part is asked what it says of itself as it answers: a user's module, a wrapper of it, a class, a bound method."""

import pytest
from torch import nn

from ds_wsi.models import AGGREGATORS, SlideModel
from ds_wsi.models.aggregators.pooled import PooledAggregator
from ds_wsi.models.freezing import keep_in_eval
from ds_wsi.runtime.contracts import (
    EncodesStacks,
    HasAggregator,
    HasEncoder,
    NeedsLabels,
    Packs,
    PartlyFrozen,
    Pools,
    SaysNorms,
)


class OneOfTheUser(nn.Module):
    """Says that it needs labels, and encodes stacks by an attribute of its method."""

    needs_labels = True

    def forward(self, bags):
        return bags

    forward.encodes_stacks = True


class Wrapper(nn.Module):
    """Answers for what it wraps, as torch.compile's and PEFT's do."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)


USERS = OneOfTheUser()


@pytest.mark.parametrize("part", [USERS, OneOfTheUser, Wrapper(USERS), Wrapper(Wrapper(USERS))])
def test_whoever_says_it_is_heard(part):
    assert isinstance(part, NeedsLabels)
    assert part.needs_labels


def test_a_method_says_what_its_function_says():
    assert isinstance(USERS.forward, EncodesStacks)
    assert USERS.forward.encodes_stacks


@pytest.mark.parametrize(
    "contract", [NeedsLabels, Pools, Packs, PartlyFrozen, HasEncoder, HasAggregator, EncodesStacks]
)
def test_a_module_that_says_nothing_is_asked_nothing(contract):
    assert not isinstance(nn.Linear(1, 1), contract)
    assert not isinstance(nn.Linear(1, 1).forward, contract)
    assert not isinstance(None, contract)


def test_a_module_has_its_submodules_and_what_was_set_on_it():
    model = SlideModel(nn.Linear(1, 1), PooledAggregator())
    for part in (model, Wrapper(model)):
        assert isinstance(part, HasEncoder)
        assert isinstance(part, HasAggregator)
        assert isinstance(part, SaysNorms)
    assert not isinstance(nn.ModuleDict({"encoder": nn.Linear(1, 1)}), HasAggregator)
    keep_in_eval(model.encoder, ["a"])
    assert isinstance(model.encoder, PartlyFrozen)


def test_every_aggregator_says_how_it_takes_a_stack():
    assert all(isinstance(kind, Packs) for kind in AGGREGATORS.values())
    need_labels = [name for name, kind in AGGREGATORS.items() if isinstance(kind, NeedsLabels) and kind.needs_labels]
    assert need_labels == [name for name, kind in AGGREGATORS.items() if getattr(kind, "needs_labels", False)]
    assert need_labels
