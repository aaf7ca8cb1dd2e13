"""A streamed bag equals the plain one, in float64, whatever the chunks; and what cannot be streamed is refused."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ds_wsi.models import build_aggregator
from ds_wsi.stacking import stack_bags
from ds_wsi.tile_parallel import stream, stream_bag

SIDE = 12


def make_parts(name="gated_abmil", dropout=0.0):
    torch.manual_seed(0)
    encoder = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    options = {"embed": "10-6", "embed_dropout": 0.0} if name.startswith("embedded") else {}
    return encoder.double().train(), build_aggregator(name.split()[-1], 12, 3, **options).double().train()


def gradients(encoder, aggregator):
    return {
        f"{part}.{name}": parameter.grad
        for part, owner in (("encoder", encoder), ("aggregator", aggregator))
        for name, parameter in owner.named_parameters()
    }


def plain(encoder, aggregator, tiles, label=1):
    out = aggregator(stack_bags([encoder(tiles)]))
    F.cross_entropy(out.logits, torch.tensor([label])).backward()
    return out


def worst(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, other in theirs.items():
        assert (ours[name] is None) == (other is None), name
    # The gradient of the scores' bias is zero but for rounding: a softmax does not feel it.
    least = 1e-3 * max(other.norm() for other in theirs.values() if other is not None)
    return max(
        ((ours[name] - other).norm() / other.norm().clamp_min(least)).item()
        for name, other in theirs.items()
        if other is not None
    )


@pytest.mark.parametrize("name", ["abmil", "gated_abmil", "mean", "embedded gated_abmil"])
@pytest.mark.parametrize(("count", "chunk", "keep"), [(12, 4, 0), (13, 4, 0), (13, 4, 2), (13, 5, 9), (1, 4, 0)])
def test_streamed_gradients_are_the_plain_ones(name, count, chunk, keep):
    encoder, aggregator = make_parts(name)
    streamed = copy.deepcopy((encoder, aggregator))
    tiles = torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64)
    expected = plain(encoder, aggregator, tiles)
    output = stream_bag(*streamed, tiles, chunk_size=chunk, keep_chunks=keep)
    F.cross_entropy(output.logits, torch.tensor([1])).backward()
    assert torch.allclose(output.logits, expected.logits, rtol=1e-12, atol=1e-13)
    if expected.attention is not None:
        assert torch.allclose(output.attention, expected.attention, rtol=1e-12, atol=1e-15)
    assert worst(gradients(*streamed), gradients(encoder, aggregator)) < 1e-12


def test_a_backward_without_the_pooled_feature_in_it_would_be_noticed(monkeypatch):
    """dL/de_k = a_k g (h_k - z): leaving z out is the obvious mistake."""
    encoder, aggregator = make_parts()
    streamed = copy.deepcopy((encoder, aggregator))
    tiles = torch.randn(9, 3, SIDE, SIDE, dtype=torch.float64)
    plain(encoder, aggregator, tiles)
    second_pass = stream._Work.second_pass

    def wrong(self, grad, parameters):
        self.pooled = torch.zeros_like(self.pooled)
        return second_pass(self, grad, parameters)

    monkeypatch.setattr(stream._Work, "second_pass", wrong)
    F.cross_entropy(stream_bag(*streamed, tiles, chunk_size=4).logits, torch.tensor([1])).backward()
    assert worst(gradients(*streamed), gradients(encoder, aggregator)) > 1e-3


def test_chunks_may_be_read_when_they_are_needed_and_are_prepared_on_the_way():
    encoder, aggregator = make_parts()
    streamed = copy.deepcopy((encoder, aggregator))
    tiles = torch.randint(0, 256, (11, 3, SIDE, SIDE), dtype=torch.uint8)
    reads = []

    class Slide:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            reads.append(index)
            return tiles[index * 3 : index * 3 + 3]

    expected = plain(encoder, aggregator, tiles.double() / 255)
    output = stream_bag(*streamed, Slide(), prepare=lambda chunk: chunk.double() / 255)
    F.cross_entropy(output.logits, torch.tensor([1])).backward()
    assert reads == [0, 1, 2, 3] * 2
    assert torch.allclose(output.logits, expected.logits, rtol=1e-12)
    assert worst(gradients(*streamed), gradients(encoder, aggregator)) < 1e-12


def test_dropout_is_drawn_again_for_the_second_pass_and_the_generators_go_on():
    encoder, aggregator = make_parts(dropout=0.3)
    streamed = copy.deepcopy((encoder, aggregator))
    tiles = torch.randn(8, 3, SIDE, SIDE, dtype=torch.float64)
    torch.manual_seed(5)
    features = torch.cat([encoder(chunk) for chunk in tiles.split(3)])  # draws as the chunks do
    after = torch.get_rng_state()
    F.cross_entropy(aggregator(stack_bags([features])).logits, torch.tensor([0])).backward()
    torch.manual_seed(5)
    F.cross_entropy(stream_bag(*streamed, tiles, chunk_size=3).logits, torch.tensor([0])).backward()
    assert worst(gradients(*streamed), gradients(encoder, aggregator)) < 1e-12
    assert torch.equal(torch.get_rng_state(), after)


def test_frozen_parts_get_no_gradient():
    for frozen in (0, 1):
        parts = make_parts()
        parts[frozen].requires_grad_(False)
        streamed = copy.deepcopy(parts)
        tiles = torch.randn(7, 3, SIDE, SIDE, dtype=torch.float64)
        plain(*parts, tiles)
        F.cross_entropy(stream_bag(*streamed, tiles, chunk_size=3).logits, torch.tensor([1])).backward()
        assert worst(gradients(*streamed), gradients(*parts)) < 1e-12
    with torch.no_grad():
        assert stream_bag(*streamed, tiles).logits.grad_fn is None


def test_autocast_is_in_force_in_both_passes():
    encoder, aggregator = (part.float() for part in make_parts())
    streamed, exact = copy.deepcopy((encoder, aggregator)), copy.deepcopy((encoder, aggregator))
    tiles = torch.randn(10, 3, SIDE, SIDE)
    plain(*exact, tiles)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(encoder, aggregator, tiles)
        out = stream_bag(*streamed, tiles, chunk_size=4)
        F.cross_entropy(out.logits.float(), torch.tensor([1])).backward()
    reference = gradients(*exact)
    assert 1e-5 < worst(gradients(*streamed), reference) < 2 * worst(gradients(encoder, aggregator), reference) + 1e-2


def test_what_cannot_be_streamed_is_refused_by_name():
    encoder, aggregator = make_parts()
    with pytest.raises(ValueError, match=r"train-mode BatchNorm2d, got 'conv1.1'.*HINT: partition_layers"):
        stream_bag(timm.create_model("resnet10t", num_classes=0).train(), aggregator, torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="must be pooled by attention or mean, got MaxMIL"):
        stream_bag(encoder, build_aggregator("max", 12, 2), torch.zeros(2, 3, SIDE, SIDE))
    next(encoder.parameters()).ds_id = 0
    with pytest.raises(ValueError, match=r"needs whole parameters, got '0.weight' in shards"):
        stream_bag(encoder, aggregator, torch.zeros(2, 3, SIDE, SIDE))
