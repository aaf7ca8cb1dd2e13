"""Adapters of linear layers: trained alone, merged on export."""

import sys
from dataclasses import asdict

import pytest
import torch
from logs import logged
from safetensors.torch import save_file
from torch import nn

from ds_wsi.models import ModelConfig, SlideModel, add_lora, build_encoder, build_model, load_model, merge_lora
from ds_wsi.models.lora import SETS, _ends_in
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking import stack_bags

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3}
CONFIG = ModelConfig(
    "vit_tiny_patch16_224",
    "gated_abmil",
    ("a", "b"),
    asdict(TilingPolicy(tile_size_px=32)),
    encoder_options=SMALL,
    dropout=0.0,
)
RANK, ALPHA = 3, 7.0


def without_peft():
    try:
        import peft  # noqa: F401
    except ImportError:
        return True
    return False


needs_peft = pytest.mark.skipif(without_peft(), reason="needs peft: pip install ds_wsi[lora]")


def adapted() -> SlideModel:
    torch.manual_seed(0)
    model = build_model(CONFIG).double()
    add_lora(model.encoder, RANK, ALPHA, ("qkv", "proj"), 32)
    return model.double().train()


def stack():
    generator = torch.Generator().manual_seed(1)
    return stack_bags([torch.randn(n, 3, 32, 32, dtype=torch.float64, generator=generator) for n in (2, 3)])


def train(model, steps=3):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(stack()).logits[:, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@needs_peft
def test_at_first_nothing_changes_then_the_adapters_alone_do():
    torch.manual_seed(0)
    plain = build_model(CONFIG).double().eval()
    model = adapted()
    torch.testing.assert_close(model(stack()).logits, plain(stack()).logits, rtol=1e-12, atol=1e-12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[f"encoder.{name}"]) != ("lora_" in name), name
    layers = {name for name, part in model.encoder.named_modules() if hasattr(part, "lora_A")}
    # The patches' convolution ends in "proj" as well, and is no linear layer.
    assert layers == {f"blocks.{block}.attn.{leaf}" for block in (0, 1) for leaf in ("qkv", "proj")}


@needs_peft
def test_merged_it_is_the_plain_model_and_loads_without_peft(tmp_path, monkeypatch):
    model = adapted()
    train(model)
    state = merge_lora(model.state_dict(), RANK, ALPHA)
    plain = build_model(CONFIG).double()
    plain.load_state_dict(state)
    expected = model.eval()(stack()).logits
    torch.testing.assert_close(plain.eval()(stack()).logits, expected, rtol=1e-12, atol=1e-12)
    bare = merge_lora({name: value for name, value in model.state_dict().items()}, RANK, 0.0)
    plain.load_state_dict(bare)
    assert (plain(stack()).logits - expected).abs().max() > 1e-4  # without the adapters it would be noticed
    monkeypatch.setitem(sys.modules, "peft", None)
    CONFIG.write(tmp_path / "config.json")
    save_file({name: value.float().contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    loaded, _ = load_model(tmp_path)
    torch.testing.assert_close(loaded.double()(stack()).logits, expected, rtol=1e-4, atol=1e-4)


@needs_peft
def test_merged_as_peft_merges():
    model = adapted()
    train(model)
    layer = model.encoder.blocks[0].attn.qkv
    state = merge_lora(model.state_dict(), RANK, ALPHA)
    layer.merge()
    torch.testing.assert_close(state["encoder.blocks.0.attn.qkv.weight"], layer.base_layer.weight.detach())


@needs_peft
def test_partitioned_it_computes_the_same():
    one, other = adapted(), adapted()
    partition_layers(other.encoder, PartitionPolicy(mode="recompute", chunk_size=2))
    for model in (one, other):
        for name, parameter in model.encoder.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
        model(stack()).logits.square().sum().backward()
    for (name, parted), plain in zip(other.named_parameters(), one.parameters(), strict=True):
        assert (parted.grad is None) == (plain.grad is None) == (not parted.requires_grad), name
        if parted.grad is not None:
            scale = plain.grad.abs().max().clamp_min(1e-6)
            assert (parted.grad - plain.grad).abs().max() <= 1e-10 * scale, name


@needs_peft
@pytest.mark.parametrize(
    ("options", "targets", "leaves", "left"),
    [
        ({}, ("attention",), ("attn.qkv", "attn.proj"), "fc1, fc2"),
        ({}, ("all",), ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), ""),
        ({"mlp_layer": "SwiGLU"}, ("all",), ("attn.qkv", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"), ""),
        ({"mlp_layer": "SwiGLU"}, ("qkv", "attention"), ("attn.qkv", "attn.proj"), "fc1_g, fc1_x, fc2"),
    ],
)
def test_feed_forward_layers_are_covered_or_told(options, targets, leaves, left):
    encoder = build_encoder("vit_tiny_patch16_224", tile_size_px=32, **SMALL, img_size=32, **options)
    with logged() as records:
        add_lora(encoder, 2, 4.0, targets, 32)
    layers = {name for name, part in encoder.named_modules() if hasattr(part, "lora_A")}
    assert layers == {f"blocks.{block}.{leaf}" for block in (0, 1) for leaf in leaves}
    assert any("LoRA leaves the feed-forward layers" in line for line in records) == bool(left)
    assert not left or f"feed-forward layers {left} as they are" in records[-1]


@needs_peft
def test_transformers_names_are_covered():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    for kind in ("ViT", "Dinov2"):
        config = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=16)
        encoder = getattr(transformers, f"{kind}Model")(config)
        linear = [name for name, part in encoder.named_modules() if isinstance(part, nn.Linear) and "pool" not in name]
        assert [name for name in linear if not _ends_in(name, SETS["all"])] == []


@needs_peft
@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("vit_tiny_patch16_224", ("qkw",), r"got 'qkw'\. HINT: did you mean qkv"),
        ("resnet10t", ("qkv",), r"ResNet, got 'qkv'\. HINT: it has none; --freeze_until"),
        ("eva02_tiny_patch14_224", ("qkv",), r"layers that Eva calls, got blocks\.0\.attn\.qkv"),
    ],
)
def test_layers_that_cannot_have_adapters_are_refused(name, targets, message):
    options = {"img_size": 28, "depth": 1} if "eva" in name else {**SMALL, "img_size": 32} if "vit" in name else {}
    encoder = build_encoder(name, tile_size_px=28 if "eva" in name else 32, **options)
    with pytest.raises(ValueError, match=message):
        add_lora(encoder, 2, 4.0, targets, 28 if "eva" in name else 32)


def test_without_peft_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'needs peft.*HINT: pip install "ds_wsi\[lora\]"'):
        add_lora(nn.Sequential(nn.Linear(2, 2)), 2, 4.0, ("0",), 32)
