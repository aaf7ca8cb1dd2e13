"""The check at the first call: what a partition would compute wrongly is refused by name, what is exact is not."""

import copy
import logging
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, LayerNorm2d, SplitBatchNorm2d
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrizations

import ds_wsi
from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers
from ds_wsi.partition.checking.case import Case
from ds_wsi.partition.checking.check import check_case, sample_of, tiles_that_fit
from ds_wsi.partition.checking.verdict import Verdict
from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.policy import MODES

SIX = ("lean", "recompute", "keep", "checkpoint", "offload", "stream")


def group_norm(channels):
    return nn.GroupNorm(1, channels)


BATCH, GROUP = pytest.param(nn.BatchNorm2d, id="batchnorm"), pytest.param(group_norm, id="groupnorm")
both = pytest.mark.parametrize("norm", [BATCH, GROUP])
modes = pytest.mark.parametrize("mode", ["lean", "recompute", "keep"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """A residual block with something in it."""

    def __init__(self, norm=nn.BatchNorm2d, middle=None, first=None):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), first or norm(8)
        self.middle = middle or nn.Identity()
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), norm(8)
        self.act = nn.ReLU(inplace=True)
        self.c3 = nn.Conv2d(8, 6, 3, stride=2)

    def forward(self, x):
        x = self.middle(self.act(self.n1(self.c1(x))))
        y = self.act(self.n2(self.c2(x)) + x)
        return self.c3(y).mean((2, 3))


def tiles(count=7, side=12, dtype=torch.float64):
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=numbers).to(dtype)


def call(module, x=None, mode="lean", **policy):
    """One step of the partitioned module."""
    torch.manual_seed(0)
    if not getattr(module.forward, "encodes_stacks", False):
        partition_layers(module, PartitionPolicy(mode=mode, chunk_size=3, **policy))
    out = module(tiles() if x is None else x)
    if out.requires_grad:
        out.square().sum().backward()
    return out.detach()


def refusal(module, mode="lean"):
    """Why the module is refused; "" where it is not."""
    try:
        call(module, mode=mode)
    except ValueError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------ refused: tiles mixed


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        f = x.flatten(1)
        return x + (torch.softmax(self.q(x).flatten(1) @ f.T / f.shape[1], dim=1) @ f).view_as(x)


class FunctionalBatchNorm(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


class Standardised(nn.Module):
    def forward(self, x):
        return (x - x.mean(0, keepdim=True)) / x.std()


class MinusTheFirst(nn.Module):
    def forward(self, x):
        return x - 0.5 * x[:1]


class Neighbours(nn.Module):
    def forward(self, x):
        return x + 0.1 * x.roll(1, 0)


class RunningSum(nn.Module):
    def forward(self, x):
        return x.cumsum(0)


class ByTheLargest(nn.Module):
    """Scaled by the batch's largest value, as some quantisers do."""

    def forward(self, x):
        return x / x.abs().max()


class TokensOfAllTiles(nn.Module):
    """Batch-first data for a layer that was made for batch-second."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape_as(x)


MIXERS = [Attention, FunctionalBatchNorm, Standardised, MinusTheFirst, Neighbours, RunningSum, ByTheLargest]


@modes
@both
@pytest.mark.parametrize("kind", [*MIXERS, TokensOfAllTiles])
def test_a_layer_that_mixes_tiles_is_named(kind, norm, mode):
    name = "middle.attention' .MultiheadAttention" if kind is TokensOfAllTiles else f"middle' .{kind.__name__}"
    with pytest.raises(ValueError, match=f"'{name}. must treat tiles independently, got an output that changes by"):
        call(Net(norm, kind()).double(), mode=mode)


@both
def test_a_mixing_layer_is_named_beside_dropout(norm):
    net = Net(norm, nn.Sequential(nn.Dropout(0.3), Neighbours(), nn.Dropout(0.2))).double()
    with pytest.raises(ValueError, match=r"'middle.1' \(Neighbours\) must treat tiles independently"):
        call(net)


@both
def test_mixing_is_seen_in_evaluation_too(norm):
    net = Net(norm, Attention()).double().eval()
    partition_layers(net, PartitionPolicy(mode="lean", chunk_size=3))
    with torch.no_grad(), pytest.raises(ValueError, match=r"'middle' \(Attention\) must treat tiles independently"):
        net(tiles())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2])
def test_evonorm_with_batch_statistics_is_named(kind, dtype, norm):
    torch.manual_seed(0)
    net = Net(norm, first=kind(8)).to(dtype)
    # With a train-mode BatchNorm in the module its forward is recorded, and the buffer is seen first.
    why = "treat tiles independently|not write its buffer 'running_var'"
    with pytest.raises(ValueError, match=rf"'n1' \({kind.__name__}\) must ({why})"):
        call(net, tiles(dtype=dtype))


# ------------------------------------------------------------------------------------- refused: a norm's own forward


class Ghost(nn.BatchNorm2d):
    def forward(self, x):
        return torch.cat([super(Ghost, self).forward(part) for part in x.chunk(3)])


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2 + self.bias[:, None, None]


class OfTwice(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x * 2)


class Positive(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight.abs() + 0.1, self.bias, True, 0.1, self.eps
        )


class Clipped(nn.BatchNorm2d):
    """Batch renormalisation's clip of the result."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


@modes
@pytest.mark.parametrize("kind", [Ghost, Doubled, OfTwice, Positive, Clipped])
def test_a_batchnorm_with_a_forward_of_its_own_is_named_or_exact(kind, mode):
    plain = Net(first=kind(8)).double()
    nn.init.uniform_(plain.n1.weight, -1, 1)
    ours = copy.deepcopy(plain)
    said = refusal(ours, mode)
    if said:
        assert f"must have torch's or timm's own forward, got {kind.__name__}'s (layer 'n1')" in said
    else:
        assert torch.allclose(ours.eval()(tiles()), step_and_evaluate(plain), rtol=1e-9)


def step_and_evaluate(plain):
    """What the running statistics of one training step make of the tiles."""
    plain(tiles())
    return plain.eval()(tiles())


def test_split_batchnorm_is_refused_although_it_takes_even_numbers_only():
    net = Net(first=SplitBatchNorm2d(8, num_splits=2)).double()
    with pytest.raises(ValueError, match=r"own forward, got SplitBatchNorm2d's \(layer 'n1'\)"):
        call(net, tiles(8))


# ------------------------------------------------------------------------------- refused: state written in forward


class Average(nn.Module):
    """Keeps a running mean of what it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(1))

    def forward(self, x):
        with torch.no_grad():
            self.ema.mul_(0.9).add_(0.1 * x.mean())
        return x


class Attribute(Average):
    """The same in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        del self.ema
        self.ema = torch.zeros(1, dtype=torch.float64)


class Count(Average):
    def __init__(self):
        super().__init__()
        self.ema = torch.zeros((), dtype=torch.long)

    def forward(self, x):
        self.ema += 1
        return x


@modes
@both
@pytest.mark.parametrize("kind", [Average, Attribute, Count])
def test_a_buffer_written_in_forward_is_named_or_written_as_alone(kind, norm, mode):
    plain = Net(norm, kind()).double()
    ours = copy.deepcopy(plain)
    said = refusal(ours, mode)
    if said:
        assert f"'middle' ({kind.__name__}) must not write its buffer 'ema' in forward" in said
    else:
        plain(tiles())
        assert torch.allclose(plain.middle.ema.double(), ours.middle.ema.double())


@both
def test_a_written_buffer_is_named_beside_dropout(norm):
    with pytest.raises(ValueError, match=r"'middle.1' \(Average\) must not write its buffer 'ema' in forward"):
        call(Net(norm, nn.Sequential(nn.Dropout(0.3), Average())).double())


@modes
@both
def test_instance_norm_with_running_statistics_is_named_or_exact(norm, mode):
    plain = Net(norm, nn.InstanceNorm2d(8, affine=True, track_running_stats=True)).double()
    ours = copy.deepcopy(plain)
    said = refusal(ours, mode)
    if said:
        assert "'middle' (InstanceNorm2d) must not write its buffer 'running_mean' in forward" in said
    else:
        plain(tiles())
        assert torch.allclose(plain.middle.running_var, ours.middle.running_var)


def spectral(module, kind):
    for name in ("c2", "c3"):
        kind(getattr(module, name))
    return module


@modes
@both
@pytest.mark.parametrize(
    "kind",
    [parametrizations.spectral_norm, nn.utils.spectral_norm, parametrizations.weight_norm, nn.utils.weight_norm],
    ids=["spectral", "spectral_hook", "weight", "weight_hook"],
)
def test_a_weight_computed_in_forward_is_refused_or_exact(kind, norm, mode):
    torch.manual_seed(0)
    plain, ours = spectral(Net(norm).double(), kind), spectral(Net(norm).double(), kind)
    ours.load_state_dict(plain.state_dict())
    try:
        said = refusal(ours, mode)
    except RuntimeError as error:  # a trace that copies parametrized layers
        said = str(error)
    if said:
        assert any(words in said for words in ("must not write its buffer", "must be computed", "Serialization"))
        return
    wanted = plain(tiles())
    wanted.square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-7, atol=1e-10), name
    for (name, one), other in zip(plain.named_buffers(), ours.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-7), name


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return x * self.n


class CountsOnly(Counts):
    def forward(self, x):
        self.n += 1
        return x


class CountsInADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = {"calls": 0}

    def forward(self, x):
        self.n["calls"] += 1
        return x * (1 + self.n["calls"])


class Alternates(Counts):
    def forward(self, x):
        self.n = not self.n
        return x if self.n else -x


@modes
@both
@pytest.mark.parametrize("kind", [Counts, CountsOnly, CountsInADict, Alternates])
def test_an_attribute_that_every_forward_changes_is_named(kind, norm, mode):
    net = Net(norm, kind()).double()
    before = copy.deepcopy(net.middle.n)
    with pytest.raises(ValueError, match=rf"'middle' \({kind.__name__}\) must not change its attribute 'n' in forward"):
        call(net, mode=mode)
    if mode == "recompute":  # the other modes' plans are made of a trace, before
        assert net.middle.n == before


# ------------------------------------------------------------------------------------------ refused: other generators


class Numpy(nn.Module):
    def forward(self, x):
        return x * float(np.random.uniform(0.5, 1.5))


class Python(nn.Module):
    def forward(self, x):
        return x * random.uniform(0.5, 1.5)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.numbers = torch.Generator()

    def forward(self, x):
        return x * torch.rand(len(x), 1, 1, 1, generator=self.numbers, dtype=x.dtype)


NUMBERS = torch.Generator()


class Hidden(nn.Module):
    def forward(self, x):
        return x * torch.rand(len(x), 1, 1, 1, generator=NUMBERS, dtype=x.dtype)


class OwnNumpy(nn.Module):
    def __init__(self):
        super().__init__()
        self.numbers = np.random.default_rng(0)

    def forward(self, x):
        return x * float(self.numbers.uniform(0.5, 1.5))


@both
@pytest.mark.parametrize("mode", ["lean", "recompute"])
@pytest.mark.parametrize("kind", [Numpy, Python, Own, Hidden, OwnNumpy])
def test_draws_that_no_replay_repeats_are_refused(kind, norm, mode):
    net = Net(norm, kind()).double()
    states = np.random.get_state()[1].copy(), random.getstate(), NUMBERS.get_state()
    said = refusal(net, mode)
    assert "must draw from torch's default generators" in said or "must be traceable" in said
    if mode == "recompute":  # the other modes' plans are made of a trace, before
        assert np.array_equal(states[0], np.random.get_state()[1])
        assert states[1] == random.getstate()
        assert torch.equal(states[2], NUMBERS.get_state())


# ------------------------------------------------------------------------------------------------ refused: outputs


@pytest.mark.parametrize("shape", ["scalar", "transposed", "rows of all"])
def test_an_output_without_tiles_is_refused(shape):
    class Odd(Net):
        def forward(self, x):
            f = super().forward(x)
            return {"scalar": f.sum(), "transposed": f.T, "rows of all": f.flatten()[:-1]}[shape]

    with pytest.raises(ValueError, match="must have tiles on its first axis, got"):
        call(Odd(group_norm).double())


class TenFeatures(Net):
    def forward(self, x):
        return torch.cat([super().forward(x), super().forward(x)[:, :4]], dim=1).T


def test_a_transposed_output_whose_rows_the_tiles_divide_is_refused():
    with pytest.raises(ValueError, match=r"must have tiles on its first axis, got \[10, 4\] for 4"):
        call(TenFeatures(group_norm).double())


class Halves(nn.Module):
    def forward(self, x):
        return x.mul_(0.5)


@pytest.mark.parametrize("mode", ["lean", "recompute"])
def test_an_input_changed_in_place_is_refused(mode):
    x = tiles()
    module = nn.Sequential(nn.Identity(), Halves(), Net(group_norm)).double()
    with pytest.raises(ValueError, match=r"'1' \(Halves\) must not change the partition's input in place"):
        call(module, x, mode=mode)
    assert torch.equal(x, tiles())


# --------------------------------------------------------------------------------------------- exact, and not refused


class Block(nn.Module):
    """A statement in the middle of the net."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.1))

    def forward(self, x):
        return x + self.gamma * x.tanh()


class SelfAttention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=dropout)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape_as(x)


class BatchSecond(TokensOfAllTiles):
    def forward(self, x):
        tokens = x.flatten(2).permute(2, 0, 1)
        return x + self.attention(tokens, tokens, tokens)[0].permute(1, 2, 0).reshape_as(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape_as(x)


class DropPath(nn.Module):
    def forward(self, x):
        keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.8)
        return x * keep


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.layer(torch.relu(self.layer(x)))


class Remembers(nn.Module):
    """Sets at its first call what stays: a cache of a size."""

    def __init__(self):
        super().__init__()
        self.size = None

    def forward(self, x):
        if self.size is None:
            self.size = 12
        return x


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return x


EXACT = {
    "nothing": lambda: None,
    "dropout": lambda: nn.Dropout(0.3),
    "dropout2d": lambda: nn.Dropout2d(0.3),
    "alpha_dropout": lambda: nn.AlphaDropout(0.2),
    "two_dropouts": lambda: nn.Sequential(nn.Dropout(0.3), nn.Conv2d(8, 8, 1), nn.Dropout(0.3)),
    "drop_path": DropPath,
    "attention": SelfAttention,
    "attention_dropout": lambda: SelfAttention(0.2),
    "batch_second": BatchSecond,
    "encoder_layer": Encoder,
    "layer_scale": LayerScale,
    "layer_norm": lambda: LayerNorm2d(8),
    "group_norm": lambda: nn.GroupNorm(2, 8),
    "instance_norm": lambda: nn.InstanceNorm2d(8),
    "cumulative_norm": lambda: nn.BatchNorm2d(8, momentum=None),
    "momentum_0": lambda: nn.BatchNorm2d(8, momentum=0.0),
    "momentum_1": lambda: nn.BatchNorm2d(8, momentum=1.0),
    "untracked_norm": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "norm_in_eval": lambda: nn.BatchNorm2d(8).eval(),
    "sync_norm": lambda: nn.SyncBatchNorm(8),
    "timm_norm_act": lambda: timm.layers.BatchNormAct2d(8),
    "twice": Twice,
    "unused": Unused,
    "gelu": nn.GELU,
    "lstm_of_rows": lambda: nn.Sequential(
        nn.Flatten(0, 1), nn.LSTM(12, 12, batch_first=True), First(), nn.Unflatten(0, (-1, 8))
    ),
}


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


@pytest.fixture
def checked(caplog):
    caplog.set_level(logging.DEBUG, logger="ds_wsi")
    return lambda: "is exact in" in caplog.text and "not checked" not in caplog.text


def exact(net, checked, x=None, mode="lean", **policy):
    call(net, x, mode=mode, **policy)
    assert checked()


@pytest.mark.parametrize("mode", SIX)
@both
def test_plain_nets_pass_in_every_mode(mode, norm, checked):
    exact(Net(norm).double(), checked, mode=mode)


@modes
@both
@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact_is_not_refused(name, norm, mode, checked):
    torch.manual_seed(0)
    exact(Net(norm, EXACT[name]()).double(), checked, mode=mode)


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_shorter_dtypes_pass(norm, dtype, mode, checked):
    exact(Net(norm).to(dtype), checked, tiles(dtype=dtype), mode=mode)


@both
def test_autocast_passes_and_is_left_on(norm, checked):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact(Net(norm), checked, tiles(dtype=torch.float32))
        assert torch.is_autocast_enabled("cpu")


@modes
@both
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_bags_of_few_tiles_pass(count, norm, mode, checked):
    exact(Net(norm).double(), checked, tiles(count), mode=mode)


def test_a_larger_bag_is_checked_again_where_the_first_was_too_small():
    net = Net(group_norm, Neighbours()).double()
    assert call(net, tiles(1)).shape == (1, 6)
    with pytest.raises(ValueError, match=r"'middle' \(Neighbours\) must treat tiles independently"):
        call(net, tiles(3))


@both
@pytest.mark.parametrize("frozen", ["all", "stem", "norms"])
def test_frozen_parts_pass(frozen, norm, checked):
    net = Net(norm).double()
    parts = {"all": [net], "stem": [net.c1, net.n1], "norms": [net.n1, net.n2]}[frozen]
    for part in parts:
        part.requires_grad_(False)
    exact(net, checked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both
@pytest.mark.parametrize("x", ["grad", "strided", "channels_last", "expanded", "constant", "zero"])
def test_inputs_of_all_kinds_pass(x, norm, dtype, checked):
    given = {
        "grad": lambda: tiles().requires_grad_(),
        "strided": lambda: tiles(14)[::2],
        "channels_last": lambda: tiles().contiguous(memory_format=torch.channels_last),
        "expanded": lambda: tiles(1).expand(7, -1, -1, -1),
        "constant": lambda: torch.full((7, 3, 12, 12), 0.7, dtype=torch.float64),
        "zero": lambda: torch.zeros(7, 3, 12, 12, dtype=torch.float64),
    }[x]()
    given = given.to(dtype).detach().requires_grad_(x == "grad")
    exact(Net(norm).to(dtype), checked, given)


def test_tied_weights_and_integer_tiles_pass(checked):
    net = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Flatten()).double()
    net[3].weight = net[1].weight
    exact(net, checked, torch.randint(0, 16, (7, 5)))


def test_an_attribute_that_is_set_once_passes(checked):
    exact(Net(group_norm, Remembers()).double(), checked, mode="recompute")


MODELS = {
    "test_resnet": {"drop_path_rate": 0.2, "drop_rate": 0.1},
    "test_convnext": {"drop_path_rate": 0.2, "drop_rate": 0.1},
    "test_vit": {"img_size": 32, "drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.2},
    "test_efficientnet": {"drop_path_rate": 0.2, "drop_rate": 0.1},
}


@modes
@pytest.mark.parametrize("drop", [True, False], ids=["drop", "no_drop"])
@pytest.mark.parametrize("name", MODELS)
def test_timm_models_pass_with_dropout_and_drop_path(name, drop, mode, checked):
    torch.manual_seed(0)
    options = {key: value for key, value in MODELS[name].items() if drop or key == "img_size"}
    exact(timm.create_model(name, num_classes=0, **options), checked, tiles(7, 32, torch.float32), mode=mode)


# --------------------------------------------------------------------------------------------------- it leaves nothing


def test_a_run_is_the_same_with_and_without_the_check():
    runs = []
    for check in (True, False):
        torch.manual_seed(0)
        net = Net(middle=nn.Dropout(0.3)).double()
        partition_layers(net, PartitionPolicy(mode="lean", chunk_size=3), check=check)
        random.seed(0)
        np.random.seed(0)
        out = net(tiles())
        out.square().sum().backward()
        state = [*net.buffers(), *(parameter.grad for parameter in net.parameters())]
        runs.append([out.detach(), *state, torch.rand(3), torch.tensor([random.random(), np.random.rand()])])
    assert all(map(torch.equal, *runs))


def test_nothing_of_the_module_changes_and_no_hook_fires():
    net = Net().double()
    fired = []
    net.c2.weight.register_hook(lambda grad: fired.append("tensor"))
    net.c1.weight.grad = torch.ones_like(net.c1.weight)
    for part in (net.act, net.c3):
        part.register_forward_hook(lambda *_: fired.append("module"))
        part.register_full_backward_hook(lambda *_: fired.append("backward"))
    before = [(name, id(item), item._version, item.clone()) for name, item in net.state_dict(keep_vars=True).items()]
    held = {part: dict(part.__dict__) for part in net.modules()}
    case, sample = case_of(net)
    fired.clear()  # the plan's own trace
    assert check_case(case, sample) == ""
    assert fired == []
    after = [(name, id(item), item._version) for name, item in net.state_dict(keep_vars=True).items()]
    assert [entry[:3] for entry in before] == after
    assert all(torch.equal(item, net.state_dict()[name]) for name, _, _, item in before)
    assert torch.equal(net.c1.weight.grad, torch.ones_like(net.c1.weight))
    assert all(parameter.grad is None for name, parameter in net.named_parameters() if name != "c1.weight")
    for part, content in held.items():
        assert part.__dict__.keys() == content.keys()
        assert all(part.__dict__[key] is value for key, value in content.items())


def case_of(net, mode="lean", backward=True):
    forward = PartitionedForward(net, PartitionPolicy(mode=mode, chunk_size=3))
    device = torch.device("cpu")
    plan = forward.plan(tiles(), device, torch.float64)
    case = Case(net, net.forward, forward.on_trial, plan, Arguments(), device, backward, False)
    return case, sample_of(case, tiles(), 8)


def test_it_costs_ten_tiles_once_for_each_kind_of_call(monkeypatch):
    class Stem(nn.Conv2d):
        def forward(self, x):
            if not isinstance(x, FakeTensor):  # which has no values to compute with
                seen.append(len(x))
            return super().forward(x)

    seen = []
    net = Net(group_norm).double()
    net.c1 = Stem(3, 8, 3, padding=1).double()
    partition_layers(net, PartitionPolicy(mode="keep", chunk_size=8))
    seen.clear()
    for _ in range(3):
        net(tiles(8)).sum().backward()
    assert seen == [4, 3, 1, 8, 8, 8]  # alone, in two chunks; then the calls
    seen.clear()
    net.c1.weight.requires_grad_(False)
    net(tiles(8)).sum().backward()
    assert seen == [4, 3, 1, 8]
    seen.clear()
    with torch.no_grad():
        net.eval()(tiles(8))
        net(tiles(8))
    assert seen == [4, 3, 1, 8, 8]


@pytest.mark.parametrize("change", ["part", "forward", "attribute", "flags", "shape"])
def test_a_call_of_another_kind_is_checked_again(change, caplog):
    caplog.set_level(logging.DEBUG, logger="ds_wsi")
    net = Net(group_norm, Remembers()).double()
    net.middle.size = 12
    x = tiles()
    call(net, x, mode="recompute")
    assert caplog.text.count("is exact in") == 1
    call(net, x)
    assert caplog.text.count("is exact in") == 1
    if change == "part":
        net.middle = nn.Tanh()
    elif change == "forward":
        net.middle.forward = torch.tanh
    elif change == "attribute":
        net.middle.size = 13
    elif change == "flags":
        net.eval()
    else:
        x = tiles(side=16)
    call(net, x)
    assert caplog.text.count("is exact in") == 2


def test_it_is_switched_off_by_argument_policy_and_mode():
    for options, policy in (({"check": False}, {}), ({}, {"check": False}), ({}, {"mode": "native"})):
        net = Net(group_norm, Attention()).double()
        partition_layers(net, PartitionPolicy(**{"mode": "lean", "chunk_size": 3} | policy), **options)
        assert net(tiles()).shape == (7, 6)


def test_copies_of_the_module_check_anew():
    net = Net(group_norm, Neighbours()).double()
    partition_layers(net, PartitionPolicy(mode="lean", chunk_size=3))
    with pytest.raises(ValueError, match="must treat tiles independently"):
        copy.deepcopy(net)(tiles())


def test_a_plan_with_a_budget_takes_fewer_tiles():
    plan = PartitionPlan((), "batch", "stack", (10, 3, 12, 12), native_peak_bytes=1000, gpu_budget_bytes=600)
    assert [tiles_that_fit(plan, count) for count in (1, 3, 5, 9)] == [1, 3, 4, 4]


@both
def test_large_images_pass_on_a_part_of_them(norm, checked):
    net = Net(norm).double()
    partition_layers(net, PartitionPolicy(mode="lean", axis="spatial", chunk_size=60))
    net(tiles(1, 180)).sum().backward()
    assert checked()


def test_what_takes_no_smaller_image_is_not_checked_and_says_so(caplog):
    caplog.set_level(logging.DEBUG, logger="ds_wsi")
    net = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.Flatten(), nn.Linear(180 * 180, 2)).double()
    partition_layers(net, PartitionPolicy(mode="lean", axis="spatial", chunk_size=60))
    net(tiles(1, 180)).sum().backward()
    assert "Sequential is not checked: RuntimeError: mat1 and mat2 shapes" in caplog.text


# --------------------------------------------------------------------------------------------------------- the report


def test_the_report_says_what_is_exact_and_what_it_costs(capsys):
    net = Net().double()
    before = copy.deepcopy(net.state_dict())
    report = ds_wsi.check_partition(net, tiles(), chunk_size=3)
    assert report.exact == ("native", *MODES)
    assert all(entry.bytes_per_tile > 0 and entry.seconds_per_tile > 0 for entry in report.modes)
    assert report.modes[0].bytes_per_tile > next(e for e in report.modes if e.mode == "recompute").bytes_per_tile
    assert str(report) in capsys.readouterr().out
    assert all(torch.equal(before[name], item) for name, item in net.state_dict().items())
    assert "forward" not in net.__dict__


def test_the_report_says_why_a_mode_is_refused(capsys):
    report = ds_wsi.check_partition(Net(group_norm, Attention()).double(), tiles(), modes=("native", "lean"))
    assert report.exact == ("native",)
    assert "'middle' (Attention) must treat tiles independently" in capsys.readouterr().out
    with pytest.raises(ValueError, match="modes must be among native, keep"):
        ds_wsi.check_partition(Net(), tiles(), modes=("auto",))
    with pytest.raises(ValueError, match="example must hold tiles"):
        ds_wsi.check_partition(Net(), tiles(0))


class Coarse(nn.Module):
    """Computes in float32 what it is given in float64: a table of positions that is resized, say."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 8, 5, 5))

    def forward(self, x):
        resized = torch.nn.functional.interpolate(self.table.float(), x.shape[2:], mode="bicubic", antialias=True)
        return x + resized.to(x.dtype)


@both
def test_rounding_in_a_coarser_dtype_is_no_difference(norm, checked):
    exact(Net(norm, Coarse()).double(), checked)


def test_a_module_that_is_wrong_in_one_tile_alone_is_taken_where_no_chunk_has_one():
    """As torch's BatchNorm on a CPU is for a transposed gradient; with chunks of two, one tile can remain."""

    class WrongAlone(nn.Module):
        def forward(self, x):
            return x * 2 if len(x) == 1 else x

    module = nn.Sequential(nn.Conv2d(3, 4, 3), WrongAlone(), nn.ReLU()).double()
    partition_layers(module, PartitionPolicy(mode="recompute", chunk_size=3))
    plain = copy.deepcopy(module[0])
    x = tiles(7)
    torch.testing.assert_close(module(x), plain(x).relu())
    other = nn.Sequential(nn.Conv2d(3, 4, 3), WrongAlone()).double()
    partition_layers(other, PartitionPolicy(mode="recompute", chunk_size=2))
    with pytest.raises(ValueError, match=r"must treat tiles independently|must be computed in a partition"):
        other(tiles(7))


def test_what_hangs_on_odd_and_even_places_in_a_chunk_is_seen():
    class EverySecond(nn.Module):
        def forward(self, x):
            return torch.cat([x[::2] * 2, x[1::2]])[torch.arange(len(x)).argsort()]

    module = nn.Sequential(nn.Conv2d(3, 4, 3), EverySecond()).double()
    partition_layers(module, PartitionPolicy(mode="recompute", chunk_size=4))
    with pytest.raises(ValueError, match="EverySecond"):
        module(tiles(8))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
    ids=["of torch", "of cuBLAS"],
)
@pytest.mark.parametrize("method", ["_partition", "_mixing"])
def test_a_check_that_the_device_has_no_memory_for_refuses_nothing(error, method, caplog, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(Verdict, method, full)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).double()
    if method == "_mixing":  # asked where something differs
        monkeypatch.setattr(Verdict, "_compared", lambda verdict, *_, **__: verdict._mixing())
    with caplog.at_level(logging.DEBUG, logger="ds_wsi"):
        call(net)
    assert "is not checked: the device's memory does not hold it" in caplog.text
