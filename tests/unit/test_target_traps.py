"""Ways in which published code leaks the test split or misreads a table, each of which must change nothing here."""

import re

import pytest
from test_tasks import HEADS, SURVIVAL, parsed, rows_of
from tiny_runs import SLIDES, write_table

from ds_wsi.bags.manifest import parse_manifest
from ds_wsi.training.settings import DataSettings, TaskSettings, TrainSettings
from ds_wsi.training.task import target_columns, task_config

OF_SURVIVAL = {"time_column": "months", "event_column": "event"}
ASKED = {
    "bins": {"task": "survival", "loss": "nll", "time_bins": 2, **OF_SURVIVAL},
    "reference": {"task": "survival", "loss": "cox", **OF_SURVIVAL},
    "scale": {"task": "regression", "label_column": ("score",)},
    "weights": {"task": "multilabel", "label_column": ("a", "b"), "pos_weight": "balanced"},
    "several": {"targets": ("score:mse", "a:bce", "os:nll"), "pos_weight": "balanced", **OF_SURVIVAL},
}
TRAIN, OTHERS = SLIDES[:6], SLIDES[6:]


def config_of(tmp_path, asked, **changes):
    """What config.json says of the task before training, of the table with these changes."""
    path = write_table(tmp_path / "m.csv", rows_of(**changes), HEADS)
    settings = TrainSettings(DataSettings(manifest=str(path), features_dir=str(tmp_path)), task=TaskSettings(**asked))
    manifest, problems = parse_manifest(path, need_slides=False, columns=target_columns(settings))
    assert problems == []
    return task_config(settings, manifest)


@pytest.mark.parametrize("name", ASKED)
def test_what_is_taken_of_targets_is_of_the_training_split_alone(tmp_path, name):
    """Bins, references, scales and weights of whole cohorts are a leak of PORPOISE's, SurvPath's and ABMILX's."""
    whole = config_of(tmp_path, ASKED[name])
    moved = {slide: {"months": 90 + k, "score": 50 - k, "a": (k + 1) % 2} for k, slide in enumerate(OTHERS)}
    assert config_of(tmp_path, ASKED[name], **moved) == whole
    of_training = {slide: {"months": 90 + k, "score": 50 - k, "a": int(k == 0)} for k, slide in enumerate(TRAIN)}
    assert config_of(tmp_path, ASKED[name], **of_training) != whole


def test_a_column_of_times_named_event_is_no_column_of_events(tmp_path):
    """ABMILX's tables hold months in `Event` and the event in `Status`."""
    _, problems = parsed(tmp_path, SURVIVAL, **{name: {"event": 12.5 + k} for k, name in enumerate(SLIDES)})
    assert len(problems) == len(SLIDES)
    assert re.search(r"event must be one of 1, yes, .*got '12.5'", problems[0])


@pytest.mark.parametrize("column", ["event", "a"])
def test_minus_one_is_no_class_and_no_missing_cell_by_itself(tmp_path, column):
    """MMP's tables and MOOZY's write -1 where a target is missing; here that cell is empty."""
    columns = SURVIVAL if column == "event" else target_columns(TrainSettings(task=TaskSettings(**ASKED["weights"])))
    _, problems = parsed(tmp_path, columns, s02={column: -1})
    assert len(problems) == 1
    assert re.search(rf"{column} must be .*got '-1' \(slide s02", problems[0])
