"""Weights that are computed in forward, and norms whose statistics stand still."""

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign_call_cases import assert_same, assert_same_state, build, every_mode, every_mode_and_norm, pair, step, tiles
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ds_wsi.norms.population import takes_population, track
from ds_wsi.partition import PartitionPolicy, partition_layers


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@every_mode_and_norm
@pytest.mark.parametrize("axis", ["batch", "spatial"])
@pytest.mark.parametrize("kind", ["parametrized", "hook", "orthogonal", "pruned"])
def test_computed_weights(kind, axis, mode, norm):
    apply = {
        "parametrized": parametrizations.weight_norm,
        "hook": nn.utils.weight_norm,
        "orthogonal": parametrizations.orthogonal,
        "pruned": lambda part: prune.random_unstructured(part, "weight", 0.3),
    }[kind]

    def change(net):
        torch.manual_seed(3)
        apply(net.c2)
        apply(net.c3)
        for parameter in net.parameters():
            parameter.data.mul_(1.1)  # a weight that was computed when it was applied is stale now

    if kind == "orthogonal" and mode not in ("lean", "keep"):
        pytest.skip("as weight_norm; two modes will do")
    plain, parted, _ = pair(norm, mode, change, axis=axis)
    x = tiles() if axis == "batch" else tiles(2, 21)[:, :, :, :13]
    assert_same(plain, parted, x)


@every_mode_and_norm
def test_the_cache_of_parametrized_weights_is_not_the_chunks(mode, norm):
    plain, parted, _ = pair(norm, mode, lambda net: parametrizations.weight_norm(net.c2))
    for net in (plain, parted):
        with parametrize.cached():
            step(net, tiles())
            assert parametrize._cache_enabled == 1
    assert_same_state(plain, parted)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("apply", [nn.utils.weight_norm, parametrizations.weight_norm])
@every_mode
def test_computed_weights_of_the_module_itself(apply, mode):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3).double()
    parted = copy.deepcopy(plain)
    apply(plain), apply(parted)
    partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3))
    assert_same(plain, parted)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*")
@every_mode_and_norm
@pytest.mark.parametrize("apply", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_spectral_norm_is_refused_in_training_and_exact_in_evaluation(apply, mode, norm):
    plain, parted, _ = pair(norm, mode, lambda net: (torch.manual_seed(3), apply(net.c2), apply(net.c3)))
    with pytest.raises(
        ValueError, match=r"'c2' \(.*Conv2d\) must not write its buffer '.*_u' in forward, got spectral_norm in"
    ):
        parted(tiles())
    for net in (plain, parted):
        net.c2.eval(), net.c3.eval()
    assert_same(plain, parted)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_hook_that_computes_a_norms_weight_is_refused():
    _, parted, _ = pair("bn", "lean", lambda net: nn.utils.weight_norm(net.n1))
    with pytest.raises(ValueError, match=r"BatchNorm must have torch's or timm's own forward.*layer 'n1'"):
        parted(tiles())
    parted.eval()(tiles())


@every_mode_and_norm
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_convolution_with_a_forward_of_its_own(when, mode, norm):
    """The last one too, whose result backward does not need; patched before the partition or after a call."""

    def change(net):
        for conv in (net.c1, net.c3):
            conv.forward = lambda x, forward=conv.forward: forward(x * x) * 2

    if when == "before":
        plain = build(norm)
        parted = copy.deepcopy(plain)
        change(plain), change(parted)
        partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3))
    else:
        plain, parted, _ = pair(norm, mode)
        assert_same(plain, parted)
        change(plain), change(parted)
        plain.zero_grad(), parted.zero_grad()
    assert_same(plain, parted)


@every_mode
@pytest.mark.parametrize("axis", ["batch", "spatial"])
@pytest.mark.parametrize("checks", [True, False])
def test_a_convolution_whose_own_step_somebody_replaced(checks, axis, mode):
    """Users do so for images without a seam."""

    def change(net):
        for conv in (net.c2, net.c3):  # the last one's result backward does not need
            conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    plain = build()
    parted = copy.deepcopy(plain)
    change(plain), change(parted)
    partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3, axis=axis), check=checks)
    assert_same(plain, parted)


# ------------------------------------------------------------------------------- norms whose statistics stand still


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@every_mode
@pytest.mark.parametrize("axis", ["batch", "spatial"])
def test_running_statistics_that_are_not_tracked_any_more(axis, mode, train):
    """`track_running_stats` switched off while they are there, on before and after; and never any."""

    def change(net):
        net.n1.running_mean.normal_(generator=torch.Generator().manual_seed(4))
        net.n1.running_var.fill_(2.0)
        net.n1.track_running_stats = False
        net.n2 = nn.BatchNorm2d(8, track_running_stats=False).double()

    plain, parted, _ = pair("bn", mode, change, axis=axis)
    before = plain.n1.running_mean.clone()
    x = tiles() if axis == "batch" else tiles(2, 21)
    for net in (plain, parted):
        net.train(train)
    assert_same(plain, parted, x)
    assert torch.equal(parted.n1.running_mean, before)
    assert parted.n1.num_batches_tracked == 0
    for net in (plain, parted):
        net.n1.track_running_stats = True
        net.zero_grad()
    assert_same(plain, parted, x)
    assert torch.equal(parted.n1.running_mean, before) is not train


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("mode", ["lean", "recompute", "keep"])
def test_an_instance_norms_running_statistics_move_as_torchs_do(mode, tracks, train):
    def change(net):
        net.n1 = nn.InstanceNorm2d(8, affine=True, track_running_stats=True).double()
        net.n1.track_running_stats = tracks

    plain, parted, _ = pair("gn", mode, change, axis="spatial")
    for net in (plain, parted):
        net.train(train)
    assert_same(plain, parted, tiles(2, 21))


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_the_rules_of_a_norm_are_torchs(kind, train, has, tracks):
    norm = kind(3, track_running_stats=has).train(train)
    norm.track_running_stats = tracks
    plain = copy.deepcopy(norm)
    z = torch.randn(6, 3) if kind is nn.BatchNorm1d else torch.randn(6, 3, 2, 2)
    out = plain(z)
    axes = [axis for axis in range(z.dim()) if axis != 1]
    mean, var = z.mean(axes), z.var(axes)
    assert takes_population(norm) == bool(out.mean(axes).abs().max() < 1e-5)
    track(norm, mean, var)
    for one, other in zip(norm.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
