import json
from dataclasses import asdict

import pytest
import torch
from logs import logged
from safetensors.torch import save_file

from ds_wsi.config import read_section
from ds_wsi.models.config import ModelConfig, build_model, load_model
from ds_wsi.models.encoder import build_encoder
from ds_wsi.models.weights import load_encoder_weights
from ds_wsi.slides.policy import TilingPolicy

TILING = TilingPolicy(tile_size_px=32)


def config_of(**values):
    return ModelConfig(
        **{
            "encoder": "resnet18",
            "aggregator": "mean",
            "classes": ("normal", "tumor"),
            "tiling": asdict(TILING),
            **values,
        }
    )


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_encoder("resnet18")


def fresh():
    torch.manual_seed(1)
    return build_encoder("resnet18")


def same(first, second):
    return all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


def write_state(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


class TestConfig:
    def test_what_is_written_is_read(self, tmp_path):
        config = config_of(dropout=0.25, mean=(0.5, 0.5, 0.5))
        config.write(tmp_path / "config.json")
        read = ModelConfig.read(tmp_path / "config.json")
        assert (read.encoder, read.aggregator, read.classes) == ("resnet18", "mean", ("normal", "tumor"))
        assert (read.mean, read.std, read.dropout) == (config.mean, config.std, 0.25)
        assert read.tile_size_px == 32
        # JSON has no tuples: the section's reader gives the policy back
        assert read_section({"tiling": read.tiling}).tiling == TILING

    def test_what_is_no_config_is_named(self, tmp_path):
        path = tmp_path / "config.json"
        with pytest.raises(ValueError, match=r"must hold config\.json, got none at .*config\.json"):
            ModelConfig.read(path)
        config_of().write(path)
        values = json.loads(path.read_text())
        for change in ({"format": "x"}, {"version": 9}, {"format": None}):
            path.write_text(json.dumps({**values, **change}))
            with pytest.raises(ValueError, match=r"format ds_wsi\.SlideModel, version 1 to 8"):
                ModelConfig.read(path)
        path.write_text(json.dumps({key: value for key, value in values.items() if key != "std"}))
        with pytest.raises(ValueError, match=r"must hold the keys"):
            ModelConfig.read(path)
        path.write_text(json.dumps({**values, "more": 1}))
        with pytest.raises(ValueError, match=r"must hold the keys .*more"):
            ModelConfig.read(path)
        path.write_text("{")
        with pytest.raises(ValueError):
            ModelConfig.read(path)

    def test_an_exported_model_is_rebuilt_in_evaluation_mode(self, tmp_path):
        model = build_model(config_of())
        config_of().write(tmp_path / "config.json")
        with pytest.raises(ValueError, match=r"must hold model\.safetensors"):
            load_model(tmp_path)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        loaded, config = load_model(tmp_path)
        assert not loaded.training
        assert config.classes == ("normal", "tumor")
        assert same(model, loaded)

    def test_position_embeddings_are_built_for_the_tiles(self):
        model = build_model(config_of(encoder="vit_tiny_patch16_224"))
        assert model.encoder.pos_embed.shape[1] == 1 + (32 // 16) ** 2

    def test_an_encoder_that_timm_does_not_have_is_named(self):
        with pytest.raises(ValueError, match=r"got 'resnet1888'.*HINT: did you mean"):
            build_model(config_of(encoder="resnet1888"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_weights_round_trip(encoder, tmp_path, name, prefix):
    state = {f"{prefix}{key}": value for key, value in encoder.state_dict().items()}
    other = fresh()
    assert not same(encoder, other)
    load_encoder_weights(other, write_state(tmp_path / name, state))
    assert same(encoder, other)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_weights_nested_as_training_scripts_do(encoder, tmp_path, wrapper):
    path = write_state(tmp_path / "w.pth", {wrapper: encoder.state_dict(), "epoch": 3})
    other = build_encoder("resnet18", path)
    assert same(encoder, other)


def test_what_the_file_holds_beyond_the_encoder_is_logged(encoder, tmp_path):
    state = {**encoder.state_dict(), "fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)}
    with logged() as records:
        load_encoder_weights(fresh(), write_state(tmp_path / "w.safetensors", state))
    assert len(records) == 1
    assert "2 tensors are not the encoder's" in records[0]
    assert "fc.weight" in records[0]


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_missing_tensors_and_other_shapes_are_named_and_nothing_is_loaded(encoder, tmp_path, name):
    state = {key: value for key, value in encoder.state_dict().items() if key != "layer1.0.conv1.weight"}
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    other, untouched = fresh(), fresh()
    with pytest.raises(ValueError, match="encoder weights must fit the encoder") as caught:
        load_encoder_weights(other, write_state(tmp_path / name, state))
    text = str(caught.value)
    assert f"1 of {len(encoder.state_dict())} tensors missing (layer1.0.conv1.weight)" in text
    assert "1 of another shape (conv1.weight [64, 1, 7, 7] for [64, 3, 7, 7])" in text
    assert "HINT" in text
    assert same(other, untouched)


def test_a_missing_file_is_named(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"none\.pt \(missing\).*HINT: check --encoder_weights"):
        load_encoder_weights(encoder, tmp_path / "none.pt")


class Code:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_pickled_code_is_refused_and_not_run(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": encoder.state_dict(), "code": Code()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"tensors and nothing else, got UnpicklingError .*w\.pt"):
        load_encoder_weights(fresh(), tmp_path / "w.pt")
    assert not (tmp_path / "executed").exists()
