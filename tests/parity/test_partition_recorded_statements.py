"""Statements of any Python across train-mode BatchNorm: writes in place, sizes, and modules of both at random."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from recorded_cases import CHUNK, SIDE, Net, assert_exact, assert_same, images, made, step
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.policy import MODES


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
    y = x.flatten(2).transpose(1, 2).reshape(-1, 8)  # 144 rows per tile
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
        ValueError, match=r"must be a graph of operations.*in '' \(Net\).*test_partition_recorded_statements\.py:\d"
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
