"""How a module across train-mode BatchNorm is called: arguments, outputs, and what changes until the next call."""

import copy
from dataclasses import dataclass

import pytest
import timm
import torch
from recorded_cases import CHUNK, TILES, TOLERANCE, Net, assert_exact, assert_same, images, made, step
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.policy import MODES


@dataclass
class Unknown:
    value: torch.Tensor


class Asked(Net):
    def forward(self, pixel_values, scale=1.0, *, flag=False, bias=None, how="tensor"):
        x = super().forward(pixel_values * scale)
        x = x * 2 if flag else x
        x = x if bias is None else x + bias
        pairs = torch.stack([x, -x], 1).flatten(0, 1)
        return {
            "tensor": x,
            "tuple": (x, None, x[:, :2].float()),
            "dict": {"features": x, "name": "asked", "rows": pairs},
            "transposed": x.T,
            "scalar": x.mean(),
            "unknown": Unknown(x),
        }[how]


def asked():
    torch.manual_seed(0)
    return Asked(lambda net, x: x).double()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(
    "kwargs",
    [{"scale": 2.0}, {"flag": True}, {"scale": 0.5, "flag": True}, {"bias": torch.arange(6.0)}, {}],
    ids=["number", "flag", "both", "tensor", "none"],
)
def test_arguments_beside_the_tiles(kwargs, norm):
    module = asked()
    if norm == "group":
        module.n1, module.n2 = nn.GroupNorm(1, 8).double(), nn.GroupNorm(1, 8).double()
    for mode in ("lean", "recompute", "keep"):
        assert_exact(module, mode, **kwargs)
        module.zero_grad()


def test_tiles_by_keyword_and_other_arguments_in_the_next_call():
    plain, module = asked(), asked()
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    for kwargs in ({}, {"scale": 2.0}, {"bias": torch.ones(6)}, {"bias": torch.full((6,), 2.0)}, {}):
        expected, output = plain(pixel_values=images(), **kwargs), module(pixel_values=images(), **kwargs)
        assert torch.allclose(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.allclose(module(images(), 3.0), plain(images(), 3.0), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"bias": torch.ones(TILES, 6)}, r"a tensor that all tiles share, got bias \[7, 6\] of Asked for 7 tiles"),
        ({"bias": torch.ones(6, requires_grad=True)}, "got bias of Asked, which requires a gradient"),
        ({"bias": object()}, "got bias of Asked, a object"),
    ],
)
def test_arguments_that_cannot_be_shared_are_refused(kwargs, sentence):
    module = asked()
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    with pytest.raises(ValueError, match=sentence):
        module(images(), **kwargs)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("how", ["tuple", "dict"])
def test_outputs_of_several_tensors(how, norm):
    plain, module = asked(), asked()
    for net in (plain, module):
        if norm == "group":
            net.n1, net.n2 = nn.GroupNorm(1, 8).double(), nn.GroupNorm(1, 8).double()
    for mode in MODES:
        handle = partition_layers(module, PartitionPolicy(mode=mode, chunk_size=CHUNK))
        outs = []
        for net in (plain, module):
            net.zero_grad()
            out = net(images(), how=how)
            tensors = [item for item in (out if how == "tuple" else out.values()) if isinstance(item, torch.Tensor)]
            sum((item.double() * item.double()).sum() for item in tensors).backward()
            outs.append((type(out), tensors))
        assert outs[0][0] is outs[1][0]
        for one, other in zip(outs[1][1], outs[0][1], strict=True):
            assert one.dtype == other.dtype
            assert torch.allclose(one, other, rtol=1e-6 if one.dtype == torch.float32 else TOLERANCE, atol=TOLERANCE)
        for (name, other), one in zip(plain.named_parameters(), module.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if other.grad is not None:
                assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-7), name
        handle.remove()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("transposed", "must have tiles on its first axis"),
        ("scalar", "must have tiles on its first axis"),
        ("unknown", "must be a tensor, or a tuple, list, dict or ModelOutput of tensors, got a Unknown"),
    ],
)
def test_outputs_without_tiles_are_refused(how, sentence, norm):
    module = asked()
    if norm == "group":
        module.n1, module.n2 = nn.GroupNorm(1, 8).double(), nn.GroupNorm(1, 8).double()
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    with pytest.raises(ValueError, match=sentence):
        module(images(), how=how)


# ------------------------------------------------------------------------------------------------ the next call


@pytest.mark.parametrize("mode", ["lean", "recompute", "keep"])
def test_a_changed_module_is_looked_at_again(mode):
    plain = made(lambda net, x: x * (2 + net.held[0] + net.named["by"]) if net.flag else net.act(x))
    plain.flag, plain.held, plain.named = False, [0], {"by": 0.0}
    module = copy.deepcopy(plain)
    partition_layers(module, PartitionPolicy(mode=mode, chunk_size=CHUNK))

    def change(net, number):
        if number == 1:
            torch.manual_seed(3)
            net.c2 = nn.Conv2d(8, 8, 3, padding=1).double()
        elif number == 2:
            net.act = nn.Tanh()
        elif number == 3:
            net.flag = True
        elif number == 4:
            net.n1.eval()
        elif number == 5:
            net.c1.requires_grad_(False)
        elif number == 6:
            net.held[0] = 3
        elif number == 7:
            net.named["by"] = 0.5

    for number in range(8):
        for net in (plain, module):
            change(net, number)
            net.zero_grad()
        assert_same(plain, module, step(plain, images()), step(module, images()))


def test_an_instance_forward_is_the_module_s():
    plain = made(lambda net, x: x)
    module = copy.deepcopy(plain)
    for net in (plain, module):
        net.forward = lambda x, net=net: type(net).forward(net, x) * 2
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    assert_same(plain, module, step(plain, images()), step(module, images()))


@pytest.mark.parametrize("mode", MODES)
def test_a_norm_as_the_whole_module(mode):
    for kind in (nn.BatchNorm2d, nn.SyncBatchNorm):
        norm = kind(3).double() if kind is nn.BatchNorm2d else timm.layers.BatchNormAct2d(3).double()
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        assert_exact(norm, mode)


def test_a_forward_that_was_patched_on_a_part():
    plain = made(lambda net, x: x)
    module = copy.deepcopy(plain)
    for net in (plain, module):
        net.c1.forward = lambda x, conv=net.c1: type(conv).forward(conv, x) * 1.5
        net.act.forward = lambda x: x * 2
    for mode in ("lean", "recompute", "keep"):
        handle = partition_layers(module, PartitionPolicy(mode=mode, chunk_size=CHUNK))
        for net in (plain, module):
            net.zero_grad()
        assert_same(plain, module, step(plain, images()), step(module, images()))
        handle.remove()
    module.n1.forward = lambda x: x
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    with pytest.raises(ValueError, match=r"must have torch's or timm's own forward, got BatchNorm2d's \(layer 'n1'\)"):
        module(images())


@pytest.mark.parametrize("tiles", [[1.0, 2.0], None, torch.tensor(1.0)], ids=["list", "None", "number"])
def test_what_are_no_tiles(tiles):
    module = made(lambda net, x: x)
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    with pytest.raises(ValueError, match=r"the tiles of a partitioned Net must be a tensor \[N, ...\], got a "):
        module(tiles)


def test_norms_with_a_forward_of_their_own_are_refused():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    for norm in (Scaled(8), timm.layers.SplitBatchNorm2d(8, num_splits=2)):
        module = made(lambda net, x: net.extra(x))
        module.extra = norm.double()
        partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
        with pytest.raises(ValueError, match=r"must have torch's or timm's own forward, got \w+'s \(layer 'extra'\)"):
            module(images())
