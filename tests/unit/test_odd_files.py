"""What is no file, leads out of its file, is larger than it looks, or is other JSON: a named error at once."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import datasets
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import evaluate, train, write_cohort

from ds_wsi.bags.delimited import read_delimited
from ds_wsi.bags.feature_cohort import load_feature_cohort
from ds_wsi.bags.features import FeatureFileError, read_features, read_places, read_shape
from ds_wsi.bags.problems import ManifestError
from ds_wsi.bags.run_splits import read_splits
from ds_wsi.bags.tables.read import read_table_file
from ds_wsi.cli import main
from ds_wsi.engines.deepspeed_json.config import read_config
from ds_wsi.evaluation.comparison import read_predictions
from ds_wsi.evaluation.record import RunFolderError, RunRecord, read_metrics
from ds_wsi.models import load_encoder_weights, load_model
from ds_wsi.models.config import ModelConfig
from ds_wsi.models.weights_file import WeightsFileError, read_weights, save_weights
from ds_wsi.partition.planning.rates import ASSUMED, cache_path, find_rates
from ds_wsi.runtime.files import read_file, read_json
from ds_wsi.runtime.fingerprint import file_fingerprint
from ds_wsi.runtime.tensor_file import open_tensors
from ds_wsi.slides.coords import import_clam, read_grid
from ds_wsi.slides.masks import find_mask
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.slide import SlideError
from ds_wsi.training.checkpoint import read_state
from ds_wsi.training.run_folder import is_run_folder, logging_to
from ds_wsi.training.yaml_config import read_yaml


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


# Reader -> the name that it is given; each would wait for ever at a pipe, or read without an end.
READERS = {
    "bytes": (read_file, "a"),
    "json": (lambda path: read_json(path, "it"), "a.json"),
    "fingerprint": (file_fingerprint, "a"),
    "table": (read_delimited, "a.csv"),
    "json table": (read_table_file, "a.json"),
    "arrow table": (read_table_file, "a.arrow"),
    "parquet table": (read_table_file, "a.parquet"),
    "settings": (read_yaml, "a.yaml"),
    "deepspeed": (read_config, "a.json"),
    "splits": (lambda path: read_splits(path.parent), "splits.csv"),
    "grid": (read_grid, "a.safetensors"),
    "coordinates": (lambda path: import_clam(path, None), "a.h5"),
    "weights": (read_weights, "a.safetensors"),
    "checkpoint": (lambda path: open_tensors(path).__enter__(), "a.safetensors"),
    "state": (lambda path: read_state(path.parent), "state.json"),
    "encoder": (lambda path: load_encoder_weights(torch.nn.Linear(1, 1), path), "a.pth"),
    "mask": (lambda path: find_mask(path.parent, path.stem), "a.geojson"),
    "features": (read_features, "a.pt"),
}


@pytest.mark.parametrize("make", [make_pipe, make_device])
@pytest.mark.parametrize("what", READERS)
def test_what_is_no_file_is_refused_at_once(what, make, tmp_path):
    read, name = READERS[what]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("make", [make_pipe, make_device])
def test_a_pipe_in_the_place_of_a_log_is_left_alone(make, tmp_path):
    make(tmp_path / "train.log")
    with logging_to(tmp_path):
        pass
    assert not (tmp_path / "train.log").is_file()


def test_a_mask_that_leads_nowhere_is_not_left_out_in_silence(tmp_path):
    assert find_mask(tmp_path, "s") is None
    (tmp_path / "s.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(SlideError, match=r"must be a file, got none at .*s\.png"):
        find_mask(tmp_path, "s")


@pytest.fixture
def outside(tmp_path):
    """Another h5 file, and a pipe that nobody writes to."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = np.ones((5, 4), "f4")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def virtual(file, folder):
    layout = h5py.VirtualLayout((5, 4), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "features", (5, 4))
    file.create_virtual_dataset("features", layout)


OUTSIDE = {
    "link": lambda file, folder: file.update(features=h5py.ExternalLink(str(folder / "other.h5"), "/features")),
    "link to a pipe": lambda file, folder: file.update(features=h5py.ExternalLink(str(folder / "pipe"), "/features")),
    "soft link": lambda file, folder: file.update(x=np.ones((5, 4)), features=h5py.SoftLink("/x")),
    "pipe": lambda file, folder: file.create_dataset(
        "features", (5, 4), "f4", external=[(str(folder / "pipe"), 0, 80)]
    ),
    "stranger": lambda file, folder: file.create_dataset("features", (5, 4), "u1", external=[("/etc/passwd", 0, 20)]),
    "virtual": virtual,
    "another link": lambda file, folder: file.update(a=h5py.ExternalLink(str(folder / "pipe"), "/features")),
    "coords": lambda file, folder: file.update(
        features=np.ones((5, 4), "f4"), coords=h5py.ExternalLink(str(folder / "pipe"), "/coords")
    ),
}


@pytest.mark.parametrize("how", OUTSIDE)
def test_an_h5_file_is_not_followed_to_other_files(outside, how):
    with h5py.File(outside / "s.h5", "w") as file:
        OUTSIDE[how](file, outside)
    with pytest.raises(FeatureFileError, match=r"s\.h5"):
        read_features(outside / "s.h5")


def test_a_torch_file_that_is_larger_than_it_looks(tmp_path):
    torch.save(torch.zeros(1).expand(10**6, 10**6), tmp_path / "wide.pt")
    torch.save({"features": torch.ones(3, 2), "coords": torch.zeros(1).expand(10**12, 2)}, tmp_path / "coords.pt")
    torch.save(torch.zeros(1000, 1000), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "packed.pt", "w", 8) as packed:
        for record in whole.infolist():
            packed.writestr(record.filename, whole.read(record))
    for name in ("wide.pt", "coords.pt", "packed.pt"):
        for read in (read_features, read_shape, read_places):
            with pytest.raises(FeatureFileError, match=name):
                read(tmp_path / name)
    with pytest.raises(ValueError, match=r"must not be compressed.*packed\.pt"):
        load_encoder_weights(torch.nn.Linear(1, 1), tmp_path / "packed.pt")
    assert read_shape(tmp_path / "whole.pt") == (1000, 1000)


def test_a_torch_file_of_weights_with_another_byte_is_refused(tmp_path):
    encoder = torch.nn.Linear(50, 50)
    torch.save(encoder.state_dict(), tmp_path / "e.pth")
    content = bytearray((tmp_path / "e.pth").read_bytes())
    at = content.find(encoder.weight.detach().numpy().tobytes())
    content[at + 7] ^= 1
    (tmp_path / "e.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"checksums that were written.*e\.pth"):
        load_encoder_weights(torch.nn.Linear(50, 50), tmp_path / "e.pth")


@pytest.mark.parametrize("name", ["../pipe", "../../etc/passwd", "/etc/passwd"])
def test_a_saved_dataset_does_not_name_files_elsewhere(name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    datasets.Dataset.from_dict({"slide_id": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    state = json.loads((tmp_path / "saved/state.json").read_text())
    (tmp_path / "saved/state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
    with pytest.raises(ManifestError, match=r"(?s)saved.*data outside of the folder"):
        read_table_file(tmp_path / "saved")


OTHER_JSON = [
    "",
    "null",
    "[]",
    "3",
    '"x"',
    "[{}]",
    "{}",
    "[" * 10**5,
    '{"a":' * 10**5,
    "1" * 5000,
    "\udcff",
    '{"a": NaN',
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = write_cohort(tmp_path_factory.mktemp("cohort"))
    assert train(folder, folder / "run", epochs=1) == 0
    return folder


@pytest.mark.parametrize("text", OTHER_JSON, ids=range(len(OTHER_JSON)))
def test_json_that_is_another_is_named_or_read_anew(cohort, text, tmp_path, monkeypatch):
    run = shutil.copytree(cohort / "run", tmp_path / "run")
    content = text.encode(errors="surrogateescape")
    for name in ("config.json", "metrics.json", "run.json", "started.json"):
        (run / name).write_bytes(content)
    for read, error in (
        (lambda: ModelConfig.read(run / "config.json"), ValueError),
        (lambda: read_config(run / "config.json")["x"], (ValueError, KeyError)),
        (lambda: RunRecord.read(run), RunFolderError),
        (lambda: read_metrics(run), RunFolderError),
        (lambda: read_predictions(run), ValueError),
    ):
        with pytest.raises(error):
            read()
    assert is_run_folder(run)  # by its checkpoint
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "ds_wsi" / "rates.json"
    assert cache_path() == cache
    cache.parent.mkdir()
    cache.write_bytes(content)
    assert find_rates(torch.device("cpu")) == ASSUMED["cpu"]
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(ManifestError):
        load_feature_cohort(tmp_path / "m.json", cohort / "features")


@pytest.mark.parametrize("text", ['sep="\n', '"' + "x" * 200_000 + '",b\n'], ids=["sign", "long"])
def test_a_csv_that_has_no_end_is_named(text, tmp_path):
    (tmp_path / "m.csv").write_text("slide_id,label\n" + text if text[0] == '"' else text)
    with pytest.raises(ValueError, match=r"m\.csv"):
        load_feature_cohort(tmp_path / "m.csv", tmp_path)


@pytest.mark.parametrize(
    "about", [b"[]", b"{", b'{"info": 3}', b'{"info": {"features": {"a": {"_type": "ClassLabel", "names": 5}}}}']
)
def test_a_table_with_other_words_about_it_is_named(about, tmp_path):
    table = pa.table({"a": ["1"]}).replace_schema_metadata({b"huggingface": about})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=r"m\.parquet"):
        read_table_file(tmp_path / "m.parquet")


@pytest.mark.parametrize("change", ["width", "torn", "kind"])
def test_a_changed_record_of_features_is_not_believed(cohort, change, tmp_path):
    record = tmp_path / "features.json"
    features = load_feature_cohort(cohort / "m.csv", cohort / "features", record_dir=tmp_path)
    text = record.read_text()
    record.write_text({"width": text.replace('"n_rows": 5', '"n_rows": 6', 1), "torn": text[:99], "kind": "[]"}[change])
    assert load_feature_cohort(cohort / "m.csv", cohort / "features", record_dir=tmp_path) == features
    assert record.read_text() == text


def test_changed_predictions_are_not_compared(cohort, tmp_path, capsys):
    run = shutil.copytree(cohort / "run", tmp_path / "run")
    text = (run / "predictions.csv").read_text()
    (run / "predictions.csv").write_text(text.replace("tumor", "normal", 2))
    assert main(["compare", str(run), str(cohort / "run"), "--output_dir", str(tmp_path / "o")]) == 2
    assert "predictions.csv is not the one" in capsys.readouterr().err


def test_exported_weights_with_any_other_byte_are_refused(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    save_weights(tmp_path / "w.safetensors", state)
    whole = (tmp_path / "w.safetensors").read_bytes()
    save_weights(tmp_path / "again.safetensors", state)
    assert (tmp_path / "again.safetensors").read_bytes() == whole
    assert all(torch.equal(read_weights(tmp_path / "w.safetensors")[name], value) for name, value in state.items())
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        (tmp_path / "w.safetensors").write_bytes(damaged)
        try:
            weights = read_weights(tmp_path / "w.safetensors")
        except WeightsFileError:
            continue
        assert weights.keys() == state.keys()  # in a blank of the head, or the name of a checksum
        assert all(torch.equal(weights[name], value) for name, value in state.items())
    save_file(state, tmp_path / "old.safetensors")
    assert read_weights(tmp_path / "old.safetensors").keys() == state.keys()


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused(cohort, number, tmp_path, capsys):
    run = shutil.copytree(cohort / "run", tmp_path / "run")
    state = load_file(run / "model.safetensors")
    next(iter(state.values())).view(-1)[0] = float(number)
    save_file(state, run / "model.safetensors")
    assert evaluate(cohort, run, tmp_path / "o") == 2
    assert "infinity or no number" in (printed := capsys.readouterr().err)
    assert "model.safetensors" in printed
    weights = {"weight": torch.full((2, 2), float(number)), "bias": torch.zeros(2)}
    save_file(weights, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"must be finite.*e\.safetensors"):
        load_encoder_weights(torch.nn.Linear(2, 2), tmp_path / "e.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder_options", {"checkpoint_path": "/tmp/x.pth"}),
        ("classes", 5),
        ("classes", "ab"),
        ("mean", [float("nan"), 0, 0]),
        ("std", [1, 1]),
        ("tiling", []),
        ("aggregator", ["abmil"]),
        ("aggregator_options", {"no_such": 1}),
        ("in_dim", "8"),
        ("in_dim", -1),
        ("version", True),
        ("norm_training", None),
    ],
)
def test_a_model_of_other_values_is_named(cohort, key, value, tmp_path):
    run = Path(shutil.copytree(cohort / "run", tmp_path / "run"))
    values = json.loads((run / "config.json").read_text())
    if key == "encoder_options":
        values |= {"encoder": "test_resnet", "in_dim": None, "tiling": {"tile_size_px": 64}}
    (run / "config.json").write_text(json.dumps({**values, key: value}))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load_model(run)
    assert key != "encoder_options" or "must not say where its weights are" in str(caught.value)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "0", "-1"])
def test_tiles_of_no_resolution_are_refused(number):
    for name in ("mpp", "overview_mpp"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            TilingPolicy(**{name: float(number)})
