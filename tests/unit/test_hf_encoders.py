"""transformers' vision transformers as timm's: the same features, and what is of another kind refused by name."""

import json
from dataclasses import asdict

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from ds_wsi.models import ModelConfig, build_encoder, build_model, hf_weights, load_model, resolve_encoder
from ds_wsi.models.config import save_model
from ds_wsi.slides.policy import TilingPolicy

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
KINDS = {
    "vit": {"intermediate_size": 40, "layer_norm_eps": 0.1},
    "dinov2": {"mlp_ratio": 2, "layer_norm_eps": 0.1},
    "dinov2 swiglu": {"use_swiglu_ffn": True},
}


def repository(folder, kind, monkeypatch):
    """A folder as the Hub's, and the model that wrote it."""
    transformers = pytest.importorskip("transformers")
    name = {"vit": "ViT", "dinov2": "Dinov2"}[kind.split()[0]]
    config = getattr(transformers, f"{name}Config")(**SMALL, **KINDS[kind])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}')
    found_in(folder, monkeypatch)
    return model


def found_in(folder, monkeypatch):
    def fetch(repository, file):
        if not (folder / file).is_file():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        assert repository == "org/name"
        return str(folder / file)

    monkeypatch.setattr(hf_weights, "hf_hub_download", fetch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", ["pooled", "cls_mean"])
def test_features_are_transformers_own(tmp_path, monkeypatch, kind, features):
    original = repository(tmp_path, kind, monkeypatch)
    source = resolve_encoder("hf:org/name")
    assert (source.mean, source.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    encoder = build_encoder(
        source.architecture, source=source.name, features=features, tile_size_px=32, **source.options
    )
    tiles = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = original(tiles).last_hidden_state
        expected = tokens[:, 0] if features == "pooled" else torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
        torch.testing.assert_close(encoder.eval()(tiles), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(encoder, timm.models.VisionTransformer)


def test_a_run_s_folder_is_read_without_the_hub(tmp_path, monkeypatch):
    repository(tmp_path, "dinov2 swiglu", monkeypatch)
    source = resolve_encoder("hf:org/name")
    config = ModelConfig.of_source(source, "abmil", ("a", "b"), asdict(TilingPolicy(tile_size_px=32)))
    model = build_model(config, None, source.weights_name(False, None)).eval()
    save_model(tmp_path / "run", config, model.state_dict())
    monkeypatch.setattr(hf_weights, "hf_hub_download", None)
    loaded, _ = load_model(tmp_path / "run")
    tiles = torch.zeros(2, 3, 32, 32)
    assert torch.equal(loaded.encoder(tiles), model.encoder(tiles))


def test_other_classes_and_other_weights_are_refused(tmp_path, monkeypatch):
    repository(tmp_path, "vit", monkeypatch)
    tensors = load_file(tmp_path / "model.safetensors")
    source = resolve_encoder("hf:org/name")
    first = next(name for name in tensors if "layer.1" in name or "layers.1" in name)
    save_file({name: value for name, value in tensors.items() if name != first}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the weights of hf:org/name must be of its architecture"):
        build_encoder(source.architecture, source=source.name, tile_size_px=32, **source.options)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hibou", "auto_map": {"AutoModel": "a.b"}}))
    with pytest.raises(ValueError, match=r"got hf:org/name of 'hibou' with code of its own \(auto_map\), which"):
        resolve_encoder("hf:org/name")
