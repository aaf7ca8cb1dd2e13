"""Forwards in the place of a module's own: they lie over one another, and come off in the opposite order."""

import pytest
from torch import nn

from ds_wsi.models import SlideOutput, build_aggregator
from ds_wsi.runtime.forwards import Handle
from ds_wsi.stacking.frameworks import pad_bags
from ds_wsi.stacking.packs import pack_bags


def test_what_lay_below_is_put_back():
    module, undone = nn.Linear(2, 2), []
    first = Handle(module, lambda x: "first", "one", lambda: undone.append("one"))
    second = Handle(module, lambda x: "second", "two", lambda: undone.append("two"))
    assert module(None) == "second"
    second.remove()
    assert module(None) == "first"
    first.remove()
    first.remove()  # a second time does nothing
    assert undone == ["two", "one"]
    assert "forward" not in module.__dict__
    assert (first.forward, second.forward) == (None, None)


def test_a_users_own_forward_is_put_back():
    module = nn.Linear(2, 2)
    module.forward = forward = lambda x: "own"
    handle = Handle(module, lambda x: "ours", "one")
    handle.remove()
    assert module.forward is forward


def test_removal_out_of_order_is_refused_by_name_and_changes_nothing():
    module, undone = nn.Linear(2, 2), []
    first = Handle(module, lambda x: "first", "a partition", lambda: undone.append(1))
    second = Handle(module, lambda x: "second", "two")
    with pytest.raises(ValueError, match=r"a partition must be the module's forward to be removed, got .*\(Linear\)"):
        first.remove()
    assert (module(None), undone) == ("second", [])
    second.remove()
    first.remove()
    assert undone == [1]


def test_padding_over_packs_loses_neither():
    aggregator = build_aggregator("abmil", 4, 2)
    packs = pack_bags(aggregator, 0)
    padding = pad_bags(aggregator, SlideOutput)
    with pytest.raises(ValueError, match="packing must be the module's forward"):
        packs.remove()
    padding.remove()
    assert aggregator.__dict__["forward"] is packs.forward
    packs.remove()
    assert "forward" not in aggregator.__dict__
