"""A sample of the zoo in every test run: exact in mode lean and in another; and the zoo's measure sees faults."""

import sys

import pytest
import torch
from torch import nn

from .entry import ZooModel
from .measure import measure, reference
from .models import MODELS
from .sweep import cases

# key, the second mode, with dropout and drop path
SAMPLE = [
    ("pathology/CTransPath", "keep", False),
    ("pathology/H0-mini", "recompute", True),
    ("pathology/KimiaNet DenseNet-121", "checkpoint", False),
    ("timm/vision_transformer/vit_tiny_patch16_224", "offload", True),
    ("timm/byobnet/test_byobnet", "stream", False),
    ("timm/levit/levit_128s", "keep", False),
    ("timm/starnet/starnet_s050", "checkpoint", True),
    ("timm/xcit/xcit_nano_12_p16_224", "stream", False),
    ("torchvision/shufflenet_v2_x0_5", "keep", False),
    ("torchvision/MaxVit", "lean", False),
    ("transformers/ViTModel", "checkpoint", False),
    ("transformers/ResNetModel", "recompute", False),
    ("transformers/SwinModel", "keep", True),
]


@pytest.mark.parametrize(("key", "second", "draws"), SAMPLE, ids=[key for key, *_ in SAMPLE])
def test_a_model_of_the_zoo_is_exact(key, second, draws):
    plain = reference(MODELS[key], "batch", train=True, draws=draws)
    assert plain.draws == draws
    for mode in {"lean", second}:
        result = measure(plain, "batch", mode)
        assert result.status == "exact", f"{mode}: {result}"


def test_rows_of_a_large_image_are_exact():
    plain = reference(MODELS["timm/byobnet/test_byobnet"], "spatial", train=True, draws=False)
    result = measure(plain, "spatial", "lean")
    assert result.status == "exact", result


class Peers(nn.Module):
    """Each tile reads the others."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x):
        features = self.layer(x.flatten(1))
        return features + torch.softmax(features @ features.T, dim=-1) @ features


class Unscaled(nn.Module):
    """Drop path whose mask a partition must not lose, and a norm after it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.8).div(0.8) * self.conv(x) + 1).mean((2, 3))


def entry(kind):
    return ZooModel(f"own/{kind.__name__}", lambda draws: kind(), (3, 2, 2))


def outcome(plain, monkeypatch, spoilt):
    """What the measure says of a module that is `spoilt` in place of being partitioned."""
    monkeypatch.setattr(sys.modules[measure.__module__], "partition_layers", spoilt)
    return measure(plain, "batch", "lean")


def test_the_measure_sees_tiles_that_are_computed_apart(monkeypatch):
    def apart(module, policy):
        forward = module.forward
        module.forward = lambda x: torch.cat([forward(part) for part in x.split(policy.chunk_size)])

    plain = reference(entry(Peers), "batch", train=True, draws=False)
    result = outcome(plain, monkeypatch, apart)
    assert result.status == "wrong"
    assert result.error > 1e-3
    plain = reference(MODELS["timm/byobnet/test_byobnet"], "batch", train=True, draws=False)
    assert outcome(plain, monkeypatch, apart).status == "wrong"


def test_the_measure_sees_a_mask_that_is_not_scaled(monkeypatch):
    def unscaled(module, policy):
        module.forward = lambda x: module.norm(
            x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.8) * module.conv(x) + 1
        ).mean((2, 3))

    plain = reference(entry(Unscaled), "batch", train=True, draws=False)
    assert plain.draws
    assert outcome(plain, monkeypatch, unscaled).status == "wrong"
    assert outcome(plain, monkeypatch, lambda module, policy: None).status == "exact"


def test_the_measure_tells_a_refusal_from_a_crash(monkeypatch):
    plain = reference(entry(Peers), "batch", train=True, draws=False)
    result = outcome(plain, monkeypatch, lambda module, policy: 1 / 0)
    assert (result.status, result.detail.split(":")[0]) == ("crashed", "ZeroDivisionError")
    monkeypatch.undo()
    module = entry(Peers)
    plain = reference(module, "batch", train=True, draws=False)
    plain.module.grad_checkpointing = True
    result = measure(plain, "batch", "lean")
    assert result.status == "refused"
    assert "must not checkpoint itself" in result.detail


def test_every_model_has_cases_and_a_key_of_its_own():
    keys = [case.key for model in MODELS.values() for case in cases(model, ["batch", "spatial"], ["lean"], ["train"])]
    assert len(keys) == len(set(keys)) >= len(MODELS) > 180
