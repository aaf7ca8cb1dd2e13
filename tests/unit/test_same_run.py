"""What a resumed run must share with the one it continues, and what a finished one says."""

import csv
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import rows_of, train, write_cohort, write_table

from ds_wsi.training.same_run import DRAW, differences


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A cohort, and a run of four epochs that was stopped after the third."""
    folder = write_cohort(tmp_path_factory.mktemp("cohort"))
    assert train(folder, folder / "run", "--save_steps", "3", "--save_total_limit", "9", epochs=4) == 0
    shutil.copytree(folder / "run", folder / "whole")
    shutil.rmtree(folder / "run" / "checkpoint-24")
    (folder / "run" / "run.json").unlink()
    return folder


def swapped(rows, splits=("train",)):
    return [(n, {"normal": "tumor", "tumor": "normal"}[label] if s in splits else label, s) for n, label, s in rows]


def moved(rows, **to):
    return [(name, label, to.get(name, split)) for name, label, split in rows]


CHANGES = {
    "one label of training": (swapped(rows_of())[:1] + rows_of()[1:], "label must be .* another of 1 slide"),
    "all labels of training": (swapped(rows_of()), r"of 6 slides \(s00: normal, got tumor; .*\.\.\.\)"),
    "a label of validation": (rows_of()[:6] + swapped(rows_of()[6:7], ("validation",)) + rows_of()[7:], "label must"),
    "a label of test": (rows_of()[:-1] + swapped(rows_of()[-1:], ("test",)), "label must"),
    "a slide to another split": (moved(rows_of(), s00="test"), r"split must .*\(s00: train, got test\)"),
    "a slide less": (rows_of()[1:], r"has besides 1 slide \(s00\)"),
    "another order": ([rows_of()[1], rows_of()[0], *rows_of()[2:]], "order of the slides .* got s01 in place 1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_table_is_refused_by_name(stopped, tmp_path, change, capsys):
    rows, message = CHANGES[change]
    shutil.copytree(stopped, tmp_path / "c")
    write_table(tmp_path / "c" / "m.csv", rows)
    before = (tmp_path / "c" / "run" / "checkpoint-21" / "state.json").read_bytes()
    assert train(tmp_path / "c", tmp_path / "c" / "run", "--save_steps", "3", "--resume_from_checkpoint", epochs=4) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert "resumed from" not in printed
    assert "features of width" not in printed, "told after the cohort was read"
    assert (tmp_path / "c" / "run" / "checkpoint-21" / "state.json").read_bytes() == before


def test_classes_in_another_order_and_every_other_difference_are_named_at_once(stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "c")
    more = ("--classes", "tumor,normal", "--learning_rate", "1e-3", "--seed", "3", "--resume_from_checkpoint")
    assert train(tmp_path / "c", tmp_path / "c" / "run", *more, epochs=3) == 2
    printed = capsys.readouterr().err
    for name in ("classes", "learning_rate", "seed", "num_train_epochs"):
        assert f"{name} must be the checkpoint's" in printed
    assert "5 things differ" in printed  # the encoder's rate follows
    assert "features of width" not in printed


@pytest.mark.parametrize(("name", "key"), [("s00", "features"), ("s07", "validation_features")])
def test_other_features_under_the_same_names_are_refused(stopped, tmp_path, name, key, capsys):
    shutil.copytree(stopped, tmp_path / "c")
    path = tmp_path / "c" / "features" / f"{name}.safetensors"
    save_file({"features": load_file(path)["features"] + 1}, path)
    assert train(tmp_path / "c", tmp_path / "c" / "run", "--save_steps", "3", "--resume_from_checkpoint", epochs=4) == 2
    assert f"ERROR: {key} must be the checkpoint's" in capsys.readouterr().err


def test_the_same_table_written_anew_is_the_same(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "c")
    write_table(tmp_path / "c" / "m.csv", rows_of())
    assert train(tmp_path / "c", tmp_path / "c" / "run", "--save_steps", "3", "--resume_from_checkpoint", epochs=4) == 0
    resumed, whole = (
        (folder / "model.safetensors").read_bytes() for folder in (tmp_path / "c" / "run", stopped / "whole")
    )
    assert resumed == whole


def test_a_checkpoint_of_an_earlier_version_is_continued_with_one_line(stopped, tmp_path, capsys):
    from ds_wsi.training.checkpoint import FILE_LIST, seal

    shutil.copytree(stopped, tmp_path / "c")
    for checkpoint in (tmp_path / "c" / "run").glob("checkpoint-*"):
        state = json.loads((checkpoint / "state.json").read_text())
        old = ("classes", "slides", "slide_files", "grids", "encoder_weights", "pretrained", "test_files")
        old += ("validation_features", "optim.ema_decay")
        state["fingerprint"] = {name: value for name, value in state["fingerprint"].items() if name not in old}
        (checkpoint / "state.json").write_text(json.dumps(state))
        (checkpoint / FILE_LIST).unlink()
        seal(checkpoint)
    assert train(tmp_path / "c", tmp_path / "c" / "run", "--save_steps", "3", "--resume_from_checkpoint", epochs=4) == 0
    printed = capsys.readouterr().err
    assert "did not record " in printed
    for name in ("classes", "slides", "slide_files", "grids", "validation_features", "test_files"):
        assert f" {name}" in printed
    assert "resumed from" in printed
    more = ("--save_steps", "3", "--resume_from_checkpoint", "--ema_decay", "0.5")
    assert train(tmp_path / "c", tmp_path / "c" / "run", *more, epochs=4) == 2
    assert "--ema_decay must be the checkpoint's, 0.0, to continue it exactly, got 0.5" in capsys.readouterr().err


def test_another_draw_of_splits_is_named():
    settings = {DRAW: 0, "seed": 3}
    assert differences(settings, {DRAW: 3, "seed": 3}) == [
        "--split_seed must be the checkpoint's, 3, to continue it exactly, got 0"
    ]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_epochs_are_exact_or_refused(stopped, tmp_path, schedule, capsys):
    more = ("--lr_scheduler_type", schedule, "--save_total_limit", "9")
    assert train(stopped, tmp_path / "short", *more) == 0
    assert train(stopped, tmp_path / "short", *more, "--resume_from_checkpoint", epochs=1) == 2
    longer = train(stopped, tmp_path / "short", *more, "--resume_from_checkpoint", epochs=3)
    if schedule == "cosine":
        assert longer == 2
        assert (
            "num_train_epochs must be the checkpoint's, 2, to continue it exactly, got 3: with more epochs those that "
            "are done would have had other learning rates. A run can be made longer that was started with "
            "--lr_scheduler_type constant and without --demon"
        ) in capsys.readouterr().err
        return
    assert longer == 0
    assert train(stopped, tmp_path / "long", *more, epochs=3) == 0
    resumed, uninterrupted = (load_file(tmp_path / name / "model.safetensors") for name in ("short", "long"))
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("short", "long")]
    losses = [[entry["train_loss"] for entry in history] for history in histories]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_checkpoints_by_time_within_an_epoch_and_the_time_of_all_starts(tmp_path, monkeypatch, capsys):
    from ds_wsi.training import loop

    folder = write_cohort(tmp_path / "c")
    assert train(folder, folder / "never", "--save_minutes", "0", epochs=1) == 0
    assert [path.name for path in (folder / "never").glob("checkpoint-*")] == ["checkpoint-6"]
    capsys.readouterr()
    more = ("--save_minutes", "1e-9", "--save_total_limit", "9")
    steps, step = [], loop.train_step

    def stop(*given):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(loop, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(folder, folder / "run", *more, epochs=1)
    names = sorted(path.name for path in (folder / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    printed = capsys.readouterr().err
    assert f"checkpoint: {folder / 'run' / 'checkpoint-3'}" in printed
    assert "every 1e-09 minutes, at each epoch's end" in printed
    path = folder / "run" / "checkpoint-3" / "state.json"
    state = json.loads(path.read_text())
    assert 0 < state["time"]["seconds"] < 600
    monkeypatch.setattr(loop, "train_step", step)
    assert train(folder, folder / "run", *more, "--resume_from_checkpoint", epochs=1) == 0
    page = (folder / "run" / "report.html").read_text()
    total, last = map(int, re.search(r"<dd>(\d+) s in 2 starts, (\d+) s in the last</dd>", page).groups())
    assert total >= last
    resumed, uninterrupted = (load_file(folder / name / "model.safetensors") for name in ("run", "never"))
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def test_a_finished_run_says_so_and_tests_nothing_again(stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "c")
    output = tmp_path / "c" / "whole"
    more = ("--save_steps", "3", "--resume_from_checkpoint")
    names = ("metrics.json", "predictions.csv", "report.html", "run.json", "model.safetensors", "history.json")
    before = {name: (output / name).stat().st_mtime_ns for name in names}
    assert train(tmp_path / "c", output, *more, epochs=4) == 0
    printed = capsys.readouterr().err
    assert f"finished already: report {output / 'report.html'}" in printed
    assert "test metrics" not in printed
    assert {name: (output / name).stat().st_mtime_ns for name in names} == before
    # tested otherwise, or on test slides that were replaced: tested again
    assert train(tmp_path / "c", output, *more, "--eval_tiles", "3", epochs=4) == 0
    assert "test metrics" in capsys.readouterr().err
    path = tmp_path / "c" / "features" / "s11.safetensors"
    save_file({"features": load_file(path)["features"] + 1}, path)
    assert train(tmp_path / "c", output, *more, "--eval_tiles", "3", epochs=4) == 0
    assert "test metrics" in capsys.readouterr().err


def test_history_curves_and_log_are_kept_after_each_epoch(tmp_path, monkeypatch):
    from ds_wsi.training import loop

    folder, seen = write_cohort(tmp_path / "c"), []
    save = loop.save

    def look(run):
        save(run)
        history = json.loads((run.output_dir / "history.json").read_text())
        seen.append((len(history), (run.output_dir / "curves.png").is_file()))
        assert f"epoch {len(history)}/" in (run.output_dir / "train.log").read_text()

    monkeypatch.setattr(loop, "save", look)
    assert train(folder, folder / "run") == 0
    assert seen == [(1, True), (2, True)]
    text = (folder / "run" / "train.log").read_text()
    assert text.index("engine:") < text.index("test metrics of 2 slides") < text.index("finished in")
    assert train(folder, folder / "run", "--seed", "1", "--resume_from_checkpoint") == 2
    assert "ended by ValueError: --seed must be" in (folder / "run" / "train.log").read_text()


def test_the_splits_that_were_drawn_are_kept_and_split_seed_alone_draws_them(tmp_path):
    folder = write_cohort(tmp_path / "c")
    write_table(folder / "m.csv", [row[:2] for row in rows_of()], ("slide_id", "label"))
    drawn = {}
    for name, more in {"a": (), "b": ("--seed", "1"), "c": ("--split_seed", "1")}.items():
        assert train(folder, folder / name, *more, epochs=1) == 0
        with (folder / name / "splits.csv").open() as file:
            drawn[name] = list(csv.reader(file))
    assert drawn["a"][0] == ["slide_id", "patient_id", "split", "label"]
    assert [row[0] for row in drawn["a"][1:]] == [row[0] for row in rows_of()]
    assert drawn["a"] == drawn["b"]
    assert drawn["a"] != drawn["c"]
    records = [json.loads((folder / name / "run.json").read_text()) for name in "abc"]
    assert [record["split"] for record in records] == ["", "", "split_seed 1"]
