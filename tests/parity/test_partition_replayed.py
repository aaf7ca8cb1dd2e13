"""What a forward drew, cast and compiled is the same when a partition runs it again in backward."""

import copy

import pytest
import torch
from partition_cases import assert_same, build, gradient_of, relative, step, tiles
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.policy import MODES


class ByChunk(nn.Module):
    """What dropout in chunks means: the plain module, chunk after chunk."""

    def __init__(self, module, size):
        super().__init__()
        self.module, self.size = module, size

    def forward(self, x):
        return torch.cat([self.module(part) for part in x.split(self.size)])


@pytest.mark.parametrize("mode", ["keep", "recompute", "offload"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "drop_rate": 0.3, "attn_drop_rate": 0.2, "drop_path_rate": 0.3}),
        ("convnext_tiny", {"drop_rate": 0.3, "drop_path_rate": 0.5}),
    ],
)
def test_dropout_and_stochastic_depth_are_replayed(name, options, mode):
    plain = build(name, **options)
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode=mode, chunk_size=3))
    torch.manual_seed(5)
    expected = step(ByChunk(plain, 3), tiles(8))
    after = torch.rand(3)
    torch.manual_seed(5)
    results = step(partitioned, tiles(8))
    assert torch.equal(after, torch.rand(3)), "backward must leave the generator as forward left it"
    assert_same(plain, partitioned, expected, results)
    torch.manual_seed(6)
    assert relative(step(copy.deepcopy(partitioned), tiles(8))[0], expected[0]) > 1e-3


class Dropped(nn.Module):
    """Dropout between norms: recomputed several times in one forward, and again in backward."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.4), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        )

    def forward(self, x):
        return torch.nn.functional.dropout(self.body(x), 0.3, self.training).mean((2, 3))


def test_dropout_between_norms_is_the_same_in_every_pass():
    torch.manual_seed(0)
    modules = {mode: Dropped().double() for mode in MODES}
    steps = {}
    for module in modules.values():
        module.load_state_dict(modules["keep"].state_dict())
    for mode, module in modules.items():
        partition_layers(module, PartitionPolicy(mode=mode, chunk_size=4))
        torch.manual_seed(7)
        steps[mode] = step(module, tiles(10, 8))
        assert steps[mode][0].eq(0).sum() == 0
    # "keep" runs each operation once and replays nothing; it draws level by level, as lean and stream do.
    for mode in ("lean", "stream", "checkpoint", "offload"):
        assert_same(modules["keep"], modules[mode], steps["keep"], steps[mode])
    # "recompute" draws in another order; its own gradient is checked by differences.
    module, x = modules["recompute"], tiles(10, 8)
    direction = tiles(10, 8, seed=9)
    values = []
    for sign in (1, -1):
        torch.manual_seed(7)
        out = module(x + sign * 1e-5 * direction)
        values.append((out * gradient_of(out)).sum().item())
    slope = (values[0] - values[1]) / 2e-5
    assert (steps["recompute"][1] * direction).sum().item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "dtype"), [*((mode, torch.bfloat16) for mode in MODES if mode != "recompute"), ("lean", torch.float16)]
)
def test_mixed_precision_is_applied_again_in_backward(mode, dtype):
    plain = build("resnet10t").float()  # few layers: 16 bits are slow on a CPU
    # With 16-bit rounding the order of sums shows; what must hold is that both err by as much from float32.
    exact, partitioned = copy.deepcopy(plain), copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode=mode, chunk_size=4))
    x = tiles(8).float()
    gradients = {}
    for name, module in (("plain", plain), ("ours", partitioned)):
        with torch.autocast("cpu", dtype=dtype):
            out = module(x)
        out.float().backward(gradient_of(out.float()))
        assert out.dtype == dtype
        assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
        gradients[name] = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    out = exact(x)
    out.backward(gradient_of(out))
    true = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()])
    errors = {name: (gradient - true).norm() / true.norm() for name, gradient in gradients.items()}
    assert errors["ours"] <= 1.5 * errors["plain"] + 1e-3


class Perceptron(nn.Sequential):
    """Tiles without a norm: one operation to the partition, which may be compiled."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 64, 32), nn.GELU(), nn.Linear(32, 8))


def test_a_compiled_chunk_body_is_the_same_and_runs_compiled(monkeypatch):
    torch.manual_seed(0)
    compiled = []
    original = torch.compile

    def compile_and_count(function, **options):
        body = original(function, **options)

        def run(*args):
            compiled.append(len(args[0]))
            return body(*args)

        return run

    monkeypatch.setattr(torch, "compile", compile_and_count)
    plain = Perceptron().double()
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode="recompute", chunk_size=4, compile=True))
    x = tiles(8, 8)
    assert_same(plain, partitioned, step(plain, x), step(partitioned, x))
    assert compiled == [4, 4, 4, 4]


@pytest.mark.parametrize("mode", ["recompute", "checkpoint", "keep"])
def test_a_compiled_body_draws_what_it_draws_without_compiling(mode):
    """And in every pass the same: out is linear in each weight, so that sum(weight * gradient) is out of that draw."""
    torch.manual_seed(0)
    layers = [nn.Dropout(0.3), nn.Flatten(), nn.Linear(27, 16, bias=False), nn.ReLU(), nn.Dropout(0.5)]
    plain = nn.Sequential(*layers, nn.Linear(16, 8, bias=False), nn.Dropout(0.2), nn.Linear(8, 4, bias=False)).double()
    runs = []
    for compiled in (False, True):
        module = copy.deepcopy(plain)
        partition_layers(module, PartitionPolicy(mode=mode, chunk_size=4, compile=compiled))
        torch.manual_seed(1)
        out = module(torch.randn(14, 3, 3, 3, dtype=torch.float64)).sum()
        out.backward()
        runs.append([out.detach(), *(parameter.grad for parameter in module.parameters())])
        for parameter in module.parameters():
            torch.testing.assert_close((parameter * parameter.grad).sum(), out, rtol=1e-12, atol=1e-12)
    for eager, of_compiled in zip(*runs, strict=True):
        torch.testing.assert_close(of_compiled, eager, rtol=1e-12, atol=1e-12)


def test_compiling_between_barriers_is_skipped_with_a_warning(caplog):
    module = build("resnet10t")
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=4, compile=True))
    with caplog.at_level("WARNING", logger="ds_wsi"):
        module(tiles(8))
    assert "compile: skipped for ResNet" in caplog.text
