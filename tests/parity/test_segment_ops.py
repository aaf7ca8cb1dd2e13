import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ds_wsi.models import AGGREGATORS, build_aggregator
from ds_wsi.stacking import StackedBags, stack_bags
from ds_wsi.stacking.packs import pack_bags
from ds_wsi.stacking.randomness import bag_randomness, key_dropouts
from ds_wsi.stacking.segment_ops import segment_max, segment_mean, segment_softmax, segment_sum, segment_topk
from ds_wsi.stacking.stacked_bags import bounds_of, lengths_of

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
REFERENCE = {
    segment_sum: lambda bag: bag.sum(0),
    segment_mean: lambda bag: bag.mean(0),
    segment_max: lambda bag: bag.amax(0),
}


def gradient(output: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return torch.autograd.grad((output * weights).sum(), leaf)[0]


@pytest.mark.parametrize("op", REFERENCE, ids=lambda op: op.__name__)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_reductions_equal_a_loop_over_bags(op, lengths, seed):
    torch.manual_seed(seed)
    values = torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    stacked = stack_bags(values.split(lengths))
    expected = torch.stack([REFERENCE[op](bag) for bag in values.split(lengths)])
    actual = op(stacked.values, stacked.cu_seqlens)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(actual, values), gradient(expected, values), rtol=1e-12, atol=1e-12)


@given(lengths=LENGTHS, seed=st.integers(0, 99), shift=st.sampled_from([0.0, 1e4, -1e4]))
@settings(max_examples=30, deadline=None)
def test_softmax_equals_a_loop_over_bags_at_any_offset(lengths, seed, shift):
    torch.manual_seed(seed)
    scores = (torch.randn(sum(lengths), 1, dtype=torch.float64) + shift).requires_grad_()
    stacked = stack_bags(scores.split(lengths))
    expected = torch.cat([bag.softmax(0) for bag in scores.split(lengths)])
    actual = segment_softmax(stacked.values, stacked.cu_seqlens)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(actual, scores), gradient(expected, scores), rtol=1e-10, atol=1e-12)


def test_half_precision_is_accumulated_in_float32():
    # 5,000 ones: a float16 sum stops growing at 2,048.
    values = torch.ones(5000, 1, dtype=torch.float16)
    bags = stack_bags([values, values[:1]])
    assert segment_sum(bags.values, bags.cu_seqlens).flatten().tolist() == [5000.0, 1.0]
    weights = segment_softmax(torch.full((5000, 1), 60000.0, dtype=torch.float16), torch.tensor([0, 5000]))
    assert torch.isfinite(weights).all()


@given(lengths=LENGTHS, seed=st.integers(0, 99), k=st.integers(0, 12), each=st.booleans())
@settings(max_examples=40, deadline=None)
def test_topk_equals_a_loop_over_bags_and_ties_go_by_index(lengths, seed, k, each):
    torch.manual_seed(seed)
    values = torch.randint(0, 6, (sum(lengths),)).half()  # few values: many ties
    bags = stack_bags(values.unsqueeze(1).split(lengths))
    sizes = torch.randint(0, 12, (len(lengths),)) if each else torch.full((len(lengths),), k)
    rows, bounds = segment_topk(values, bags.cu_seqlens, sizes.tolist() if each else k)
    expected, counts, start = [], [], 0
    for length, size in zip(lengths, sizes.tolist(), strict=True):
        expected += sorted(range(start, start + length), key=lambda row: (-values[row].item(), row))[:size]
        counts.append(min(size, length))
        start += length
    assert rows.tolist() == expected
    assert bounds.diff().tolist() == counts


@pytest.mark.parametrize(
    ("bags", "words"),
    [
        ([], "at least one bag"),
        ([torch.zeros(0, 3)], "bag 0 must be .N, .... with N >= 1"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], "bag 1 must match bag 0"),
        ([torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)], "bag 1 must match bag 0"),
    ],
)
def test_bags_that_do_not_stack_are_refused(bags, words):
    with pytest.raises(ValueError, match=words):
        stack_bags(bags)


def test_split_returns_the_bags():
    bags = [torch.randn(n, 2) for n in (3, 1, 4)]
    stacked = stack_bags(bags)
    assert isinstance(stacked, StackedBags)
    assert stacked.n_bags == 3
    assert stacked.lengths.tolist() == [3, 1, 4]
    for bag, part in zip(bags, stacked.split(), strict=True):
        assert torch.equal(bag, part)


class NothingWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: numbers read back, and results whose size depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), name
        if name == "aten::repeat_interleave":
            assert kwargs.get("output_size") is not None, name
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), name
        return func(*args, **kwargs)


# TransMIL and RRTMIL split a stack by its lengths, and compute with shapes alone from there.
@pytest.mark.parametrize("name", sorted(AGGREGATORS))
@pytest.mark.parametrize("train", [True, False])
def test_no_aggregator_waits_for_the_device(name, train, monkeypatch):
    torch.manual_seed(0)
    aggregator = build_aggregator(name, 16, 2).train(train)
    key_dropouts(aggregator)
    pack_bags(aggregator, 7 * 16 * 4)
    bags = stack_bags([torch.randn(n, 16, requires_grad=True) for n in (5, 1, 9, 3)])
    labels = torch.tensor([0, 1, 1, 0])

    def refuse(tensor):
        raise AssertionError("numbers were read back")

    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    more = (labels,) if getattr(aggregator, "needs_labels", False) else ()
    with NothingWaits(), bag_randomness([1, 2, 3, 4]):
        aggregator(bags, *more)


def test_bounds_are_known_on_the_host_wherever_they_come_from():
    stacked = stack_bags([torch.randn(n, 2) for n in (3, 1, 4)])
    assert bounds_of(stacked.cu_seqlens) == stacked.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert lengths_of(torch.tensor([0, 2, 2, 7])) == [2, 0, 5]  # of a tensor that nobody made here
    assert lengths_of(stacked.to("cpu").cu_seqlens) == [3, 1, 4]
    assert lengths_of(pickle.loads(pickle.dumps(stacked)).cu_seqlens) == [3, 1, 4]
