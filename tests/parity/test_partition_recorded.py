"""Modules of any Python across train-mode BatchNorm: what is written in place, sizes, arguments, outputs, draws."""

import copy
import random
import re
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.policy import MODES

TOLERANCE = 1e-10
TILES, CHUNK, SIDE = 7, 3, 12


class Net(nn.Module):
    """Two norms, and a statement of the test's between them."""

    def __init__(self, statement):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c3, self.act = nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(inplace=True)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.flat = nn.Flatten(1)
        self.statement = statement

    def forward(self, x):
        x = self.n1(self.c1(x))
        x = self.statement(self, x)
        return self.c3(self.n2(self.c2(x))).mean((2, 3))


def made(statement):
    torch.manual_seed(0)
    return Net(statement).double()


def images(count=TILES, seed=1):
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(module, x, **kwargs):
    x = x.clone().requires_grad_()
    out = module(x, **kwargs)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return out.detach(), x.grad


def assert_same(plain, partitioned, expected, found):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * other.abs().max()
    scale = max(parameter.grad.abs().max() for parameter in plain.parameters() if parameter.grad is not None)
    for (name, other), one in zip(plain.named_parameters(), partitioned.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= TOLERANCE * scale, name
    for (name, other), one in zip(plain.named_buffers(), partitioned.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=TOLERANCE, atol=TOLERANCE), name


def assert_exact(module, mode, **kwargs):
    partitioned = copy.deepcopy(module)
    partition_layers(partitioned, PartitionPolicy(mode=mode, chunk_size=CHUNK))
    assert_same(module, partitioned, step(module, images(), **kwargs), step(partitioned, images(), **kwargs))


# ------------------------------------------------------------------------------------------------------ in place


def multiplied(net, x):
    x.mul_(0.5)
    return x


def activated_by_a_module(net, x):
    net.act(x)
    return x


def activated_by_a_function(net, x):
    F.leaky_relu(x, 0.1, inplace=True)
    return x


def activated_by_position(net, x):
    F.elu(x, 1.0, True)
    return x


def a_view_of_channels(net, x):
    y = x * 1.0
    part = y[:, :4]
    part.relu_()
    return y + x


def two_views_of_one_tensor(net, x):
    y = x * 1.0
    first, all_of_it = y[:, :4], y.flatten(2)
    first.mul_(2)
    all_of_it += 1
    return y * first.mean((1, 2, 3), keepdim=True)  # `first` reads what was added


def a_view_through_a_module(net, x):
    y = x * 1.0
    net.act(net.flat(y))
    return y


def read_again_after_a_module(net, x):
    y = net.act(x)
    return y + x  # twice the activation: x is the same memory


def assigned(net, x):
    x[:, :2] = 0.0
    x[..., 0] = x[..., 1]
    return x


def masked(net, x):
    x.masked_fill_(x < 0, 0.1)
    return x


def copied(net, x):
    y = torch.empty_like(x)
    y.copy_(x * net.gain)
    return y


def copied_into_zeros(net, x):
    y = torch.zeros_like(x)
    y[:, 2:] = x[:, 2:] * net.gain[2:]
    return y


def through_a_transposed_view(net, x):
    y = x * 1.0
    y.transpose(2, 3)[:, :, 1:4] *= 3.0
    return y


IN_PLACE = (
    *(multiplied, activated_by_a_module, activated_by_a_function, activated_by_position, a_view_of_channels),
    *(two_views_of_one_tensor, a_view_through_a_module, read_again_after_a_module, assigned, masked),
    *(copied_into_zeros, through_a_transposed_view, copied),
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("statement", IN_PLACE, ids=lambda statement: statement.__name__)
def test_what_is_written_in_place_is_read_afterwards(statement, mode):
    assert_exact(made(statement), mode)


def test_a_test_of_this_kind_fails_without_the_statement():
    plain, other = made(multiplied), made(lambda net, x: x)
    assert (step(plain, images())[0] - step(other, images())[0]).abs().max() < 1e-3, "a norm hides a factor at the end"
    seen = {}
    for name, net in (("plain", plain), ("other", other)):
        net.c2.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, args[0]))
        net(images())
    assert (seen["plain"] - seen["other"]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        (
            lambda net, x: x + net.n1.running_mean.add_(1)[:, None, None] * 0,
            "'n1' (BatchNorm2d) must not write its buffer 'running_mean'",
        ),
        (lambda net, x: x + net.gain.detach().mul_(2) * 0, "'' (Net) must not write its parameter 'gain'"),
        (lambda net, x: setattr(net, "calls", getattr(net, "calls", 0) + 1) or x, None),
    ],
    ids=["buffer", "parameter", "attribute"],
)
def test_state_that_a_forward_writes_is_refused_by_name(statement, sentence):
    module = made(statement)
    module.calls = 1
    sentence = sentence or "must not change its attribute 'calls' in forward, got 1 -> 2"
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        module(images())
    assert module.calls == 1


def test_an_input_that_is_changed_in_place_is_refused():
    class Normalises(Net):
        def forward(self, x):
            return super().forward(x.sub_(1))

    module = Normalises(lambda net, x: x).double()
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    x = images()
    with pytest.raises(ValueError, match=r"'' \(Normalises\) must not change (its|the partition's) input in place"):
        module(x)
    assert torch.equal(x, images())


# --------------------------------------------------------------------------------- sizes and conditions on them


def sizes_used_after_a_cut(net, x):
    count, channels, height, width = x.shape
    for _ in range(4):
        x = x + net.act(net.n1(x) * 0.5)
    return x.reshape(count, -1).view(count, channels, height, width)


def halves(net, x):
    u, v = x.split(4, 1)
    u = u + net.n1.weight[:4, None, None] * v
    return torch.cat([u, v], 1)


def conditions(net, x):
    if x.shape[1] != 8 or x.device.type == "meta":
        raise AssertionError("never")
    assert x.shape[2] == SIDE, "the size of a tile"
    return F.pad(x, (0, max(x.shape[-1] % 5, 1)))


def tokens(net, x):
    y = x.flatten(2).transpose(1, 2).reshape(-1, 8)  # 144 rows a tile
    y = net.tokens(y)
    return y.reshape(x.shape[0], -1, 8).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("statement", [sizes_used_after_a_cut, halves, conditions, tokens], ids=lambda s: s.__name__)
def test_sizes_are_numbers(statement, mode):
    module = made(statement)
    if statement is tokens:
        module.tokens = nn.BatchNorm1d(8).double()
    assert_exact(module, mode)


def test_what_depends_on_the_number_of_tiles_is_refused():
    module = made(lambda net, x: x / x.shape[0] ** 0.5)
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    with pytest.raises(ValueError, match="must do the same with any number of tiles"):
        module(images())


def test_a_condition_on_values_is_refused_with_its_place():
    module = made(lambda net, x: x if x.sum() > 0 else -x)
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    with pytest.raises(
        ValueError, match=r"must be a graph of operations.*in '' \(Net\).*test_partition_recorded\.py:\d"
    ):
        module(images())


def test_a_sub_module_that_cannot_be_looked_into_stays_whole():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Custom(nn.Module):
        def forward(self, x):
            return Double.apply(x)

    module = made(lambda net, x: net.custom(x))
    module.custom = Custom()
    assert_exact(module, "lean")


# ------------------------------------------------------------------------------------------- arguments and outputs


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
        expected, found = plain(pixel_values=images(), **kwargs), module(pixel_values=images(), **kwargs)
        assert torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
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


# ---------------------------------------------------------------------------------------------------------- draws


def drop_path(net, x):
    keep = 0.5
    mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep)
    mask.div_(keep)
    return x * mask


@pytest.mark.parametrize("mode", MODES)
def test_stochastic_depth_scales_its_mask(mode):
    module = made(lambda net, x: drop_path(net, torch.ones_like(x)))
    values = set()
    handle = partition_layers(module, PartitionPolicy(mode=mode, chunk_size=CHUNK))
    module.n2 = module.c2 = nn.Identity()
    module.c3 = nn.Conv2d(8, 1, 1, bias=False).double()
    nn.init.constant_(module.c3.weight, 1 / 8)
    torch.manual_seed(0)
    for _ in range(10):
        values |= set(module(images()).detach().flatten().round(decimals=9).tolist())
    assert values == {0.0, 2.0}
    handle.remove()


def test_moments_with_timm_s_drop_path_are_the_plain_module_s():
    def features(partitioned, rate, draws=24):
        torch.manual_seed(0)
        net = timm.create_model("resnet10t", num_classes=0, drop_path_rate=rate).double().train()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
        if partitioned:
            partition_layers(net, PartitionPolicy(mode="lean", chunk_size=4))
        x = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        with torch.no_grad():
            return torch.stack([net(x) for _ in range(draws)])

    plain, found, without = features(False, 0.5), features(True, 0.5), features(False, 0.0, 1)
    spread = [value.std(0).mean().item() for value in (plain, found)]
    assert spread[1] == pytest.approx(spread[0], rel=0.15)
    assert plain.std().item() == pytest.approx(found.std().item(), rel=0.05)
    assert abs(without.std().item() - plain.std().item()) > 0.1, "the test must see a mask that is not scaled"


@pytest.mark.parametrize("mode", ["keep", "lean", "checkpoint", "offload", "stream"])
@pytest.mark.parametrize("draws", [0, 1], ids=["kept", "dropped"])
def test_in_one_chunk_timm_s_drop_path_draws_as_the_plain_module(mode, draws):
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", num_classes=0, drop_path_rate=0.5).double().train()
    for part in plain.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
    module = copy.deepcopy(plain)
    partition_layers(module, PartitionPolicy(mode=mode, chunk_size=TILES))
    x = torch.randn(TILES, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for net in (plain, module):
        torch.manual_seed(draws)
        results.append(step(net, x))
    assert_same(plain, module, *results)


@pytest.mark.parametrize("mode", MODES)
def test_a_number_drawn_once_a_call_is_drawn_once(mode):
    module = made(lambda net, x: x + torch.rand((), dtype=torch.float64))
    module.n2 = module.c2 = nn.Identity()
    partition_layers(module, PartitionPolicy(mode=mode, chunk_size=CHUNK))
    same = images()[:1].expand(TILES, -1, -1, -1)
    torch.manual_seed(1)
    first = module(same)
    assert torch.allclose(first, first[:1].expand_as(first), rtol=TOLERANCE), "all tiles of all chunks have the same"
    assert not torch.allclose(module(same), first), "the next call draws another"


def test_a_part_that_is_called_beside_the_partition_is_told_once(caplog):
    encoder = timm.create_model("resnet10t", num_classes=0)
    handle = partition_layers(encoder, PartitionPolicy(mode="lean", chunk_size=2))
    x = torch.randn(3, 3, 32, 32)
    with caplog.at_level("WARNING", logger="ds_wsi"):
        encoder(x).sum().backward()
        assert not caplog.messages
        encoder.forward_features(x)
        encoder.forward_features(x)
    (told,) = caplog.messages
    assert "a part of a partitioned ResNet (Sequential) was called beside the partition" in told
    handle.remove()
    assert not any(part._forward_pre_hooks for part in encoder.modules())


GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    "statement",
    [
        lambda net, x: x * (0.5 + random.random()),
        lambda net, x: x * float(np.random.rand()),
        lambda net, x: x * torch.rand((), generator=GENERATOR, dtype=torch.float64),
        lambda net, x: x * torch.empty_like(x).uniform_(0.5, 1, generator=GENERATOR),
    ],
    ids=["random", "numpy", "generator", "in place"],
)
def test_draws_that_cannot_be_replayed_are_refused(statement):
    module = made(statement)
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    states = random.getstate(), GENERATOR.get_state()
    with pytest.raises(ValueError, match="must draw from torch's default generators"):
        module(images())
    assert random.getstate() == states[0]
    assert torch.equal(GENERATOR.get_state(), states[1])


# ------------------------------------------------------------------------------------------------- random modules


class Random(nn.Module):
    """Statements drawn at random over a few values of 4 channels."""

    def __init__(self, statements):
        super().__init__()
        self.statements = statements
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))  # shared by statements
        self.norms = nn.ModuleList((nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4)))
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        values = [self.stem(x)]
        count = x.shape[0]
        for kind, one, two, which in self.statements:
            a, b = values[one % len(values)], values[two % len(values)]
            if kind == "conv":
                values.append(self.convs[which % 2](a))
            elif kind == "norm":
                values.append(self.norms[which % 3](a))
            elif kind == "add":
                values.append(a + b)
            elif kind == "residual":
                out = self.norms[which % 3](self.convs[which % 2](a))
                out += b
                values.append(out)
            elif kind == "in place":
                a = a * 1.0
                (torch.neg_, self.act, torch.Tensor.exp_)[which % 3](a)
                values.append(a)
            elif kind == "view":
                a = a * 1.0
                part = a[:, : 1 + which % 3]
                part += 1
                values.append(a + part.mean((1, 2, 3), keepdim=True))
            elif kind == "sizes":
                values.append(a.reshape(count, -1).view(count, 4, *x.shape[2:]) * (1 + x.shape[2]))
            elif kind == "halves":
                u, v = a.chunk(2, 1)
                values.append(torch.cat([v, u * 2], 1))
            elif kind == "drop":
                values.append(F.dropout(a, 0.0, self.training))
        return self.head(torch.stack(values[-2:]).sum(0).mean((2, 3)))


KINDS = ("conv", "norm", "add", "residual", "in place", "view", "sizes", "halves", "drop")
statements = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=8
)


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(statements, st.sampled_from(MODES), st.integers(1, 4), st.integers(2, 6), st.booleans())
def test_random_modules(drawn, mode, chunk, count, train):
    torch.manual_seed(0)
    plain = Random((*drawn, ("norm", 5, 5, 0))).double().train(train)
    module = copy.deepcopy(plain)
    partition_layers(module, PartitionPolicy(mode=mode, chunk_size=chunk))
    x = torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    assert_same(plain, module, step(plain, x), step(module, x))
