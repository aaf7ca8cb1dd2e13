"""What a run's settings say of it: the name of the training from what is trained, and the settings of a group."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.features import FeatureFile
from ds_wsi.bags.manifest import Manifest, SlideEntry
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.models import ModelConfig, build_model, freeze
from ds_wsi.partition.policy import PartitionPolicy
from ds_wsi.runtime.setting import Decides
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.training.record import dataset_name, run_record, training_name
from ds_wsi.training.same_run import differences, fingerprint
from ds_wsi.training.setting_list import SETTINGS
from ds_wsi.training.settings import DataSettings, ModelSettings, OptimSettings, RunSettings, TrainSettings

CONFIG = ModelConfig("resnet10t", "abmil", ("a", "b"), {"tile_size_px": 64})


OPTIMIZER = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


def record_of(settings, world_size=1):
    """The record of a run that is not started: only what the record reads."""
    if settings.model == ModelSettings():
        settings = replace(settings, model=ModelSettings(encoder="resnet10t"))
    layout = settings.step_layout(world_size)
    run = SimpleNamespace(settings=settings, config=CONFIG, module=build_model(CONFIG), step_layout=layout, comm=None)
    run.optimizer = OPTIMIZER
    return run_record(run)


def test_the_training_is_named_by_what_is_trained():
    model = build_model(CONFIG)
    assert training_name(model) == "end to end"
    freeze(model.encoder.conv1)
    assert training_name(model) == "partly frozen"
    freeze(model.encoder)
    assert training_name(model) == "frozen"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({}, "demo"),
        ({"manifest": "x/panda_0.csv"}, "panda_0"),
        ({"manifest": "p.csv", "dataset_name": "P"}, "P"),
    ],
)
def test_the_dataset_is_named_by_its_manifest_unless_it_is_given_a_name(data, name):
    assert dataset_name(DataSettings(**data)) == name


def test_seed_split_and_how_it_is_computed_are_no_settings_of_the_group():
    settings = TrainSettings(data=DataSettings(split_name="3"))
    settings = replace(settings, run=replace(settings.run, seed=5, eval_tiles=256, eval_runs=100))
    record = record_of(settings)
    assert (record.seed, record.split, record.evaluation) == (5, "3", EvaluationProtocol(256, 100))
    assert (record.dataset, record.method, record.training) == ("demo", "resnet10t + abmil", "end to end")
    plain = record_of(TrainSettings())
    assert record.settings == plain.settings
    # Four slides per step, on one process or two, stacked or accumulated.
    four = replace(settings.optim, gradient_accumulation_steps=4)
    two = replace(settings.optim, per_device_train_batch_size=2)
    assert record_of(replace(settings, optim=four)).settings == record_of(replace(settings, optim=two), 2).settings
    dealt = replace(settings.policies, stacking=StackingPolicy(bags_per_step=4))
    assert record_of(replace(settings, policies=dealt)).settings["slides_per_step"] == 4
    slower = replace(settings, optim=replace(settings.optim, learning_rate=1e-5))
    assert record_of(slower).settings == plain.settings | {"optim.learning_rate": 1e-5}
    stopped = replace(TrainSettings(), run=RunSettings(early_stopping_patience=2))
    assert record_of(stopped).settings == plain.settings | {"early_stopping": "patience 2 on auc"}


def test_encoders_of_one_architecture_are_told_apart():
    names = ("hf-hub:paige-ai/Virchow", "hf-hub:paige-ai/Virchow2")
    records = [record_of(TrainSettings(model=ModelSettings(encoder=name))) for name in names]
    assert tuple(record.encoder for record in records) == names


def fingerprint_of(settings, encoder=None, *, config=CONFIG, processes=1, optimizer=OPTIMIZER):
    slide = SlideEntry("s", Path("s.svs"), 0, "p", "train")
    cohort = Cohort(Manifest((slide,), ("a", "b")), (FeatureFile("s", Path("s.pt"), 5, 4, 80, 0),))
    parts = {"settings": settings, "config": config, "cohort": cohort, "comm": None, "made_of": {}, "teacher": None}
    parts |= {"optimizer": optimizer, "module": SimpleNamespace(encoder=encoder or nn.Identity())}
    return fingerprint(SimpleNamespace(**parts, mesh=SimpleNamespace(slide_size=processes)))


def test_every_setting_that_is_compared_by_what_it_stands_for_is_in_the_fingerprint():
    plain = fingerprint_of(TrainSettings())
    resolved = {one.setting.resolved for one in SETTINGS.values() if one.setting.decides is Decides.RESOLVED}
    assert resolved <= set(plain)
    assert (plain["classes"], plain["slides"]) == (["a", "b"], [["s", "train", "a"]])


@pytest.mark.parametrize("drawing", [False, True])
def test_another_cut_of_an_encoder_that_draws_is_another_run(drawing):
    modes = [PartitionPolicy(mode="native"), PartitionPolicy(mode="lean"), PartitionPolicy(mode="lean", chunk_size=3)]
    fingerprints = []
    for policy in modes:
        settings = replace(TrainSettings(), policies=replace(TrainSettings().policies, partition=policy))
        fingerprints.append(fingerprint_of(settings, nn.Dropout(0.1) if drawing else nn.Dropout(0.0))["partition"])
    assert len(set(fingerprints)) == (3 if drawing else 1)


def test_stacks_that_norms_average_over_must_lie_as_they_lay():
    settings = replace(TrainSettings(), optim=OptimSettings(per_device_train_batch_size=2))
    norms = nn.BatchNorm2d(3)
    plain = fingerprint_of(settings, norms, config=replace(CONFIG, norm_training="stack"))
    other = fingerprint_of(settings, norms, processes=2, config=replace(CONFIG, norm_training="stack"))
    (line,) = [line for line in differences(other, plain) if "norm_stacks" in line]
    assert "'processes': 1" in line
    step = fingerprint_of(settings, norms, config=replace(CONFIG, norm_training="step"))
    assert step["norm_stacks"] is None


def test_the_optimizers_constants_must_stay():
    plain = fingerprint_of(TrainSettings())
    other = fingerprint_of(TrainSettings(), optimizer=torch.optim.AdamW([torch.zeros(1)], betas=(0.9, 0.99)))
    (line,) = differences(other, plain)
    assert line.startswith("optimizer must be the checkpoint's, betas (0.9, 0.999), eps 1e-08")
