"""What DeepSpeed compiles and takes of the device: of every file in ds_configs, and of a user's own."""

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.builder import MissingCUDAException
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from ds_wsi.engines.accelerator import engine as accelerate
from ds_wsi.engines.accelerator.engine import EngineSettings
from ds_wsi.engines.deepspeed_json import config as deepspeed
from ds_wsi.engines.deepspeed_json.config import DEFAULT_BUCKET, bucket_bytes, bucket_words, read_config
from ds_wsi.engines.hf.models import SlideModelConfig, SlideModelForSlideClassification
from ds_wsi.engines.hf.trainer import apply_policies
from ds_wsi.engines.machine import ops
from ds_wsi.models import ModelConfig

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
TOOLKIT = "deepspeed.ops.op_builder.builder.assert_no_cuda_mismatch"


def on_a_gpu(monkeypatch, *, toolkit: bool = False, cpu_adam: bool = True, compiler: bool = True) -> list[str]:
    """A machine with a GPU, as far as the choice looks at one; returns what is compiled."""
    built: list[str] = []

    def no_toolkit(name=""):
        raise MissingCUDAException("CUDA_HOME does not exist, unable to compile CUDA op(s)")

    def load(self, verbose=False):
        if not cpu_adam:
            raise RuntimeError("Error building extension 'cpu_adam'")
        built.append("cpu_adam")

    monkeypatch.setattr(ops, "without_gpu", lambda: False)
    monkeypatch.setattr(ops, "is_installed", lambda name: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(ops.shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
    monkeypatch.setattr(CPUAdamBuilder, "load", load)
    monkeypatch.setattr(TOOLKIT, (lambda name="": True) if toolkit else no_toolkit)
    return built


def chosen(config):
    config = copy.deepcopy(config)
    ops.choose_adam(config)
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_config_of_ours_needs_nvcc(path, monkeypatch):
    config = read_config(path)
    without = chosen(config)  # this machine has no GPU, or tests do not use it
    if ops.without_gpu():
        assert without["optimizer"]["params"]["torch_adam"] is True
        assert without["zero_force_ds_cpu_optimizer"] is False
    built = on_a_gpu(monkeypatch)
    filled = chosen(config)
    offloads = "offload_optimizer" in config["zero_optimization"]
    assert filled["optimizer"]["params"].get("torch_adam", False) is not offloads
    assert built == (["cpu_adam"] if offloads else [])
    if not offloads:  # under Accelerate, the HF Trainer and ds_wsi.initialize nobody chooses
        assert config["optimizer"]["params"]["torch_adam"] is True


ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 2}}


def test_a_users_config_takes_torchs_adam_where_nvcc_is_missing(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    on_a_gpu(monkeypatch)
    assert chosen(ADAM)["optimizer"]["params"] == {"lr": 1e-3, "torch_adam": True}
    assert "FusedAdam, which cannot be built: nvcc of CUDA" in caplog.text
    assert "CUDA_HOME does not exist" in caplog.text
    on_a_gpu(monkeypatch, toolkit=True, compiler=False)
    assert chosen(ADAM)["optimizer"]["params"]["torch_adam"] is True
    assert "no g++ and no ninja on the PATH" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        ADAM,
        {"optimizer": {"type": "Lamb", "params": {}}},
        {"zero_optimization": {"stage": 2}},  # torch's own, of the caller
        {**ADAM, "optimizer": {"type": "Adam", "params": {"torch_adam": False}}},
    ],
)
def test_what_can_be_built_or_was_said_stays(config, monkeypatch):
    on_a_gpu(monkeypatch, toolkit=True)
    assert chosen(config) == config
    if "params" in config.get("optimizer", {}) and "torch_adam" in config["optimizer"]["params"]:
        on_a_gpu(monkeypatch)
        assert chosen(config) == config


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("config", [{**ADAM, "zero_optimization": OFFLOAD}, {"zero_optimization": OFFLOAD}])
@pytest.mark.parametrize("machine", [{"cpu_adam": False}, {"compiler": False}])
def test_an_offloaded_optimizer_falls_back_and_says_what_to_install(config, machine, monkeypatch, caplog):
    on_a_gpu(monkeypatch)
    assert chosen(config) == config
    on_a_gpu(monkeypatch, **machine)
    filled = chosen(config)
    assert filled["zero_force_ds_cpu_optimizer"] is False  # else DeepSpeed refuses torch's
    assert filled.get("optimizer", {}).get("params", {}).get("torch_adam", True) is True
    (message,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert message.endswith("HINT: install g++ and ninja.")
    assert "Error building extension" in message or "no g++" in message


def test_the_toolkit_is_asked_for_its_version():
    assert ops.is_installed("no such op") is False
    lacks = ops.toolkit_lacks()
    assert lacks is None or "nvcc of CUDA" in lacks


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_buckets_of_our_configs_fit_beside_a_bag(path):
    zero = read_config(path)["zero_optimization"]
    read = DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if not key.startswith("offload")})
    assert bucket_bytes({"zero_optimization": zero}) == (2 if read.overlap_comm else 1) * read.reduce_bucket_size * 4
    assert 2 * read.reduce_bucket_size * 4 <= 512 * 2**20
    assert read.allgather_bucket_size == read.reduce_bucket_size
    assert bucket_words({"zero_optimization": zero}) == ""


@pytest.mark.parametrize(
    ("zero", "buckets"),
    [
        ({"stage": 2}, 1),
        ({"stage": 1, "overlap_comm": True}, 2),
        ({"stage": 3}, 1),
        ({"stage": 3, "overlap_comm": True}, 1),
        ({"stage": 0}, 0),
        ({}, 0),
        ({"stage": 2, "contiguous_gradients": False}, 0),
    ],
)
def test_deepspeeds_default_is_told_with_its_cost_and_its_key(zero, buckets):
    assert DeepSpeedZeroConfig().reduce_bucket_size == DEFAULT_BUCKET
    config = {"zero_optimization": zero}
    assert bucket_bytes(config) == buckets * DEFAULT_BUCKET * 4
    words = bucket_words(config)
    if not buckets:
        assert words == ""
        return
    assert words.startswith(f"ZeRO's buckets take {buckets * 2e9 / 2**30:.1f} GiB")
    hint = json.loads("{" + words[words.index('"zero_optimization"') : words.index("}") + 1] + "}")
    assert (
        bucket_bytes({"zero_optimization": {**zero, **hint["zero_optimization"], "overlap_comm": False}}) == 2 * 10**8
    )


def test_every_engine_that_takes_a_config_suits_it_to_the_machine(tmp_path, monkeypatch, caplog):
    """The main job's, with "auto" filled in, and the HF Trainer's, in place."""
    caplog.set_level(logging.INFO)
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(deepspeed, "without_gpu", lambda: False)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "1")
    plugins = []
    monkeypatch.setattr(accelerate, "DeepSpeedPlugin", lambda hf_ds_config: plugins.append(hf_ds_config))
    settings = EngineSettings(1e-3, 0.0, 0.0, "adamw", 1, 1)
    accelerate._deepspeed_plugin(settings, copy.deepcopy(ADAM))
    of_trainer = copy.deepcopy(ADAM)
    model = SlideModelForSlideClassification(
        SlideModelConfig.of(ModelConfig(None, "abmil", ("normal", "tumor"), {}, in_dim=4))
    )
    arguments = {"ddp_broadcast_buffers": None, "gradient_accumulation_steps": 1, "world_size": 1}
    apply_policies(model, SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=of_trainer), **arguments))
    for config in (*plugins, of_trainer):
        assert config["optimizer"]["params"]["torch_adam"] is True
    told = [record.getMessage() for record in caplog.records]
    assert sum(message.startswith("ZeRO's buckets take 1.9 GiB") for message in told) == 2
