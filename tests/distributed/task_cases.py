"""Steps of a run with a task, in float64, and the same steps by plain formulas over all of their bags."""

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from torch import nn

from ds_wsi.config import DsWsiConfig
from ds_wsi.engines.sharded.zero import full_state_dict
from ds_wsi.models import ModelConfig, build_model
from ds_wsi.runtime.seeding import step_seed
from ds_wsi.stacking import stack_bags
from ds_wsi.stacking.packs import pack_bags
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.stacking.randomness import bag_randomness, key_dropouts
from ds_wsi.tile_parallel.policy import TileParallelPolicy
from ds_wsi.training import prepare
from ds_wsi.training.epoch_plan import planned_steps
from ds_wsi.training.one_step import train_step
from ds_wsi.training.settings import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    TaskSettings,
    TrainSettings,
)
from ds_wsi.training.step_reader import StepReader, read_parts

WIDTH, TRAIN, SLIDES, SEED = 5, 11, 17, 4
GRADES = ("low", "mid", "high")


def write_cohort(folder: Path) -> None:
    """Features of 17 slides, 11 to train on, with all kinds of targets: ties in times, some cells empty."""
    generator = torch.Generator().manual_seed(0)
    (folder / "features").mkdir(parents=True)
    rows = [("slide_id", "split", "score", "grade", "a", "b", "months", "event", "center", "early")]
    for number in range(SLIDES):
        features = torch.randn(2 + number % 4, WIDTH, generator=generator)
        save_file({"features": features}, folder / "features" / f"s{number:02d}.safetensors")
        split = "train" if number < TRAIN else "validation" if number < 14 else "test"
        months = ("", "") if number == 3 else (1 + number * 5 % 7 // 2, int(number % 3 != 0))
        rows.append(
            (
                *(f"s{number:02d}", split, "" if number == 5 else f"{(number * 37 % 11) / 3:.4f}"),
                *(
                    "" if number == 2 else GRADES[number * 7 % 3],
                    "" if number % 4 == 1 else number % 2,
                    number * 5 % 3 // 2,
                ),
                *(*months, "xy"[number % 2], "" if number == 3 else int(number in (0, 2, 8) or number >= TRAIN)),
            )
        )
    with (folder / "cohort.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


class Counted(nn.Module):
    """Counts its calls as a norm counts batches, and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return outputs


def settings_of(folder: Path, name: str, task: dict, layout: dict, dropout: float) -> TrainSettings:
    """Gradient descent by one rate of 1: the step's gradient is what the weights lose."""
    return TrainSettings(
        DataSettings(
            manifest=str(folder / "cohort.csv"),
            features_dir=str(folder / "features"),
            tiles_dir=str(folder / "tiles"),
            classes=GRADES if task["task"] in ("ordinal", "several") else None,
        ),
        ModelSettings(aggregator="gated_abmil", dropout=dropout),
        OptimSettings(
            **{"num_train_epochs": 1, "learning_rate": 1.0, "weight_decay": 0.0, "optim": "sgd", "warmup_steps": 0},
            lr_scheduler_type="constant",
            per_device_train_batch_size=layout.get("slides", 1),
            gradient_accumulation_steps=layout.get("micro_steps", 1),
        ),
        RunSettings(
            output_dir=str(folder / f"run_{name}"), seed=SEED, disable_tqdm=True, fsdp=layout.get("engine") == "fsdp"
        ),
        DsWsiConfig(
            stacking=StackingPolicy(**layout.get("stacking", {})),
            tile_parallel=TileParallelPolicy(**layout.get("tile_parallel", {})),
        ),
        TaskSettings(**task),
    )


def run_steps(folder: Path, name: str, task: dict, layout: dict, dropout: float = 0.0, counted: bool = False) -> list:
    """The steps of an epoch: each one's stacks, weights before it, gradient, loss, and calls of the model."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    build, engine = prepare.build_slide_model, layout.get("engine", "ddp")

    def in_float64(*arguments):
        config, module = build(*arguments)
        module.answer = Counted() if counted else module.answer
        return config, module.double() if engine == "ddp" else module

    prepare.build_slide_model = in_float64
    try:
        run = prepare.prepare_run(settings_of(folder, name, task, layout, dropout), deepspeed_of(engine))
    finally:
        prepare.build_slide_model = build
    run.model.train()
    rows, done = run.cohort.rows("train"), []
    steps = StepReader(run, planned_steps(run, run.progress), read_parts(run, run.reading))
    for step, micro_steps in steps.of_epoch(0):
        before = weights_of(run, engine)
        calls = int(run.module.answer.calls) if counted else 0
        totals = train_step(run, step, micro_steps, 1.0, lambda: None)
        after = weights_of(run, engine)
        stacks = [[[rows[k] for k in group] for group in groups] for groups in step.plan.micro_steps]
        done.append(
            {
                "stacks": stacks,
                "before": before,
                "gradient": {key: before[key] - after[key] for key in before},
                "loss": totals.loss,
                "units": totals.units,
                "calls": (int(run.module.answer.calls) - calls) if counted else 0,
                "config": json.loads(json.dumps(asdict(run.config))),
            }
        )
        run.progress.end_step(totals.loss, totals.units, skipped=False)
    run.accelerator.free_memory()
    return done


def deepspeed_of(engine: str) -> dict | None:
    """The DeepSpeed JSON of a ZeRO stage; None of another engine."""
    if not engine.startswith("zero"):
        return None
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "SGD", "params": {"lr": "auto", "weight_decay": "auto"}},
        "zero_optimization": {"stage": int(engine[-1])},
        "zero_allow_untested_optimizer": True,
    }


def weights_of(run, engine: str) -> dict:
    """The whole parameters, copied; collective where ranks hold parts of them."""
    if engine == "ddp":
        return {key: value.detach().clone() for key, value in run.module.named_parameters()}
    names = {key for key, _ in run.module.named_parameters()}
    return {key: value.clone() for key, value in full_state_dict(run.module).items() if key in names}


def outputs_of(model, folder: Path, slides: list[int], number: int) -> torch.Tensor:
    """The model's outputs of all these slides in one stack, each with its own draws."""
    from safetensors.torch import load_file

    bags = [load_file(folder / "features" / f"s{k:02d}.safetensors")["features"].double() for k in slides]
    with bag_randomness([step_seed(SEED, number, k) for k in slides]):
        return model(stack_bags(bags)).logits


def table_of(folder: Path) -> list[dict]:
    """The cohort's rows."""
    with (folder / "cohort.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def plain_model(config, before: dict):
    """One process's model with the weights before a step."""
    model = build_model(ModelConfig.from_values(config, "the run")).double().train()
    model.load_state_dict(before, strict=False)
    key_dropouts(model.aggregator)
    pack_bags(model.aggregator, 0)
    return model


def number(text: str) -> float:
    """A cell's number; NaN where it is empty."""
    return float(text) if text else math.nan
