"""Encoder weights under the names that training scripts give them, and what is no encoder's."""

import argparse
import logging
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save_file

from ds_wsi.models.encoder import build_encoder
from ds_wsi.models.weights import load_encoder_weights
from ds_wsi.runtime.log import logger


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=7)


def fresh(name="resnet10t", **options):
    torch.manual_seed(1)
    return build_encoder(name, **options)


def same(encoder, state):
    return all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items() if key in state)


@pytest.fixture
def told(monkeypatch):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.setLevel(logging.INFO)
    return records


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "model.",
        "backbone.",
        "encoder.",
        "module._orig_mod.encoder.backbone.",
        "model.encoder.model.",
    ],
)
@pytest.mark.parametrize(
    "containers", [(), ("state_dict",), ("model_state_dict",), ("teacher",), ("model",), ("checkpoint", "model")]
)
def test_prefixes_and_containers(source, tmp_path, told, prefix, containers):
    values = OrderedDict((prefix + key, value) for key, value in source.state_dict().items())
    for name in reversed(containers):
        values = {name: values, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "groups": [{}]}}
    torch.save(values, tmp_path / "w.pth")
    encoder = fresh()
    load_encoder_weights(encoder, tmp_path / "w.pth")
    assert same(encoder, source.state_dict())
    before = "".join(f"{name}." for name in containers) + prefix
    (words,) = told
    assert f"{len(encoder.state_dict())} tensors are the encoder's" in words
    assert (f"begin with {before!r}" in words) == bool(before)
    assert f"{before}fc.weight" in words  # the classifier, left over


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_older_than_the_counters(source, tmp_path, suffix):
    state = {key: value for key, value in source.state_dict().items() if "num_batches_tracked" not in key}
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    encoder = build_encoder("resnet10t", path)
    assert same(encoder, state)
    assert int(encoder.bn1.num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("taken", "left"),
    [("teacher", "student"), ("state_dict", "state_dict_ema"), ("model", "model_ema"), ("encoder_q", "encoder_k")],
)
def test_of_two_networks_the_one_that_is_meant_is_taken(source, tmp_path, told, taken, left):
    state = source.state_dict()
    other = {key: value + 1 for key, value in state.items()}
    torch.save({left: other, taken: state}, tmp_path / "w.pth")
    encoder = fresh()
    load_encoder_weights(encoder, tmp_path / "w.pth")
    assert same(encoder, state)
    assert f"begin with '{taken}.'" in told[0]
    assert f"{left}." in told[0]


def test_two_networks_that_are_meant_alike_are_refused_unless_they_are_one(source, tmp_path):
    state = source.state_dict()
    torch.save({"one": state, "other": dict(state)}, tmp_path / "w.pth")
    load_encoder_weights(fresh(), tmp_path / "w.pth")
    torch.save({"one": state, "other": {key: value + 1 for key, value in state.items()}}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"of one network, got 2 that fit, under 'one\.', 'other\.'.*HINT: save the one"
    ):
        load_encoder_weights(fresh(), tmp_path / "w.pth")


def test_a_larger_network_is_not_taken_for_a_part_of_it(tmp_path):
    """Every tensor of ResNet-18 is in ResNet-34's file, of the same shape: its features would be nobody's."""
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"in parts of it that it has not \(layer1\.2\.conv1\.weight \[64, 64, 3, 3\]"):
        build_encoder("resnet18", tmp_path / "w.pth")
    torch.save(timm.create_model("vit_tiny_patch16_224", init_values=1e-5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"blocks\.0\.ls1\.gamma.*init_values"):
        build_encoder("vit_tiny_patch16_224", tmp_path / "w.pth", img_size=224)
    encoder = build_encoder("vit_tiny_patch16_224", tmp_path / "w.pth", img_size=224, init_values=1e-5)
    assert float(encoder.blocks[0].ls1.gamma.detach()[0]) == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_classifiers_within_other_parts_are_left_over(tmp_path, name):
    """ConvNeXt's `head.fc` lies beside `head.norm`, which the encoder has."""
    state = timm.create_model(name, num_classes=5).state_dict()
    torch.save(state, tmp_path / "w.pth")
    assert same(build_encoder(name, tmp_path / "w.pth"), state)


def test_positions_of_other_tiles_name_the_size(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"pos_embed \[1, 197, 192\] for \[1, 17, 192\].*HINT: .*--tile_size_px 224"):
        build_encoder("vit_tiny_patch16_224", tmp_path / "w.pth", img_size=64)


def test_another_number_of_channels_is_named(source, tmp_path):
    state = source.state_dict() | {"conv1.0.weight": torch.zeros(24, 1, 3, 3)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"conv1\.0\.weight \[24, 1, 3, 3\] for .*HINT: its images have 1 channels"):
        load_encoder_weights(fresh(), tmp_path / "w.pth")


def test_names_of_another_library_are_shown_beside_ours(tmp_path):
    torch.save({"embeddings.cls_token": torch.zeros(1, 1, 8)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"\(conv1\.0\.weight, .*got none .*\(embeddings\.cls_token.*HINT: --encoder"):
        load_encoder_weights(fresh(), tmp_path / "w.pth")
    torch.save([torch.zeros(1)], tmp_path / "w.pth")
    with pytest.raises(ValueError, match="must be a dictionary of tensors, got list"):
        load_encoder_weights(fresh(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "side", "unseen"),
    [
        ("vit_small_patch14_dinov2", 64, 8),
        ("vit_tiny_patch16_224", 72, 8),
        ("convnext_atto", 66, 2),
        ("vit_tiny_patch16_224", 64, 0),
        ("resnet10t", 65, 0),
    ],
)
def test_edges_that_no_patch_covers_are_told(told, name, side, unseen):
    positions = {"img_size": side} if name.startswith("vit") else {}
    encoder = build_encoder(name, tile_size_px=side, **positions).eval()
    words = [line for line in told if "does not see the last" in line]
    assert bool(words) == bool(unseen)
    tile = torch.rand(1, 3, side, side)
    cut = tile.clone()
    cut[:, :, side - (unseen or 1) :] = 0
    cut[:, :, :, side - (unseen or 1) :] = 0
    with torch.no_grad():
        assert torch.equal(encoder(tile), encoder(cut)) == bool(unseen)
    if unseen:
        assert f"the last {unseen} px" in words[0]
        side_seen = int(words[0].split("--tile_size_px ")[1].split(" ")[0])
        assert side_seen == side - unseen


def test_objects_beside_the_weights_are_named_and_the_remedy_works(source, tmp_path):
    """Lightning's checkpoints hold callbacks and arguments."""
    path, fixed = tmp_path / "w.ckpt", tmp_path / "fixed.pth"
    torch.save({"state_dict": source.state_dict(), "hparams": argparse.Namespace(lr=1)}, path)
    with pytest.raises(ValueError, match=r"got UnpicklingError at an object of argparse\.Namespace .*w\.ckpt") as error:
        build_encoder("resnet10t", path)
    remedy = str(error.value).split("tensors alone: ")[1].rstrip(".")
    eval(remedy, {"torch": torch, "PATH": path, "FILE": fixed})
    assert same(build_encoder("resnet10t", fixed), source.state_dict())
    path.write_bytes(fixed.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"whole file of tensors .*HINT: copy or download it again"):
        build_encoder("resnet10t", path)
