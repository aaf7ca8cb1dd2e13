"""Steps of a run beside a teacher, in float64, and the same steps by plain autograd over whole bags."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from slide_files import write_slide

from ds_wsi.bags.augment import augmentation
from ds_wsi.bags.bag import FailureLog, TileDataset, TileRequest
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.policy import AugmentPolicy, ReadPolicy
from ds_wsi.bags.sampler import choose_tiles
from ds_wsi.config import DsWsiConfig
from ds_wsi.evaluation.extract import build_extractor, extract_features
from ds_wsi.models import ModelConfig, build_model
from ds_wsi.partition import PartitionPolicy
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking.policy import StackingPolicy
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

TILE, SIDES, SEED, TRAIN = 32, (2, 3, 1, 3, 2, 2, 2), 0, 5
ENCODER, WEIGHT = "test_vit", 3.0
TILING = TilingPolicy(tile_size_px=TILE, mpp=0.5, tissue="grey", min_tissue_fraction=0.0)
AUGMENT = AugmentPolicy(flips=True, colour=0.2)
DRAWN = 3  # tiles that are drawn of a slide


def write_cohort(folder: Path) -> None:
    """Seven slides of 2 to 6 tiles, five to train on, and the features of the encoder that runs start from."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    rows = [("slide_id", "path", "label", "score", "split")]
    for number, side in enumerate(SIDES):
        colours = random.integers(30, 220, (side, 2, 1, 1, 3)).repeat(TILE, 2).repeat(TILE, 3)
        pixels = np.concatenate([np.concatenate(list(row), 1) for row in colours])
        pixels = (pixels + random.integers(-20, 20, pixels.shape)).astype(np.uint8)
        path = write_slide(folder / f"s{number}.tiff", pixels, mpp=0.5)
        split = "train" if number < TRAIN else ("validation", "test")[number - TRAIN]
        # A slide without a target: bags of a step are more than its labelled units.
        rows.append((f"s{number}", str(path), "ab"[number % 2], "" if number == 1 else f"{number * 1.5}", split))
    with (folder / "cohort.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    cohort = load_cohort(folder / "cohort.csv", TILING, tiles_dir=folder / "tiles")
    model, config = build_extractor(ENCODER, TILING)
    failures = FailureLog(cohort.manifest.slides, cohort.grids, 0.0)
    written = list(extract_features(model, config, cohort, folder / "teacher", ReadPolicy(workers=0), failures))
    assert [slide.n_rows for slide in written] == [2 * side for side in SIDES]


def settings_of(folder: Path, name: str, layout: dict) -> TrainSettings:
    """Gradient descent by one rate of 1: the step's gradient is what the weights lose."""
    task = layout.get("task")
    return TrainSettings(
        DataSettings(manifest=str(folder / "cohort.csv"), tiles_dir=str(folder / "tiles")),
        ModelSettings(
            encoder=ENCODER, aggregator="gated_abmil", dropout=0.0, freeze_encoder_epochs=layout.get("rests", 0)
        ),
        OptimSettings(
            **{"num_train_epochs": 2, "learning_rate": 1.0, "weight_decay": 0.0, "optim": "sgd", "warmup_steps": 0},
            lr_scheduler_type="constant",
            encoder_learning_rate=1.0,
            per_device_train_batch_size=layout.get("slides", 1),
            gradient_accumulation_steps=layout.get("micro_steps", 1),
            distill=str(folder / "teacher"),
            distill_weight=WEIGHT,
            distill_loss=layout.get("loss", "mse"),
        ),
        RunSettings(
            output_dir=str(folder / f"run_{name}"), seed=SEED, disable_tqdm=True, fsdp=layout.get("engine") == "fsdp"
        ),
        DsWsiConfig(
            tiling=TILING,
            augment=AUGMENT,
            reading=ReadPolicy(workers=0, tiles_per_slide=DRAWN),
            stacking=StackingPolicy(**layout.get("stacking", {})),
            tile_parallel=TileParallelPolicy(**layout.get("tile_parallel", {})),
            partition=PartitionPolicy(mode=layout.get("partition", "native"), **layout.get("chunks", {})),
        ),
        TaskSettings(task="regression", label_column=("score",), loss="mse") if task else TaskSettings(),
    )


def run_steps(folder: Path, name: str, layout: dict) -> list:
    """The steps of an epoch: each one's slides, weights before it, gradient, loss and distance."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    replace = prepare.replace_forwards

    def then_in_float64(module, *others):
        forwards = replace(module, *others)
        module.double()  # after the teacher has been compared with the weights
        return forwards

    prepare.replace_forwards = then_in_float64
    try:
        run = prepare.prepare_run(settings_of(folder, name, layout), None)
    finally:
        prepare.replace_forwards = replace
    run.module.warming_up = bool(layout.get("rests"))
    run.model.train()
    rows, done = run.cohort.rows("train"), []
    steps = StepReader(run, planned_steps(run, run.progress), read_parts(run, run.reading))
    for step, micro_steps in steps.of_epoch(0):
        before = {key: value.detach().clone() for key, value in run.module.named_parameters()}
        totals = train_step(run, step, micro_steps, 1.0, lambda: None)
        after = {key: value.detach().clone() for key, value in run.module.named_parameters()}
        stacks = [[rows[k] for k in group] for groups in step.plan.micro_steps for group in groups]
        done.append(
            {
                "stacks": [stack for stack in stacks if stack],
                "before": before,
                "gradient": {key: before[key] - after[key] for key in before},
                **{"loss": totals.loss, "distilled": totals.distilled, "units": totals.units},
                "config": json.loads(json.dumps(asdict(run.config))),
            }
        )
        run.progress.end_step(totals.loss, totals.units, skipped=False)
    run.accelerator.free_memory()
    return done


def plain_step(folder: Path, layout: dict, step: dict, parts: int = 1) -> tuple:
    """A step's gradient by autograd over whole bags, its loss and distance.

    With `parts`, as if each rank's part of a bag were divided by its own number of tiles.
    """
    cohort = load_cohort(folder / "cohort.csv", TILING, tiles_dir=folder / "tiles")
    model = build_model(ModelConfig.from_values(step["config"], "the run")).double().train()
    model.load_state_dict(step["before"], strict=False)
    slides = [row for stack in step["stacks"] for row in stack]
    reader = TileDataset(cohort.manifest.slides, cohort.tile_grids, 1)
    losses, distances = [], []
    for row in slides:
        grid = cohort.tile_grids[row]
        chosen = choose_tiles(len(grid), DRAWN, (SEED, 0, row)) or tuple(range(len(grid)))
        tiles = reader[TileRequest(row, 0, 0, True, chosen)].tiles
        tiles = augmentation(AUGMENT, (SEED, 0, row))(tiles)
        scaled = (tiles.float() / 255 - model.mean.float()) / model.std.float()  # in float32, as the model does
        features = model.encoder(scaled.double())
        saved = load_file(folder / "teacher" / f"s{row}.safetensors")
        row_of = {tuple(xy): k for k, xy in enumerate(saved["coords"].tolist())}
        there = torch.stack([saved["features"][row_of[tuple(map(int, grid.coords[k]))]] for k in chosen]).double()
        if layout.get("loss") == "cosine":
            lengths = features.norm(dim=1) * there.norm(dim=1)
            each = 1 - (features * there).sum(1) / lengths
        else:
            each = (features - there).pow(2).sum(1) / features.shape[1]
        distances.append(sum(part.mean() for part in each.tensor_split(parts) if len(part)) / parts)
        logits = model.aggregate(_one_bag(features)).logits[0]
        losses.append(_loss(cohort.manifest.slides[row], layout, logits, step))
    labelled = [loss for loss in losses if loss is not None]
    total = sum(labelled) / len(labelled) + WEIGHT * sum(distances) / len(slides)
    total.backward()
    gradient = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
    return gradient, float(sum(labelled)), float(sum(distances))


def _one_bag(features):
    from ds_wsi.stacking import stack_bags

    return stack_bags([features])


def _loss(slide, layout, logits, step):
    if not layout.get("task"):
        return -logits.log_softmax(0)[slide.class_index]
    if slide.slide_id == "s1":
        return None
    scale = step["config"]["task"]
    score = 1.5 * int(slide.slide_id[1:])
    return (logits[0] - (score - scale["mean"]) / scale["std"]) ** 2
