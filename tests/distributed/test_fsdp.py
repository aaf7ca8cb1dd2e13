"""The main job under FSDP2 on two ranks: runs that are stopped and resumed, and what lives on shards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import run_ranks

pytestmark = pytest.mark.distributed


def settings_of(manifest: str, folder: str, **changes: Any) -> Any:
    """Of a run of two epochs; `changes` are fields by group, as `optim={"ema_decay": 0.9}`."""
    from ds_wsi.config import DsWsiConfig
    from ds_wsi.training.settings import DataSettings, ModelSettings, OptimSettings, RunSettings, TrainSettings

    policies = DsWsiConfig()
    policies = replace(
        policies, tiling=replace(policies.tiling, tile_size_px=64), reading=replace(policies.reading, workers=0)
    )
    for name, fields in changes.pop("policies", {}).items():
        policies = replace(policies, **{name: replace(getattr(policies, name), **fields)})
    settings = TrainSettings(
        DataSettings(manifest=manifest, tiles_dir=f"{Path(folder).parent}/tiles"),
        ModelSettings(encoder="resnet10t", dropout=0.2),
        OptimSettings(num_train_epochs=2, learning_rate=0.01, warmup_steps=0),
        RunSettings(output_dir=folder, fsdp=True),
        policies,
    )
    return replace(settings, **{group: replace(getattr(settings, group), **f) for group, f in changes.items()})


def train(settings: Any) -> Any:
    """The run at its end, without its evaluation."""
    from accelerate.state import AcceleratorState, GradientState

    from ds_wsi.engines.accelerate import Accelerator
    from ds_wsi.training import loop

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    ended: list[Any] = []
    loop.finish = lambda run, started: ended.append(run) or {}
    Accelerator.end_training = lambda self: None  # it would end the group
    loop.train(settings)
    return ended[-1]


def whole_state(run: Any) -> dict[str, torch.Tensor]:
    from ds_wsi.engines.deepspeed import full_state_dict

    return full_state_dict(run.module) | (run.average.weights() if run.average else {})


