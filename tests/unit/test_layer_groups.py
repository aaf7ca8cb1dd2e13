"""Layers of encoders, and which parameters do not decay: by name, for models of several families."""

import pytest
import timm
import timm.optim
import torch
from logs import logged
from tiny_runs import train, write_cohort
from torch import nn

from ds_wsi.models import SlideModel, build_aggregator, build_encoder, freeze_until
from ds_wsi.models.layer_ids import decays, layer_ids
from ds_wsi.training.parameter_groups import parameter_groups, words_of
from ds_wsi.training.settings import OptimSettings

SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 3}


def vit(**options):
    return build_encoder("vit_tiny_patch16_224", tile_size_px=32, img_size=32, **SMALL, **options)


def test_layers_of_a_vision_transformer():
    ids, last = layer_ids(vit(reg_tokens=2))
    assert last == 4
    assert {name for name, layer in ids.items() if layer == 0} == {
        *("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    }
    assert all(ids[name] == int(name.split(".")[1]) + 1 for name in ids if name.startswith("blocks."))
    assert {name for name, layer in ids.items() if layer == 4} == {"norm.weight", "norm.bias"}


def test_layers_are_those_of_timm_but_for_the_last_norm():
    """Timm counts from the classifier's layer, which is the aggregator's here."""
    whole = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, **SMALL)
    groups = timm.optim.param_groups_layer_decay(whole, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    ids, last = layer_ids(vit())
    for name, parameter in whole.named_parameters():
        if not name.startswith(("norm.", "head.")):
            assert scales[id(parameter)] == 0.5 ** (last - ids[name]), name


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet10t", {"conv1.0.weight": 0, "bn1.weight": 0, "layer1.0.conv1.weight": 1, "layer4.0.bn2.bias": 4}),
        ("convnext_atto", {"stem.0.weight": 0, "stages.0.blocks.0.norm.weight": 1, "head.norm.weight": 13}),
        ("swin_s3_tiny_224", {"patch_embed.proj.weight": 0, "layers.0.blocks.1.mlp.fc1.weight": 2, "norm.weight": 13}),
    ],
)
def test_layers_of_others_are_those_of_timms_grouping(name, layers):
    with torch.device("meta"):
        ids, last = layer_ids(timm.create_model(name, num_classes=0))
    assert {key: ids[key] for key in layers} == layers
    assert last == {"resnet10t": 5, "convnext_atto": 13, "swin_s3_tiny_224": 13}[name]


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.end = nn.Linear(3, 3)
        self.start = nn.Parameter(torch.zeros(1, 3))


def test_layers_of_a_list_of_blocks_and_of_nothing():
    ids, last = layer_ids(Blocks())
    assert ids == {
        **{"start": 0, "blocks.0.weight": 1, "blocks.0.bias": 1, "blocks.1.weight": 2, "blocks.1.bias": 2},
        **{"end.weight": 3, "end.bias": 3},
    }
    assert last == 3
    with pytest.raises(
        ValueError, match=r"--layer_decay must be given with an encoder whose .*, got Sequential, which"
    ):
        layer_ids(nn.Sequential(nn.Linear(3, 3)))


class Adapted(nn.Module):
    """A linear layer with peft's names."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})


def test_an_adapter_is_of_the_layer_that_it_adapts():
    encoder = vit().requires_grad_(False)
    for block in encoder.blocks:
        block.attn.qkv = Adapted(block.attn.qkv)
    groups = parameter_groups(SlideModel(encoder, build_aggregator("abmil", 24, 2)), 0.5, no_decay_1d=True)
    scales = {name: group["lr_scale"] for group in groups for name in group["params"] if group["of_encoder"]}
    assert len(scales) == 2 * 3
    assert all(scales[name] == 0.5 ** (3 - int(name.split(".")[2])) for name in scales), scales


def test_what_does_not_decay():
    model = build_encoder(
        "swin_s3_tiny_224", tile_size_px=224, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)
    )
    free = {name.rpartition(".")[2] for name, p in model.named_parameters() if not decays(model, name, p)}
    assert free == {"weight", "bias", "relative_position_bias_table"}
    matrices = [name for name, p in model.named_parameters() if p.dim() > 1 and "bias_table" not in name]
    assert all(decays(model, name, model.get_parameter(name)) for name in matrices)
    transmil = build_aggregator("transmil", 8, 2, embed_dim=8, heads=2)
    free = {name for name, p in transmil.named_parameters() if p.dim() > 1 and not decays(transmil, name, p)}
    assert free == {"class_token"}
    whole = vit(reg_tokens=2)
    free = {name for name, p in whole.named_parameters() if p.dim() > 1 and not decays(whole, name, p)}
    assert free == {"cls_token", "reg_token", "pos_embed"}


def test_groups_hold_what_is_trained_once_and_the_aggregator_first():
    model = SlideModel(vit(), build_aggregator("abmil", 24, 2))
    freeze_until(model.encoder, "blocks.1")
    groups = parameter_groups(model, 0.5, no_decay_1d=True)
    named = [name for group in groups for name in group["params"]]
    assert sorted(named) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert [(group["of_encoder"], group["lr_scale"], group["decays"]) for group in groups] == [
        *((False, 1.0, False), (False, 1.0, True)),
        *((True, 0.25, False), (True, 0.25, True), (True, 0.5, False), (True, 0.5, True), (True, 1.0, False)),
    ]
    assert words_of(groups).startswith("3 layers of the encoder, at 0.25 to 1 of its rate, ")


def test_a_run_says_its_groups_and_goes_without_an_encoder(tmp_path):
    data = write_cohort(tmp_path)
    with logged() as lines:
        assert train(data, tmp_path / "run", "--no_decay_1d", "--layer_decay", "0.5", epochs=1) == 0
    assert "layer_decay: without effect on features" in lines
    assert "parameter groups: 3 of 6 parameters without weight decay" in lines


@pytest.mark.parametrize("layer_decay", [0.0, -1.0, 1.5, float("nan")])
def test_a_factor_that_is_none_is_refused(layer_decay):
    with pytest.raises(ValueError, match=r"--layer_decay must be in \(0, 1\]"):
        OptimSettings(layer_decay=layer_decay)
