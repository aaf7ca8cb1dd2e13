"""Early stopping: when the history ends a run, and what a resumed one knows of it."""

import multiprocessing

import pytest
from validated_runs import scripted, train

from ds_wsi.evaluation import validator
from ds_wsi.training import loop, validation
from ds_wsi.training.stopping import stop_reason


@pytest.fixture(scope="module")
def tiles_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tiles")


@pytest.fixture
def forked(monkeypatch):
    """The process is forked: it starts at once, and with what the test has patched."""
    monkeypatch.setattr(validator, "CONTEXT", multiprocessing.get_context("fork"))


def entries(*aucs):
    """A history in which the last epochs may not be validated yet: None."""
    validated = [{"epoch": n, "eval_loss": 1.0, "eval_auc": auc} for n, auc in enumerate(aucs, 1)]
    return [entry if entry["eval_auc"] is not None else {"epoch": entry["epoch"]} for entry in validated]


@pytest.mark.parametrize(
    ("aucs", "patience", "stops"),
    [
        ((), 1, False),
        ((0.5,), 1, False),
        ((0.5, 0.6), 1, False),
        ((0.5, 0.5), 1, True),  # as good is no improvement
        ((0.5, 0.4), 2, False),
        ((0.5, 0.4, 0.5), 2, True),
        ((0.5, 0.4, 0.6), 2, False),
        ((0.5, 0.4, None), 2, False),  # not validated yet
        ((0.5, 0.4, 0.3, 0.2), 0, False),
    ],
)
def test_the_history_decides_when_to_stop(aucs, patience, stops):
    reason = stop_reason(entries(*aucs), "eval_auc", patience)
    assert (reason is not None) == stops
    if stops:
        assert reason.startswith(f"eval_auc has not risen above 0.5 of epoch 1 in {patience} epochs (--early_stopping")


@pytest.mark.parametrize(("way", "trained"), [("between", 3), ("beside", 4)])
def test_early_stopping_ends_the_run_and_a_resumed_one(
    way, trained, demo_manifest, tiles_dir, tmp_path, forked, monkeypatch, capsys
):
    """Beside training the last epoch is trained before the one before it is known to be the last."""
    aucs, ended = [0.5, 0.9, 0.8, 0.95, 0.2], []

    def train_epoch(run, *_):
        run.progress.global_step += 1
        return {"epoch": run.progress.epoch + 1, "train_loss": 1.0}

    monkeypatch.setattr(loop, "_train_epoch", train_epoch)
    monkeypatch.setattr(validator, "_validate", scripted(aucs))
    between = scripted(aucs)
    monkeypatch.setattr(validation, "validate", lambda run, state: between().choice)
    monkeypatch.setattr(loop, "finish", lambda run, started: ended.append(run.progress) or {})
    options = ["--num_train_epochs", "5", "--early_stopping_patience", "1", "--save_total_limit", "9"]
    options += ["--validate_beside"] * (way == "beside")
    train(demo_manifest, tiles_dir, tmp_path / "run", *options)
    told = capsys.readouterr().err  # the command's own handler writes there, and hands nothing on to caplog
    # What was trained meanwhile counts: it may be the best.
    assert [entry["eval_auc"] for entry in ended[0].history] == aucs[:trained]
    assert ended[0].best_epoch == (4 if way == "beside" else 2)
    assert f"early stopping after epoch {trained}: eval_auc has not risen above 0.9 of epoch 2 in 1 ep" in told
    monkeypatch.setattr(validator, "_validate", scripted(aucs[trained - 1 :]))
    monkeypatch.setattr(loop, "_train_epoch", None)
    train(demo_manifest, tiles_dir, tmp_path / "run", *options, "--resume_from_checkpoint")
    assert vars(ended[1]) == vars(ended[0])
