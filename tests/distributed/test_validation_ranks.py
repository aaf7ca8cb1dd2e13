"""Validation beside training on two ranks: the main rank's process validates for all, and all come to the same."""

import multiprocessing
from dataclasses import replace
from functools import partial

import pytest

from ds_wsi.evaluation import validator
from ds_wsi.evaluation.norm_choice import NormChoice
from ds_wsi.training import loop
from harness import run_ranks

pytestmark = pytest.mark.distributed
TIMED = ("tiles_per_second", "peak_memory_bytes")


def scripted(aucs, *_):
    """Stands for a validation in the main rank's process: the next AUC, and a tile that could not be read."""
    choice = NormChoice("running", {"running": {"eval_loss": 1.0, "eval_auc": next(aucs)}})
    return validator.ValidationResult(choice, {("S-1", 3, 4): "torn"})


def train_on_rank(manifest: str, folder: str) -> list:
    """What this rank knows at the end of a run validated between epochs, one beside, and one beside that stops."""
    from accelerate.state import AcceleratorState, GradientState

    from ds_wsi.config import DsWsiConfig
    from ds_wsi.engines.accelerator.engine import Accelerator
    from ds_wsi.norms import NormPolicy
    from ds_wsi.training.settings import DataSettings, ModelSettings, OptimSettings, RunSettings, TrainSettings

    ended: list = []
    loop.finish = lambda run, started: ended.append(run) or {}
    Accelerator.end_training = lambda self: None  # it would end the group
    validator.CONTEXT = multiprocessing.get_context("fork")  # starts at once
    policies = DsWsiConfig()
    policies = replace(
        policies,
        tiling=replace(policies.tiling, tile_size_px=64),
        reading=replace(policies.reading, workers=0),
        norm=NormPolicy(evaluation="running"),  # statistics taken anew are merged over the ranks: other last digits
    )
    settings = TrainSettings(
        DataSettings(manifest=manifest, tiles_dir=f"{folder}/tiles"),
        ModelSettings(encoder="resnet10t"),
        OptimSettings(num_train_epochs=2, learning_rate=0.01),
        policies=policies,
    )
    results = []
    for name in ("between", "beside", "stopped"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        how = RunSettings(output_dir=f"{folder}/{name}", validate_beside=name != "between")
        if name == "stopped":
            how = replace(how, early_stopping_patience=1)
            aucs = iter([0.5, 0.5, 0.9, 0.1])
            validator._validate = partial(scripted, aucs)
            loop._train_epoch = lambda run, *_: {"epoch": run.progress.epoch + 1, "train_loss": 1.0}
            settings = replace(settings, optim=replace(settings.optim, num_train_epochs=4))
        loop.train(replace(settings, run=how))
        progress = ended[-1].progress
        history = [{key: value for key, value in entry.items() if key not in TIMED} for entry in progress.history]
        failures = [[*key, reason] for key, reason in ended[-1].failures.reasons.items()]
        results.append([history, progress.best_epoch, progress.epoch, progress.pending, failures])
    return results


def test_two_ranks_agree_beside_training_and_with_a_validation_between_epochs(demo_manifest, tmp_path):
    first, second = run_ranks(train_on_rank, 2, str(demo_manifest), str(tmp_path))
    assert first == second
    between, beside, stopped = first
    assert len(between[0]) == 2
    assert "eval_auc" in between[0][1]
    # The sum of two ranks' gradients does not depend on their order: bit by bit.
    assert beside == between
    assert (tmp_path / "beside/model.safetensors").read_bytes() == (tmp_path / "between/model.safetensors").read_bytes()
    # The second epoch is no better, known at the end of the third, which is.
    assert [entry["eval_auc"] for entry in stopped[0]] == [0.5, 0.5, 0.9]
    assert stopped[1:] == [3, 3, False, [["S-1", 3, 4, "torn"]]]
