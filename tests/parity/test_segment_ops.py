import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_wsi.stacking import StackedBags, stack_bags
from ds_wsi.stacking.segment_ops import segment_max, segment_mean, segment_softmax, segment_sum, segment_topk

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
    rows, bounds = segment_topk(values, bags.cu_seqlens, sizes if each else k)
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
