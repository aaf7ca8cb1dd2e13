"""Validation beside training: the run it would be without, and no step of it waits."""

import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from validated_runs import EPOCHS, STEPS, choice_of, scripted, train

from ds_wsi.bags.bag import FailureLog, ReadFailureError, TileDataset
from ds_wsi.bags.cohort import Cohort, load_cohort
from ds_wsi.bags.manifest import Manifest
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.engines.accelerator.engine import Accelerator
from ds_wsi.evaluation import validator
from ds_wsi.evaluation.norm_choice import NormPlan
from ds_wsi.evaluation.predict import predict_slides, prediction_metrics
from ds_wsi.evaluation.validator import ValidationWork, Validator, ValidatorError, require_device
from ds_wsi.models import load_model
from ds_wsi.runtime.files import write_json
from ds_wsi.runtime.processes import is_stopped, state_of
from ds_wsi.slides import TilingPolicy
from ds_wsi.slides.slide import SlideError, TileReadError
from ds_wsi.training import loop, validation
from ds_wsi.training.checkpoint import PENDING_WEIGHTS
from ds_wsi.training.settings import RunSettings
from ds_wsi.training.stopping import require_metric

TIMED = ("tiles_per_second", "peak_memory_bytes")
PATIENCE_S = 6  # of a process that waits for an event, before it fails


class Stop(Exception):  # noqa: N818
    """Ends a run where a test wants it."""


@pytest.fixture(scope="module")
def tiles_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tiles")


@pytest.fixture
def forked(monkeypatch):
    """The process is forked: it starts at once, and with what the test has patched."""
    monkeypatch.setattr(validator, "CONTEXT", multiprocessing.get_context("fork"))


def history_of(folder):
    """A run's history without what is timed, in the order in which it is written."""
    history = json.loads((Path(folder) / "history.json").read_text())
    return [[(key, value) for key, value in entry.items() if key not in TIMED] for entry in history]


@pytest.fixture(scope="module")
def between(demo_manifest, tiles_dir, tmp_path_factory):
    """A run that is validated between its epochs, as all others are compared with; it validates averaged weights."""
    folder = tmp_path_factory.mktemp("between") / "run"
    train(demo_manifest, tiles_dir, folder, "--ema_decay", "0.5", "--num_train_epochs", "2")
    return folder


def stop_after(monkeypatch, condition):
    """Raise Stop after the first checkpoint of which the condition is true."""
    save = loop.save

    def save_and_stop(run):
        save(run)
        if condition(run.progress):
            raise Stop

    monkeypatch.setattr(loop, "save", save_and_stop)


@pytest.mark.parametrize("kind", ["end of an epoch", "within an epoch"])
def test_a_run_stopped_with_a_validation_pending_goes_on_to_the_same_end(
    kind, between, demo_manifest, tiles_dir, tmp_path, forked, monkeypatch
):
    options = ("--ema_decay", "0.5", "--num_train_epochs", "2", "--save_steps", "3", "--validate_beside")
    folder, within = tmp_path / "run", kind == "within an epoch"
    with monkeypatch.context() as patch:
        stop_after(patch, lambda progress: progress.epoch == 1 and bool(progress.step_in_epoch) == within)
        with pytest.raises(Stop):
            train(demo_manifest, tiles_dir, folder, *options)
    newest = folder / f"checkpoint-{6 if within else 4}"
    progress = json.loads((newest / "state.json").read_text())["progress"]
    assert progress["pending"]
    assert "eval_loss" not in progress["history"][-1]
    assert (newest / PENDING_WEIGHTS).is_file()
    assert not (folder / "model.safetensors").exists()
    if within:
        train(demo_manifest, tiles_dir, folder, *options, "--resume_from_checkpoint")
        assert (folder / "predictions.csv").read_bytes() == (between / "predictions.csv").read_bytes()
    else:  # validated between the epochs from here on
        monkeypatch.setattr(
            loop, "finish", lambda run, started: write_json(folder / "history.json", run.progress.history)
        )
        train(demo_manifest, tiles_dir, folder, *options[:-1], "--resume_from_checkpoint")
    assert history_of(folder) == history_of(between)
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (between / name).read_bytes(), name
    assert not list(folder.glob("*pending*"))


def wait_for(path):
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not happen"
        time.sleep(0.01)


def test_no_step_waits_and_each_epochs_result_and_weights_are_its_own(
    demo_manifest, tiles_dir, tmp_path, forked, monkeypatch
):
    """Each validation ends only once the whole next epoch is trained: had a step waited, the run would stand still."""
    answer, calls = scripted([0.5, 0.9, 0.1], {("S-1", 3, 4): "torn"}), iter(range(1, EPOCHS + 1))

    def held_validation(work, weights, failures):
        wait_for(tmp_path / f"release-{next(calls)}")
        return answer()

    seen, states, logged, last = [], [], [], {}
    step, write, log = loop.train_step, validation.save_weights, Accelerator.log

    def train_step(run, *arguments):
        last["run"] = run
        if run.progress.epoch:  # the epoch before is still being validated
            assert run.progress.pending
            seen.append("eval_loss" in run.progress.history[-1])
        if run.progress.step_in_epoch == STEPS - 1:
            (tmp_path / f"release-{run.progress.epoch}").touch()
        return step(run, *arguments)

    def save_weights(path, state):
        states.append({name: value.clone() for name, value in state.items()})
        write(path, state)
        if len(states) == EPOCHS:
            (tmp_path / f"release-{EPOCHS}").touch()

    def keep_log(accelerator, values, step=None, **more):
        logged.extend([(step, values["eval/auc"], values["epoch"])] if "eval/auc" in values else [])
        log(accelerator, values, step=step, **more)

    monkeypatch.setattr(validator, "_validate", held_validation)
    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(validation, "save_weights", save_weights)
    monkeypatch.setattr(Accelerator, "log", keep_log)
    monkeypatch.setattr(loop, "finish", lambda run, started: {})
    train(demo_manifest, tiles_dir, tmp_path / "run", "--validate_beside")
    assert seen == [False] * (EPOCHS - 1) * STEPS
    progress = last["run"].progress
    assert [entry["eval_auc"] for entry in progress.history] == [0.5, 0.9, 0.1]
    assert progress.best_epoch == 2
    exported = load_file(tmp_path / "run" / "model.safetensors")
    # The newest weights when its result came were the third epoch's.
    assert all(torch.equal(exported[name], states[1][name]) for name in states[1])
    assert not any(torch.equal(states[1][name], states[2][name]) for name in exported if name.endswith("weight"))
    assert logged == [(STEPS, 0.5, 1), (2 * STEPS, 0.9, 2), (3 * STEPS, 0.1, 3)]
    assert last["run"].failures.rows() == [{"slide_id": "S-1", "x": 3, "y": 4, "reason": "torn"}]


@pytest.fixture(scope="module")
def work(between, demo_manifest, tiles_dir):
    cohort = load_cohort(demo_manifest, TilingPolicy(tile_size_px=64), tiles_dir=tiles_dir)
    _, config = load_model(between)
    rows = cohort.rows("validation")
    plan = NormPlan(rows=rows)
    return ValidationWork(config, cohort.manifest.slides, cohort.grids, plan, ReadPolicy(workers=1), "cpu")


def gone(pid):
    """Whether a process group has ended; it may take its watcher a second to find out."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_the_spawned_process_gives_the_callers_numbers_and_its_death_is_named(work, between):
    process = Validator(work)
    try:
        process.submit(1, between / "model.safetensors")
        model, _ = load_model(between)
        failures = FailureLog(work.slides, work.grids, 0.0)
        arguments = (model, work.slides, work.grids, work.plan.rows, work.policy, failures)
        metrics = prediction_metrics(list(predict_slides(*arguments)), work.slides)
        assert process.wait() == (choice_of(metrics), {})
        process.check()
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ValidatorError, match=r"got death by SIGKILL \(process \d+ on cpu, idle\).*HINT: "):
            process.check()
    finally:
        process.close()
    assert gone(process.pid)


def require_failure(work, weights, kind, words):
    process = Validator(work)
    try:
        process.submit(3, weights)
        with pytest.raises(kind, match=words):
            process.wait()
    finally:
        process.close()
    assert gone(process.pid)


def test_a_failure_is_named_and_nothing_stays(work, forked, between, monkeypatch, tmp_path):
    weights, last = between / "model.safetensors", work.slides[work.plan.rows[-1]]
    words = r"^the validation of epoch 3 beside training must succeed, got FileNotFoundError: .*\(process \d+.*HINT"
    require_failure(work, tmp_path / "none", ValidatorError, words)
    work = replace(work, policy=ReadPolicy(workers=0, max_failed_fraction=1.0))
    slides = [replace(slide, path=tmp_path / "none") if slide is last else slide for slide in work.slides]
    words = rf"^slide must be a file, got none \(slide {last.slide_id}, .*HINT"
    require_failure(replace(work, slides=slides), weights, SlideError, words)

    def fail(self, entry, grid, row, out):
        raise TileReadError(entry.slide_id, 0, 0, OSError("torn"))

    monkeypatch.setattr(TileDataset, "_read", fail)
    require_failure(work, weights, ReadFailureError, r"^slide demo_\d+ must have a readable tile, all .*HINT")


def test_tiles_that_could_not_be_read_are_told(work, forked, between, monkeypatch):
    read, row = TileDataset._read, work.plan.rows[-1]

    def fail_first(self, entry, grid, tile, out):
        if (entry.slide_id, tile) == (work.slides[row].slide_id, 0):
            raise TileReadError(entry.slide_id, 0, 0, OSError("torn"))
        read(self, entry, grid, tile, out)

    monkeypatch.setattr(TileDataset, "_read", fail_first)
    process = Validator(replace(work, policy=ReadPolicy(workers=0, max_failed_fraction=0.5)))
    try:
        process.submit(1, between / "model.safetensors")
        failures = process.wait().failures
    finally:
        process.close()
    assert list(failures) == [(work.slides[row].slide_id, *work.grids[row].coords[0].tolist())]
    assert "torn" in next(iter(failures.values()))


def test_a_process_that_is_stopped_is_not_waited_for_for_ever(work, forked, monkeypatch, tmp_path):
    def stops(*_):
        os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(validator, "_validate", stops)
    work = replace(work, policy=ReadPolicy(workers=0, timeout_s=2.0))
    require_failure(work, tmp_path / "none", ValidatorError, r"got one that is stopped \(SIGSTOP.* for 2 s .*epoch 3")


@pytest.mark.parametrize("does", ["computes", "is stopped"])
def test_a_process_whose_trainer_is_killed_ends(does, work, forked, monkeypatch, tmp_path):
    stops = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # noqa: E731
    waits = lambda *_: time.sleep(PATIENCE_S)  # noqa: E731
    monkeypatch.setattr(validator, "_validate", stops if does == "is stopped" else waits)

    def trainer():
        process = Validator(work)
        process.submit(1, tmp_path / "none")
        (tmp_path / "part").write_text(str(process.pid))
        (tmp_path / "part").rename(tmp_path / "pid")
        time.sleep(PATIENCE_S)

    started = multiprocessing.get_context("fork").Process(target=trainer)
    started.start()
    wait_for(tmp_path / "pid")
    while does == "is stopped" and not is_stopped(state_of(int((tmp_path / "pid").read_text()))):
        time.sleep(0.01)
    started.kill()
    started.join()
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_death_stops_the_run_within_the_next_epoch(demo_manifest, tiles_dir, tmp_path, forked, monkeypatch, capsys):
    monkeypatch.setattr(validator, "_validate", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    step, started, steps = loop.train_step, [], []

    def start(work):
        started.append(Validator(work))
        return started[0]

    def train_step(run, *arguments):
        if run.progress.epoch:
            os.waitid(os.P_PID, started[0].pid, os.WEXITED | os.WNOWAIT)
            steps.append(run.progress.step_in_epoch)
        return step(run, *arguments)

    monkeypatch.setattr(validation, "Validator", start)
    monkeypatch.setattr(loop, "train_step", train_step)
    train(demo_manifest, tiles_dir, tmp_path / "run", "--validate_beside", status=2)
    printed = capsys.readouterr().err
    assert re.search(r"ERROR: .*death by SIGKILL .*, validating epoch 1", printed), printed[-2000:]
    assert "Traceback" not in printed
    assert steps == [0]
    assert gone(started[0].pid)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", "device of torch's, got 'gpu'"),
        ("meta", "device that computes, got 'meta'"),
        ("cuda:99", "device of this machine, got 'cuda:99'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, words, work):
    with pytest.raises(ValueError, match=rf"--validation_device must be a {words}.*HINT"):
        Validator(replace(work, device=device))
    with pytest.raises(ValueError, match=rf"--device must be a {words}.*HINT"):
        require_device(device, "--device")  # of evaluate, heatmap and features


def test_early_stopping_needs_a_metric_to_watch(work, caplog):
    slides = tuple(replace(slide, label=0) if slide.split == "validation" else slide for slide in work.slides)
    manifest = Manifest(slides, ("a", "b"))
    with pytest.raises(ValueError, match=r"needs a validation split that defines auc, got slides of one class.*HINT"):
        require_metric(RunSettings(early_stopping_patience=2), Cohort(manifest, work.grids))
    assert not caplog.records
    require_metric(RunSettings(), Cohort(manifest, work.grids))
    assert "leaves auc undefined: the last epoch's weights are exported" in caplog.text
    require_metric(
        RunSettings(early_stopping_patience=2, metric_for_best_model="accuracy"), Cohort(manifest, work.grids)
    )
    manifest = replace(manifest, slides=tuple(replace(slide, split="train") for slide in slides))
    with pytest.raises(
        ValueError, match=r"--early_stopping_patience 2 must be given with a validation split, got none"
    ):
        require_metric(RunSettings(early_stopping_patience=2), Cohort(manifest, work.grids))
    require_metric(RunSettings(), Cohort(manifest, work.grids))
