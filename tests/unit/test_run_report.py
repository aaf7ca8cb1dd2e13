"""What a finished run's page and metrics.json say of it."""

import json
import sys

import pytest
from tiny_runs import evaluate, train, write_cohort

from ds_wsi.runtime.environment import command_line
from ds_wsi.training.changed import changed_settings
from ds_wsi.training.settings import TrainSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_cohort(tmp_path_factory.mktemp("cohort"))
    assert train(root, root / "run", "--learning_rate", "0.001") == 0
    return root


def test_metrics_name_dataset_split_classes_and_positive_class(folder, capfd):
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert [metrics[name] for name in ("dataset", "split", "classes", "positive_class")] == [
        *("m", "test", ["normal", "tumor"], "tumor")
    ]
    assert evaluate(folder, folder / "run", folder / "all", "--split", "all", "--dataset_name", "mine") == 0
    metrics = json.loads((folder / "all" / "metrics.json").read_text())
    assert (metrics["dataset"], metrics["split"]) == ("mine", "all")


def test_the_page_tells_cohort_command_and_changed_settings(folder):
    html = (folder / "run" / "report.html").read_text()
    assert '<th scope="row">label tumor</th><td class="number">3</td><td class="number">2</td>' in html
    assert "{'train'" not in html
    assert "<dt>command</dt>" in html
    changed = html[html.index("Settings that differ") :]
    assert "<dt>--learning_rate</dt><dd>0.001</dd>" in changed
    assert "<dt>--num_train_epochs</dt><dd>2</dd>" in changed
    assert "--weight_decay" not in changed


def test_the_command_can_be_given_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/ds-wsi", "train", "--manifest", "my slides.csv"])
    assert command_line() == "ds-wsi train --manifest 'my slides.csv'"
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--seed", "1"])
    assert command_line() == "launch/train.py --seed 1"


def test_the_defaults_differ_in_nothing():
    assert changed_settings(TrainSettings()) == {
        "--encoder": "resnet18",
        "--num_train_epochs": "8",
        "--tile_size_px": "256",
    }, "without a manifest the demo's are the defaults"
