"""The peers of the partitioned layers give native gradients, in the encoder's own parameters."""

import sys
from types import ModuleType

import pytest
import timm
import torch
from torch import Tensor, nn

from ds_wsi.runtime.memory import ByteMeter
from launch.benchmarks import peers


def _relative(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()


def _step(encoder: nn.Module, forward: peers.Forward, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    encoder.zero_grad()
    torch.manual_seed(1)
    output = forward(images)
    output.backward(torch.randn(output.shape, dtype=output.dtype))
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    return output.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def _difference(encoder: nn.Module, forward: peers.Forward, images: Tensor) -> tuple[float, float]:
    """The largest relative differences of the output and of a parameter's gradient from native."""
    output, gradients = _step(encoder, forward, images)
    expected, expected_gradients = _step(encoder, peers.native(encoder), images)
    return _relative(output, expected), max(_relative(gradients[name], g) for name, g in expected_gradients.items())


def _resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=0)


def _vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2)


def _plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))


def _of_transformers() -> nn.Module:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
    return peers.TransformersViT(**sizes, image_size=32, patch_size=8)


def _budget(encoder: nn.Module) -> peers.Forward:
    return peers.torch_memory_budget(encoder, 0.3, "aot_eager")


ANY = (peers.native, peers.torch_checkpoint, peers.save_on_cpu)


@pytest.mark.parametrize(
    ("peer", "build"),
    [(peer, build) for peer in ANY for build in (_resnet, _vit, _plain)]
    + [(peers.accelerate_offload, build) for build in (_resnet, _vit, _of_transformers)]
    + [(_budget, _vit), (peers.transformers_checkpointing, _of_transformers)],
)
def test_peer_has_native_gradients(peer, build):
    torch.manual_seed(0)
    encoder = build().double().train()
    names = [(name, type(module)) for name, module in encoder.named_modules()]
    forward, images = peer(encoder), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert max(_difference(encoder, forward, images)) < 1e-12
    assert [(name, type(module)) for name, module in encoder.named_modules()] == names
    with torch.no_grad():
        next(encoder.parameters()).mul_(2)  # as an optimizer's step does
    assert max(_difference(encoder, forward, images)) < 1e-12


def _saved_bytes(forward: peers.Forward, images: Tensor) -> int:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda x: x):
        forward(images)
    return sum(saved)


@pytest.mark.parametrize("build", [_resnet, _vit, _plain])
def test_checkpoint_saves_less_and_leaves_the_encoder_as_it_was(build):
    encoder, images = build(), torch.randn(2, 3, 32, 32)
    before = _saved_bytes(encoder, images)
    assert _saved_bytes(peers.torch_checkpoint(encoder), images) < 0.7 * before
    assert _saved_bytes(encoder, images) == before


@pytest.mark.parametrize(
    ("peer", "build", "match"),
    [
        (peers.deepspeed_cpu_checkpointing, _vit, "must have the encoder on an accelerator, got cpu"),
        (peers.accelerate_offload, _plain, "must draw no random numbers .* got 3. HINT"),
        (peers.accelerate_offload, lambda: _plain().eval(), "must repeat a block, Sequential does not"),
        (peers.transformers_checkpointing, _vit, "must hold a Transformers model, got VisionTransformer"),
    ],
)
def test_a_peer_refuses_what_it_would_get_wrong(peer, build, match):
    with pytest.raises(ValueError, match=match):
        peer(build())


def test_trl_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.models.activation_offloading", None)
    with pytest.raises(ImportError, match="HINT: pip install trl"):
        peers.trl_offload(_plain())
    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))
    monkeypatch.setitem(sys.modules, "trl.models", ModuleType("trl.models"))
    monkeypatch.setitem(sys.modules, "trl.models.activation_offloading", ModuleType("activation_offloading"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="must have an accelerator, got none"):
        peers.trl_offload(_plain())


def test_the_memory_budget_is_of_what_is_saved_and_never_silently_ignored():
    encoder, images = _vit(), torch.randn(2, 3, 32, 32)
    saved = [_saved_bytes(peers.torch_memory_budget(encoder, budget, "aot_eager"), images) for budget in (0.0, 1.0)]
    assert saved[0] < 0.95 * saved[1]  # both count the weights
    with ByteMeter(), pytest.raises(ValueError, match="must run without a dispatch mode, got ByteMeter"):
        peers.torch_memory_budget(encoder, 0.5, "aot_eager")(images)


def test_blocks_are_what_the_encoder_repeats():
    names = [name for name, _ in peers.repeated_blocks(_resnet())]
    assert names == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert [name for name, _ in peers.repeated_blocks(_vit())] == ["blocks.0", "blocks.1"]


def test_lightstream_module_has_frozen_norms_and_learning_convolutions():
    encoder = peers.lightstream_module(2)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 128, 4, 4)
    assert not any(module.training for module in encoder.modules())
    learning = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert learning == {f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d)}


def test_lightstream_absent_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightstream.core.constructor", None)
    with pytest.raises(ImportError, match="HINT: pip install lightstream lightning"):
        peers.lightstream_stream(peers.lightstream_module(1), 256, 128)


def test_lightstream_refuses_norms_that_learn():
    with pytest.raises(ValueError, match="must be frozen"):
        peers.lightstream_stream(peers.lightstream_module(1).train(), 256, 128)
    with pytest.raises(ValueError, match="must be frozen"):
        peers.lightstream_stream(peers.lightstream_module(1).requires_grad_(True), 256, 128)


def test_lightstream_refuses_a_tile_larger_than_the_image():
    with pytest.raises(ValueError, match="tile_px must be in"):
        peers.lightstream_stream(peers.lightstream_module(1), 128, 256)


@pytest.mark.parametrize(
    ("stages", "image_px", "tile_px", "dtype", "output_bound", "gradient_bound"),
    [
        (1, 240, 160, torch.float64, 1e-14, 1e-13),
        (1, 120, 104, torch.float64, 1e-14, 1e-13),
        (1, 256, 192, torch.float32, 1e-5, 1e-4),
        (2, 320, 272, torch.float32, 1e-5, 1e-4),
    ],
)
def test_lightstream_equals_native(stages, image_px, tile_px, dtype, output_bound, gradient_bound):
    pytest.importorskip("lightstream", reason="pip install lightstream lightning", exc_type=ImportError)
    torch.manual_seed(0)
    encoder = peers.lightstream_module(stages).to(dtype)
    names = [type(module) for module in encoder.modules()]
    forward = peers.lightstream_stream(encoder, image_px, tile_px)
    assert [type(module) for module in encoder.modules()] == names
    image = torch.randn(1, 3, image_px, image_px, dtype=dtype)
    output, gradient = _difference(encoder, forward, image)
    assert output < output_bound
    assert gradient < gradient_bound
    with torch.no_grad():
        encoder[0].weight.mul_(2)  # as an optimizer's step does
    assert max(_difference(encoder, forward, image)) < gradient_bound


@pytest.mark.parametrize(
    ("image_px", "tile_px", "match"),
    [
        (256, 130, "multiples of the encoder's stride 4"),
        (258, 128, "multiples of the encoder's stride 4"),
        (256, 96, "receptive field"),
        (256, 100, "receptive field"),
    ],
)
def test_lightstream_refuses_sizes_that_it_gets_wrong(image_px, tile_px, match):
    pytest.importorskip("lightstream", reason="pip install lightstream lightning", exc_type=ImportError)
    with pytest.raises(ValueError, match=match):
        peers.lightstream_stream(peers.lightstream_module(1), image_px, tile_px)


def test_lightstream_is_quiet_and_leaves_the_grad_mode(capsys):
    pytest.importorskip("lightstream", reason="pip install lightstream lightning", exc_type=ImportError)
    with torch.no_grad():
        forward = peers.lightstream_stream(peers.lightstream_module(1), 128, 128)
        assert not torch.is_grad_enabled()
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="HINT: crop it"):
        forward(torch.zeros(1, 3, 64, 64))
