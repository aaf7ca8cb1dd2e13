"""FSDP2 without processes: its units, and what is refused before anything is sharded."""

from dataclasses import dataclass

import pytest
import timm
from torch import nn

from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator
from ds_wsi.engines.sharded import fsdp
from ds_wsi.models.encoder import NoEncoder
from ds_wsi.training.settings import RunSettings

BLOCKS = {
    "resnet18": [f"layer{layer}.{block}" for layer in (1, 2, 3, 4) for block in (0, 1)],
    "vit_tiny_patch16_224": [f"blocks.{block}" for block in range(12)],
    "convnext_atto": [f"stages.{stage}" for stage in range(4)],
    "efficientnet_b0": [
        f"blocks.{stage}.{block}" for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(depth)
    ],
}


def names_of(encoder: nn.Module) -> list[str]:
    blocks = {id(part) for part in fsdp.encoder_blocks(encoder)}
    return [name for name, part in encoder.named_modules() if id(part) in blocks]


@pytest.mark.parametrize("name", BLOCKS)
def test_units_are_the_blocks_of_an_encoder(name):
    assert names_of(timm.create_model(name, num_classes=0)) == BLOCKS[name]


def test_an_encoder_without_blocks_of_its_own_is_one_unit():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    assert names_of(layers) == []
    assert names_of(NoEncoder(8)) == []
    block = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    other = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    assert names_of(nn.Sequential(block, other)) == ["0", "1"]
    other["layer"].weight = block["layer"].weight  # a parameter can be in one unit only
    assert names_of(nn.Sequential(block, other)) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", r"--fsdp_version must be 2, got 1\. HINT: accelerate launch --use_fsdp --fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", r"--fsdp_offload_params must be false, got true\. HINT: a DeepSpeed JSON"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", r"--fsdp_activation_checkpointing must be false"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", r"--fsdp_auto_wrap_policy must be no_wrap, got size_based_wrap"),
    ],
)
def test_a_launcher_that_asks_for_something_else_is_refused(monkeypatch, name, value, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert fsdp.fsdp_plugin().reshard_after_forward is False
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        fsdp.fsdp_plugin()


def test_deepspeed_beside_fsdp_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--fsdp must not be given with --deepspeed, got x\.json\. HINT"):
        RunSettings(fsdp=True, deepspeed="x.json")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("ds_wsi.engines.accelerator.engine._deepspeed_plugin", lambda *_: object())
    with pytest.raises(ValueError, match=r"FSDP2 must not be used with DeepSpeed, got both\. HINT"):
        build_accelerator(EngineSettings(0.1, 0.0, 0.0, "sgd", 1, 1), tmp_path, {})


def test_a_version_of_accelerate_without_a_later_switch_is_given_none(monkeypatch):
    @dataclass
    class Earlier:
        fsdp_version: int
        reshard_after_forward: str
        mixed_precision_policy: object
        auto_wrap_policy: str
        cpu_offload: bool
        state_dict_type: str
        activation_checkpointing: bool
        cpu_ram_efficient_loading: bool

    monkeypatch.setattr(fsdp, "FullyShardedDataParallelPlugin", Earlier)
    assert fsdp.fsdp_plugin().activation_checkpointing is False


def test_one_process_is_refused(monkeypatch):
    class Alone:
        num_processes = 1

        def __init__(self, **keywords):
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as Accelerate does

    monkeypatch.setattr(fsdp, "Accelerator", Alone)
    with pytest.raises(ValueError, match=r"FSDP2 must have at least 2 processes .*, got 1\. HINT"):
        fsdp.build_with_fsdp(fsdp.fsdp_plugin())
    assert not fsdp.launched_with_fsdp()  # the next Accelerator would follow it
