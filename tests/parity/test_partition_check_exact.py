"""What a partition computes exactly, the check passes."""

import logging

import pytest
import timm
import torch
from check_cases import SIX, Net, Remembers, TokensOfAllTiles, both, call, group_norm, modes, tiles
from timm.layers import LayerNorm2d
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


@both
def test_large_images_pass_on_a_part_of_them(norm, checked):
    net = Net(norm).double()
    partition_layers(net, PartitionPolicy(mode="lean", axis="spatial", chunk_size=60))
    net(tiles(1, 180)).sum().backward()
    assert checked()


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
