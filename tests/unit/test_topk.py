"""The selection is a stable sort's: exactly k, ties by index, on every path and for every kind of float."""

import numpy as np
import pytest
import torch

from ds_wsi.compression import topk
from ds_wsi.compression.topk import nonzero, top_k

D = 300_007  # above the size up to which nothing is sampled


def naive(flat, k):
    """The k largest by a stable sort of the magnitudes' bits, descending."""
    keys = flat.numpy().view(np.int32) & 0x7FFFFFFF
    return torch.from_numpy(np.sort(np.argsort(-keys.astype(np.int64), kind="stable")[:k]))


def drawn(name, d):
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(d, generator=generator)
    if name == "quantised":
        x = (x * 2).round()
    elif name == "equal":
        x = torch.full((d,), -0.5)
    elif name == "zeros":
        x = torch.zeros(d)
    elif name == "few":
        x = torch.zeros(d).index_fill_(0, torch.arange(0, d, 1009), -1e-30)
    elif name == "denormal":
        x = x * 1e-42
    elif name == "signs":
        x = torch.where(x > 0, 0.0, -0.0)
    elif name == "heavy":
        x = x**15
    elif name == "infinite":
        x[::50_000], x[7::70_000], x[3::90_000] = float("inf"), float("-inf"), float("nan")
    elif name == "runs":  # large where a stride of a power of two never looks
        x = torch.where(torch.arange(d) % 4096 == 17, 100.0, 0.01) * x
    return x


KINDS = ("normal", "quantised", "equal", "zeros", "few", "denormal", "signs", "heavy", "infinite", "runs")


@pytest.mark.parametrize("kind", KINDS)
def test_the_selection_is_a_stable_sorts(kind):
    for d in (1, 5, 1000, D):
        x = drawn(kind, d)
        before = x.numpy().tobytes()
        for k in {0, 1, d // 1000, d // 100, d // 3, d - 1, d}:
            expected = naive(x, k)
            assert torch.equal(top_k(x, k), expected), (d, k)
            if 0 < k < d:
                assert torch.equal(topk._top_k_device(x, k), expected), (d, k, "on a GPU")
        assert x.numpy().tobytes() == before


def test_a_misleading_sample_costs_time_only(monkeypatch):
    x = drawn("quantised", D)
    for threshold in (0, 1, 0x7FFFFFFF):
        monkeypatch.setattr(topk, "_sampled_threshold", lambda bits, k, threshold=threshold: threshold)
        for k in (1, 3000, D - 1):
            assert torch.equal(top_k(x, k), naive(x, k))


def test_the_sample_passes_enough_and_little_more():
    x = drawn("normal", 1 << 21).numpy().view(np.int32)
    for k in (2000, 20_000, 200_000):
        passed = len(topk._passing(x, topk._sampled_threshold(x, k)))
        assert k <= passed <= 1.3 * k + 20 * k**0.5 * 4


def test_whoever_sees_the_selected_has_seen_what_is_not_finite():
    for wrong in (float("nan"), float("inf"), float("-inf")):
        x = drawn("normal", D)
        x[123_456] = wrong
        assert top_k(x, 1).tolist() == [123_456]
        assert 123_456 in top_k(x, 3000)


def test_slices_and_leaves_that_ask_for_gradients():
    x = drawn("normal", D)
    assert torch.equal(top_k(x[5:1000], 9), naive(x[5:1000].clone(), 9))
    assert torch.equal(top_k(x[::2], 9), naive(x[::2].clone(), 9))
    assert torch.equal(top_k(x.clone().requires_grad_(), 9), naive(x, 9))


def test_nonzero_is_torchs():
    for kind in ("few", "signs", "infinite", "denormal"):
        x = drawn(kind, D)
        assert torch.equal(nonzero(x), x.nonzero().flatten())
    assert nonzero(torch.zeros(0)).tolist() == []


@pytest.mark.parametrize(
    ("flat", "k", "said"),
    [
        (torch.zeros(3), 4, r"k must be in 0\.\.3 \(the tensor's size\), got 4"),
        (torch.zeros(3), -1, r"got -1"),
        (torch.zeros(3, 1), 1, r"1-D float32, got 2-D torch\.float32"),
        (torch.zeros(3, dtype=torch.float64), 1, r"got 1-D torch\.float64"),
    ],
)
def test_wrong_arguments_are_refused(flat, k, said):
    with pytest.raises(ValueError, match=said):
        top_k(flat, k)
