"""The main job on features: equal to a plain loop, to the slide path with a frozen encoder, and to itself resumed."""

import csv
import json
import shutil
from dataclasses import replace

import h5py
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file

import ds_wsi.training.model
from ds_wsi.bags.policy import AugmentPolicy, ReadPolicy
from ds_wsi.bags.sampler import choose_tiles, plan_epoch
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.cli import main
from ds_wsi.config import DsWsiConfig
from ds_wsi.models import build_encoder, build_model, load_model
from ds_wsi.models.config import ModelConfig
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking import stack_bags
from ds_wsi.training.loop import train
from ds_wsi.training.settings import DataSettings, ModelSettings, OptimSettings, RunSettings, TrainSettings

LENGTHS = (5, 3, 9, 1, 4, 6, 2)  # five to train on, two to test
WIDTH, EPOCHS, LEARNING_RATE, SEED = 12, 3, 0.5, 3


@pytest.fixture(autouse=True)
def _fresh_engine():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def cohort(tmp_path):
    """Files of all three kinds, and a manifest that names no slide."""
    generator = torch.Generator().manual_seed(0)
    bags, folder = [], tmp_path / "features"
    folder.mkdir()
    rows = [("slide_id", "label", "split")]
    for number, length in enumerate(LENGTHS):
        features = torch.randn(length, WIDTH, generator=generator)
        bags.append(features)
        path = folder / f"s{number}{('.h5', '.pt', '.safetensors')[number % 3]}"
        if path.suffix == ".h5":
            with h5py.File(path, "w") as file:
                file["features"] = features.numpy()
        elif path.suffix == ".pt":
            torch.save(features, path)
        else:
            save_file({"features": features}, path)
        rows.append((path.stem, "ab"[number % 2], "train" if number < 5 else "test"))
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path, bags


def settings_of(folder, output, tiles_per_slide=None, **run):
    return TrainSettings(
        DataSettings(manifest=str(folder / "manifest.csv"), features_dir=str(folder / "features")),
        ModelSettings(aggregator="gated_abmil", dropout=0.0),
        OptimSettings(
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=2,
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            optim="sgd",
            lr_scheduler_type="constant",
            warmup_steps=0,
        ),
        RunSettings(output_dir=str(output), seed=SEED, **run),
        DsWsiConfig(reading=ReadPolicy(workers=0, tiles_per_slide=tiles_per_slide)),
    )


def plain_loop(bags, tiles_per_slide):
    torch.manual_seed(SEED)
    model = build_model(ModelConfig(None, "gated_abmil", ("a", "b"), {}, dropout=0.0, in_dim=WIDTH)).aggregator.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for epoch in range(EPOCHS):
        for step in plan_epoch(5, StepLayout(bags_per_group=2), seed=SEED, epoch=epoch):
            slides = [slide for ranks in step.micro_steps for of_rank in ranks for slide in of_rank]
            losses = []
            for slide in slides:
                rows = choose_tiles(len(bags[slide]), tiles_per_slide, (SEED, epoch, slide))
                bag = bags[slide] if rows is None else bags[slide][list(rows)]
                losses.append(F.cross_entropy(model(stack_bags([bag])).logits, torch.tensor([slide % 2])))
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
    return {f"aggregator.{name}": value for name, value in model.state_dict().items()}


def furthest(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_training_on_features_equals_a_plain_loop_and_resumes_to_the_same_bits(cohort, monkeypatch):
    folder, bags = cohort
    # What is compared here are weights: the report has tests of its own.
    monkeypatch.setattr("ds_wsi.training.loop.finish", lambda run, started: {})
    output = folder / "run"
    settings = settings_of(folder, output, tiles_per_slide=4, save_steps=1, save_total_limit=20)
    train(settings)
    trained = load_file(output / "model.safetensors")
    expected = plain_loop(bags, 4)
    assert furthest(trained, expected) < 1e-6
    assert furthest(plain_loop(bags, None), expected) > 1e-3, "the rows drawn must matter"
    model, config = load_model(output)
    assert (config.encoder, config.in_dim, config.tiling) == (None, WIDTH, {})
    assert model.encoder_is_frozen
    # From the middle of the second epoch.
    whole = (output / "model.safetensors").read_bytes()
    for checkpoint in output.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 4:
            shutil.rmtree(checkpoint)
    (output / "model.safetensors").unlink()
    resumed = replace(settings, run=replace(settings.run, resume_from_checkpoint="latest"))
    train(resumed)
    assert (output / "model.safetensors").read_bytes() == whole
    # One value of one file, whose size stays: another run.
    save_file({"features": bags[2] + 1e-3}, folder / "features" / "s2.safetensors")
    with pytest.raises(ValueError, match=r"features must be the checkpoint's, \w{16}, to continue it exactly"):
        train(resumed)


def history(folder):
    entries = json.loads((folder / "history.json").read_text())
    return [entry[name] for entry in entries for name in ("train_loss", "eval_loss")]


def predictions(folder):
    with (folder / "predictions.csv").open() as file:
        return {row["slide_id"]: float(row["probability_tumor"]) for row in csv.DictReader(file)}


def test_extracted_features_train_as_slides_do_with_a_frozen_encoder(demo_manifest, tmp_path, monkeypatch):
    torch.manual_seed(7)
    weights, folder = tmp_path / "encoder.safetensors", tmp_path / "features"
    save_file(build_encoder("resnet10t").state_dict(), weights)
    extract = ["features", "--encoder", "resnet10t", "--encoder_weights", str(weights), "--manifest"]
    extract += [str(demo_manifest), "--tile_size_px", "64", "--dataloader_num_workers", "0", "--device", "cpu"]
    assert main([*extract, "--output_dir", str(folder)]) == 0
    optim = OptimSettings(num_train_epochs=2, per_device_train_batch_size=2, learning_rate=0.01, warmup_steps=0)
    policies = DsWsiConfig(
        tiling=TilingPolicy(tile_size_px=64),
        reading=ReadPolicy(workers=0),
        augment=AugmentPolicy(flips=False, colour=0.0),
    )
    on_slides = TrainSettings(
        DataSettings(manifest=str(demo_manifest)),
        ModelSettings("resnet10t", str(weights), dropout=0.0, freeze_encoder=True),
        optim,
        RunSettings(output_dir=str(tmp_path / "slides")),
        policies,
    )
    on_features = TrainSettings(
        DataSettings(manifest=str(demo_manifest), features_dir=str(folder)),
        ModelSettings(dropout=0.0),
        optim,
        RunSettings(output_dir=str(tmp_path / "run")),
        policies,
    )
    start = build_model(ModelConfig(None, "gated_abmil", ("normal", "tumor"), {}, in_dim=512)).aggregator.state_dict()

    def same_aggregator(*arguments, **more):
        # An encoder draws its random weights first: the aggregators of the two runs would start apart.
        model = build_model(*arguments, **more)
        model.aggregator.load_state_dict(start)
        return model

    monkeypatch.setattr(ds_wsi.training.model, "build_model", same_aggregator)
    with monkeypatch.context() as patch:
        patch.setattr("ds_wsi.evaluation.results.draw_heatmaps", lambda *args, **options: [])
        train(on_slides)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    train(on_features)
    slides, run = tmp_path / "slides", tmp_path / "run"
    assert history(run) == pytest.approx(history(slides), abs=1e-5)
    assert abs(history(run)[0] - history(run)[2]) > 1e-3, "the second epoch must differ from the first"
    assert sorted(path.stem for path in (run / "heatmaps").iterdir()) == sorted(predictions(run))
    assert "features of resnet10t" in (run / "report.html").read_text()
    monkeypatch.setattr("ds_wsi.evaluation.results.draw_heatmaps", lambda *args, **options: [])
    evaluate = ["evaluate", "--manifest", str(demo_manifest), "--device", "cpu", "--output_dir", str(tmp_path / "ev")]
    assert main([*evaluate, "--model", str(run), "--features_dir", str(folder)]) == 0
    assert predictions(tmp_path / "ev") == pytest.approx(predictions(run), abs=1e-7)
    for model, more in ((slides, ["--features_dir", str(folder)]), (run, [])):
        assert main([*evaluate, "--model", str(model), *more]) == 2
