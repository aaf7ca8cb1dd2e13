"""Norms over populations against one plain BatchNorm over all tiles, in float64."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from ds_wsi.norms.passes import encode_population, fits_in_one_chunk, recalibrate
from ds_wsi.norms.population import Moments, correction, merged, moments_of, pooled, track
from ds_wsi.norms.roles import batch_norms, normalise_with, starts_fresh

CHUNKS = (5, 1, 7, 3)  # odd ones


def lively(module: nn.Module) -> nn.Module:
    """No parameter or statistic at its first value, which would hide mistakes."""
    torch.manual_seed(1)
    for part in batch_norms(module):
        if part.affine:
            nn.init.uniform_(part.weight, 0.5, 1.5), nn.init.normal_(part.bias)
        if part.running_mean is not None:
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)
    return module.double()


class TwiceNormed(nn.Module):
    """One norm called twice, one without weights, one without running statistics."""

    def __init__(self):
        super().__init__()
        self.conv, self.twice = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.bare, self.stateless = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        x = self.twice(self.conv(x)).relu()
        return self.stateless(self.bare(self.twice(x)).relu()).mean((2, 3))


class Told(nn.BatchNorm2d):
    """Holds an activation that its owner calls."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), Told(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.last(self.norm.act(x) + x).mean((2, 3))


ENCODERS = {
    "resnet10t": lambda: timm.create_model("resnet10t", num_classes=0),
    "lite0": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=0),  # BatchNormAct2d
    "twice": TwiceNormed,
    "told": Owner,
}


@pytest.fixture
def tiles():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(sum(CHUNKS), 3, 32, 32, dtype=torch.float64, generator=generator) * 2 + 1


@pytest.mark.parametrize("one_chunk", [True, False])
@pytest.mark.parametrize("name", ENCODERS)
def test_statistics_of_a_population_are_those_of_one_call(name, one_chunk, tiles):
    encoder = lively(ENCODERS[name]())
    plain = copy.deepcopy(encoder)
    for norm in batch_norms(plain):
        norm.momentum = 1.0  # the running statistics become the call's
    drops = [part.eval() for part in plain.train().modules() if isinstance(part, nn.Dropout)]
    expected = plain(tiles)
    chunks = [tiles] if one_chunk else list(tiles.split(CHUNKS if name != "lite0" else (9, 7)))
    before = copy.deepcopy(encoder.state_dict())
    features, _ = encode_population(encoder.eval(), lambda: chunks, batch_norms(encoder), one_chunk=one_chunk)
    assert not drops or name == "lite0"
    torch.testing.assert_close(torch.cat(features), expected, rtol=0, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items()), "it keeps its own"
    recalibrate(batch_norms(encoder), encoder, lambda: chunks, one_chunk=one_chunk)
    if name == "twice":  # a norm of two populations has both as one: a plain norm keeps the second alone
        return
    for recalibrated, plain_norm in zip(batch_norms(encoder), batch_norms(plain), strict=True):
        torch.testing.assert_close(recalibrated.running_mean, plain_norm.running_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(recalibrated.running_var, plain_norm.running_var, rtol=1e-10, atol=1e-10)


def test_chunks_as_populations_of_their_own_would_be_noticed(tiles):
    encoder = lively(ENCODERS["resnet10t"]())
    norms = batch_norms(encoder)
    whole, _ = encode_population(encoder.eval(), lambda: [tiles], norms, one_chunk=True)
    apart = [
        encode_population(encoder, lambda part=part: [part], norms, one_chunk=True)[0][0] for part in tiles.split(8)
    ]
    assert (torch.cat(apart) - whole[0]).abs().max() > 0.01


def test_passes_are_one_for_each_norm_and_one_more(tiles):
    encoder, calls = lively(ENCODERS["resnet10t"]()).eval(), 0

    def encode(chunk):
        nonlocal calls
        calls += 1
        return encoder(chunk)

    chunks, norms = list(tiles.split(CHUNKS)), batch_norms(encoder)
    encode_population(encode, lambda: chunks, norms)
    assert calls == (len(norms) + 1) * len(chunks)
    calls = 0
    encode_population(encode, lambda: [tiles], norms, one_chunk=True)
    assert calls == 1


def test_one_value_per_channel_is_refused():
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3)).eval()
    with pytest.raises(ValueError, match="must see more than one value per channel, got 1"):
        encode_population(encoder, lambda: [torch.ones(1, 3)], [encoder[1]], one_chunk=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moments_are_of_all_values_whatever_the_parts(dtype):
    torch.manual_seed(0)
    z = (torch.randn(11, 3, 4, 5) * torch.tensor([1.0, 50.0, 0.0]).view(1, 3, 1, 1) + 300).to(dtype)
    total = pooled(moments for part in z.split([1, 4, 6]) if (moments := moments_of(part)) is not None)
    wide = z.double()
    tolerance = {torch.float64: 1e-12}.get(dtype, 1e-5)
    assert total.count == 11 * 20
    torch.testing.assert_close(total.mean.double(), wide.mean((0, 2, 3)), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total.var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-6)
    assert total.var[2] == 0, "a channel that is uniform"
    assert moments_of(z[:0]) is None
    assert merged(None, None) is None
    with pytest.raises(ValueError, match="at least one population"):
        pooled([])


def test_the_correction_completes_the_gradient():
    """`correction` against autograd through the statistics."""
    torch.manual_seed(0)
    z = torch.randn(6, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    norm = lively(nn.Sequential(nn.BatchNorm2d(3)))[0].train()
    dy = torch.randn_like(z)
    (expected,) = torch.autograd.grad(norm(z), z, dy)
    moments = moments_of(z)
    view, invstd = (1, -1, 1, 1), (moments.var + norm.eps).rsqrt()
    x = (z.detach() - moments.mean.view(view)) * invstd.view(view)
    dgamma, dbeta = (dy * x).sum((0, 2, 3)), dy.sum((0, 2, 3))
    scale, shift = correction(norm.weight.detach(), norm.eps, moments.count, moments.mean, moments.var, dgamma, dbeta)
    constant = dy * (norm.weight.detach() * invstd).view(view)
    torch.testing.assert_close(constant + z.detach() * scale.view(view) + shift.view(view), expected)
    assert not torch.allclose(constant, expected), "without the second term it is another gradient"


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
def test_running_statistics_move_as_the_norms_own_forward_moves_them(momentum):
    torch.manual_seed(0)
    norm, plain = (nn.BatchNorm2d(3, momentum=momentum).double() for _ in range(2))
    for _ in range(3):
        z = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        moments = moments_of(z)
        track(norm, moments.mean, moments.unbiased_var), plain(z)
    for buffer, plain_buffer in zip(norm.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, plain_buffer)
    before = norm.running_mean.clone()
    for still in (norm.eval(), nn.BatchNorm2d(3, track_running_stats=False)):
        track(still, torch.ones(3), torch.ones(3))
    normalise_with(norm, "own")
    track(norm, torch.ones(3), torch.ones(3))
    assert norm.running_mean.equal(before)


def test_a_norm_takes_the_statistics_that_it_is_told_and_gives_its_flags_back():
    torch.manual_seed(0)
    norm, z = nn.BatchNorm2d(3).train(), torch.randn(4, 3, 5, 5) * 3 + 2
    assert starts_fresh(norm)
    running = nn.functional.batch_norm(z, norm.running_mean, norm.running_var)
    batch = nn.functional.batch_norm(z, None, None, training=True)
    state = copy.deepcopy(norm.state_dict())
    for statistics, expected in (("running", running), ("own", batch), ("running", running), ("own", batch)):
        normalise_with(norm, statistics)
        torch.testing.assert_close(norm(z), expected)
        assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())
    normalise_with(norm, "tracked")
    torch.testing.assert_close(norm(z), batch)
    assert norm.track_running_stats
    assert norm.num_batches_tracked == 1
    assert not starts_fresh(norm)
    assert not starts_fresh(nn.Linear(2, 2)), "nothing to start"
    assert starts_fresh(nn.BatchNorm2d(3, track_running_stats=False)), "nothing was loaded"


def test_what_fits_is_told_by_the_largest_layer(tiles):
    encoder = ENCODERS["resnet10t"]().eval().double()
    largest = 2 * 8 * 24 * 16 * 16 * 2  # a layer's input and output of 24 maps of 16 x 16 doubles, twice, at least
    assert not fits_in_one_chunk(encoder, encoder, tiles[:1], 100, 4 * 100 * largest - 1)
    assert fits_in_one_chunk(encoder, encoder, tiles[:1], 100, 100 * 100 * largest)


def test_a_pool_of_ranks_statistics_is_that_of_their_values():
    parts = [torch.randn(10, 2, dtype=torch.float64) + mean for mean in (0.0, 10.0)]
    pool = pooled(moments_of(part) for part in parts)
    moments = [moments_of(part) for part in parts]
    assert pool.mean.allclose((moments[0].mean + moments[1].mean) / 2)
    assert pool.var.allclose((moments[0].var + moments[1].var) / 2 + ((moments[0].mean - moments[1].mean) / 2).square())
    assert isinstance(pool, Moments)
    assert math.isclose(pool.count, 20)
