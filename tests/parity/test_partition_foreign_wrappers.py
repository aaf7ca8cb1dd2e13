"""A partitioned module that is wrapped, taken apart, copied or compiled by others."""

import copy
import functools
import pickle

import pytest
import torch
from foreign_call_cases import (
    TOLERANCE,
    Net,
    assert_same,
    build,
    differs,
    every_mode,
    every_mode_and_norm,
    every_norm,
    pair,
    step,
    tiles,
)
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch.nn.utils import parametrizations

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.module.restored import Restored
from ds_wsi.partition.policy import MODES


@every_norm
def test_a_wrapper_set_over_the_partition_is_not_lost(norm):
    _, parted, handle = pair(norm, "lean")
    forward = parted.forward
    parted.forward = functools.wraps(forward.original)(lambda x: forward(x) * 2)
    wrapper, hooks = parted.forward, dict(parted._forward_pre_hooks)
    with pytest.raises(ValueError, match=r"got 'Net.forward' set over it \(Net\)"):
        handle.remove()
    assert parted.forward is wrapper
    assert parted._forward_pre_hooks == hooks
    assert handle.forward is forward
    with pytest.raises(ValueError, match="partitioned twice"):
        partition_layers(parted, PartitionPolicy(mode="lean", chunk_size=3))
    parted.forward = forward
    handle.remove()
    assert "forward" not in parted.__dict__
    assert not parted._forward_pre_hooks
    assert_same(build(norm), parted)


def test_a_wrapper_over_a_layer_of_the_papers_mode_is_not_lost():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double()
    handle = partition_layers(net, PartitionPolicy(mode="paper", chunk_size=3))
    forward = net[0].forward
    net[0].forward = lambda x: forward(x) * 2
    with pytest.raises(ValueError, match=r"set over it \(layer 0\)"):
        handle.remove()
    assert "forward" in net[1].__dict__
    net[0].forward = forward
    handle.remove()
    assert "forward" not in net[1].__dict__


@every_mode_and_norm
def test_a_part_that_is_partitioned_is_named(mode, norm):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = build(norm), nn.Linear(6, 4).double()

        def forward(self, x):
            return self.b(self.a(x))

    sentence = (
        r"Blocks must not hold a partitioned part, got 'a'. HINT: handle.remove\(\) of 'a' first, "
        "or partition parts side by side."
    )
    policy = PartitionPolicy(mode=mode, chunk_size=3)
    blocks = Blocks()
    inner = partition_layers(blocks.a, policy)
    with pytest.raises(ValueError, match=sentence):
        partition_layers(blocks, policy)
    forward = blocks.a.forward
    blocks.a.forward = lambda x: forward(x)
    with pytest.raises(ValueError, match=sentence):
        partition_layers(blocks, policy)
    blocks.a.forward = forward
    inner.remove()
    partition_layers(blocks, policy)
    partition_layers(blocks.a, policy)  # nobody tells the inner one
    with pytest.raises(ValueError, match=sentence):
        blocks(tiles())


# --------------------------------------------------------------------------------------------------- copies of it

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}


class Scaled(Net):
    def __init__(self, norm="bn"):
        super().__init__(norm)
        self.scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize("mode", [*MODES, "paper", "native"])
@pytest.mark.parametrize("axis", ["batch", "spatial"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_parts_of_its_own(how, axis, mode):
    plain, parted, handle = pair("bn", mode, axis=axis, kind=Scaled)
    assert_same(plain, parted)
    plain_copy, parted_copy = COPIES[how](plain), COPIES[how](parted)
    for net in (plain_copy, parted_copy):
        net.scale = 2.0
        with torch.no_grad():
            net.c2.weight.mul_(1.5)
    assert_same(plain_copy, parted_copy)
    handle.remove()
    assert_same(plain_copy, parted_copy)
    assert_same(plain, parted)


@pytest.mark.parametrize("mode", [*MODES, "paper", "native"])
@pytest.mark.parametrize("axis", ["batch", "spatial"])
def test_a_shallow_copy_is_exact_while_it_holds_the_same_and_else_refused(axis, mode):
    plain, parted, handle = pair("bn", mode, axis=axis, kind=Scaled)
    plain_copy, parted_copy = copy.copy(plain), copy.copy(parted)
    assert_same(plain_copy, parted_copy)
    parted_copy.scale = 2.0  # the partition computes with the module that was partitioned
    sentence = r"a shallow copy of a partitioned Scaled must hold what that one holds, got another 'scale'.*HINT"
    with pytest.raises(ValueError, match=sentence):
        parted_copy(tiles())
    parted_copy.scale = 1.0
    assert_same(plain_copy, parted_copy)
    parted_copy.eval()
    with pytest.raises(ValueError, match="got another 'training'"):
        parted_copy(tiles())
    handle.remove()
    assert not parted._forward_pre_hooks


@every_mode
@pytest.mark.parametrize("axis", ["batch", "spatial"])
@pytest.mark.parametrize("checks", [True, False])
def test_an_activation_that_a_norm_holds_is_its_owners_to_call(checks, axis, mode):
    class Told(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act, self.drop = nn.SiLU(), nn.Hardtanh()

    plain = build()
    plain.n1 = Told(8).double()
    parted = copy.deepcopy(plain)
    partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3, axis=axis), check=checks)
    assert_same(plain, parted)


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, SyncBatchNormAct])
def test_the_stand_in_of_a_synchronised_norm_calls_what_its_class_calls(kind):
    norm = kind(3).double()
    norm.act = nn.SiLU()
    plain = nn.BatchNorm2d(3).double()
    x = tiles()
    with Restored(norm, torch.device("cpu")):
        output = norm(x)
    expected = plain(x)
    assert differs(output, norm.act(expected) if kind is SyncBatchNormAct else expected) <= TOLERANCE
    assert type(norm) is kind


# ----------------------------------------------------------------------------------------------------- torch.compile


class Top(nn.Module):
    """A model that holds an encoder, for `torch.compile`."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(6, 2).double()
        nn.init.constant_(self.head.weight, 0.3)
        nn.init.constant_(self.head.bias, 0.1)

    def forward(self, x):
        return self.head(torch.tanh(self.encoder(x * 2.0)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@every_norm
@pytest.mark.parametrize("mode", ["lean", "recompute", "offload", "native"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_that_holds_a_partitioned_encoder(backend, mode, norm, capfd):
    if backend == "inductor" and mode in ("offload", "native"):
        pytest.skip("the compiler sees the same graph")
    torch._dynamo.reset()
    plain, parted, _ = pair(norm, mode)
    plain, parted = Top(plain), Top(parted)
    compiled = torch.compile(parted, backend=backend)
    for _ in range(2):
        assert_same(plain, parted, call=lambda module, x: compiled(x) if module is parted else module(x))
    for net in (plain, parted):
        net.eval()
    with torch.no_grad():
        assert differs(compiled(tiles(5)), plain(tiles(5))) <= 1e-9
    assert "Exception ignored" not in capfd.readouterr().err


COMPILED = {
    "in place": lambda net: net.compile(backend="eager"),
    "convolutions": lambda net: (net.c2.compile(backend="eager"), net.c3.compile(backend="eager")),
    "wrapped convolution": lambda net: setattr(net, "c3", torch.compile(net.c3, backend="eager")),
    "wrapped norm": lambda net: setattr(net, "n2", torch.compile(net.n2, backend="eager")),
    "container": lambda net: (setattr(net, "c2", nn.Sequential(net.c2)), net.c2.compile(backend="eager")),
    "wrapped container": lambda net: setattr(net, "c2", torch.compile(nn.Sequential(net.c2), backend="eager")),
}


@every_mode_and_norm
@pytest.mark.parametrize("what", COMPILED)
def test_compiled_parts(what, mode, norm):
    torch._dynamo.reset()
    plain = build(norm)
    parted = copy.deepcopy(plain)
    COMPILED[what](parted)
    partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3))
    for one, other in zip(step(parted, tiles()), step(plain, tiles()), strict=True):
        assert differs(one, other) <= TOLERANCE
    for one, other in zip(parted.parameters(), plain.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-9


@every_mode_and_norm
def test_a_compiled_module_is_partitioned_through(mode, norm):
    torch._dynamo.reset()
    plain = build(norm)
    parted = copy.deepcopy(plain)
    compiled = torch.compile(parted, backend="eager")
    handle = partition_layers(compiled, PartitionPolicy(mode=mode, chunk_size=3))
    assert handle.module is parted
    assert_same(plain, parted, call=lambda module, x: compiled(x) if module is parted else module(x))
    handle.remove()
    plain.zero_grad(), parted.zero_grad()
    assert_same(plain, parted, call=lambda module, x: compiled(x) if module is parted else module(x))


# --------------------------------------------------------------------------------------------- plans of such modules


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(
    "change",
    [
        lambda net: nn.utils.weight_norm(net.c2),
        lambda net: parametrizations.weight_norm(net.c2),
        lambda net: net.c2.compile(backend="eager"),
        lambda net: setattr(net, "c2", torch.compile(net.c2, backend="eager")),
    ],
    ids=["hook", "parametrized", "compiled", "wrapped"],
)
def test_a_plan_of_computed_weights_and_compiled_parts(change):
    torch._dynamo.reset()
    plain = build("gn")
    parted = copy.deepcopy(plain)
    change(plain), change(parted)
    step(plain, tiles()), step(parted, tiles())  # a weight that is no leaf
    partition_layers(parted, PartitionPolicy(mode="auto", gpu_budget_bytes=200_000))
    plain.zero_grad(), parted.zero_grad()
    assert_same(plain, parted)
