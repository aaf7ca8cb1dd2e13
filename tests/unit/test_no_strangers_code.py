"""A file that runs a command when it is unpickled, in the place of every file that is opened: it never runs."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
import torch
from tiny_runs import evaluate, train, write_cohort

from ds_wsi.cli import main
from ds_wsi.training.checkpoint import FILE_LIST, seal

# As torch, Accelerate and DeepSpeed name their pickles: nothing of ours, and nothing that is looked for.
STRANGERS = (
    "custom_checkpoint_0.pkl",
    "random_states_0.pkl",
    "optimizer.bin",
    "optimizer_0.bin",
    "scheduler.bin",
    "scaler.pt",
    "pytorch_model.bin",
    "pytorch_model_0.bin",
    "latest",
    "pytorch_model/mp_rank_00_model_states.pt",
    "pytorch_model/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "pytorch_model/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "pytorch_model_fsdp_0/.metadata",
    "optimizer_0/.metadata",
    "comm_hook-00000-of-00001.pt",
    "random-00000-of-00001.pkl",
    "__init__.py",
    "model.pkl",
)


class Runs:
    """Unpickled, it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "it ran"


@pytest.fixture
def payloads(marker):
    """Kind -> content: a bare pickle, and torch's file of one; of an archive numpy's, too."""
    stream, archive = io.BytesIO(), io.BytesIO()
    torch.save({"features": Runs(marker), "state_dict": Runs(marker)}, stream)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("features.npy", b"\x93NUMPY\x01\x00" + pickle.dumps(Runs(marker)))
    return {"pickle": pickle.dumps(Runs(marker)), "torch": stream.getvalue(), "npz": archive.getvalue()}


def test_the_payloads_would_run(payloads, marker):
    pickle.loads(payloads["pickle"])
    assert marker.exists()
    marker.unlink()
    torch.load(io.BytesIO(payloads["torch"]), weights_only=False)
    assert marker.exists()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A cohort of features and a run on it that was stopped."""
    folder = write_cohort(tmp_path_factory.mktemp("cohort"))
    more = ("--save_steps", "3", "--ema_decay", "0.5")
    assert train(folder, folder / "run", *more, epochs=1) == 0
    (folder / "run" / "run.json").rename(folder / "finished.json")
    shutil.rmtree(folder / "run" / "checkpoint-6")
    return folder


def plant(folder, content, names=STRANGERS):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def resealed(checkpoint):
    (checkpoint / FILE_LIST).unlink(missing_ok=True)
    seal(checkpoint)


def goes_on(folder):
    return train(
        folder, folder / "run", "--save_steps", "3", "--ema_decay", "0.5", "--resume_from_checkpoint", epochs=1
    )


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_checkpoint_with_strangers_beside_is_gone_on_with(cohort, payloads, kind, marker, tmp_path):
    shutil.copytree(cohort, tmp_path / "c")
    plant(tmp_path / "c" / "run" / "checkpoint-3", payloads[kind])
    resealed(tmp_path / "c" / "run" / "checkpoint-3")
    assert goes_on(tmp_path / "c") == 0
    assert not marker.exists()


def test_every_file_of_a_checkpoint_is_refused_where_it_would_run_code(cohort, payloads, marker, tmp_path, capsys):
    names = sorted(path.name for path in (cohort / "run" / "checkpoint-3").iterdir() if path.name != FILE_LIST)
    assert names == [
        "model.safetensors",
        "optimizer.safetensors",
        "random-00000-of-00001.safetensors",
        "state.json",
        "weight_average.safetensors",
    ]
    shutil.copytree(cohort, tmp_path / "c")
    checkpoint = tmp_path / "c" / "run" / "checkpoint-3"
    for name in names:
        for content in payloads.values():
            kept = (checkpoint / name).read_bytes()
            (checkpoint / name).write_bytes(content)
            resealed(checkpoint)
            assert goes_on(tmp_path / "c") == 2, name
            printed = capsys.readouterr().err
            assert "Traceback" not in printed, name
            assert name in printed
            assert not marker.exists(), name
            (checkpoint / name).write_bytes(kept)
    (checkpoint / FILE_LIST).write_bytes(payloads["pickle"])
    assert goes_on(tmp_path / "c") == 2
    assert not marker.exists()


@pytest.mark.parametrize("command", ["evaluate", "heatmap", "features", "report", "compare"])
def test_a_model_or_results_that_would_run_code(cohort, payloads, marker, tmp_path, command, capsys):
    shutil.copytree(cohort, tmp_path / "c")
    run, out = tmp_path / "c" / "run", tmp_path / "out"
    shutil.move(tmp_path / "c" / "finished.json", run / "run.json")
    shutil.copytree(run, tmp_path / "other")

    def status():
        if command == "evaluate":
            return evaluate(tmp_path / "c", run, out)
        if command in ("report", "compare"):
            runs = [run] if command == "report" else [run, tmp_path / "other"]
            return main([command, *map(str, runs), "--output_dir", str(out)])
        table = str(tmp_path / "c" / "m.csv")
        return main([command, "--model", str(run), "--manifest", table, "--output_dir", str(out)])

    opened = {"evaluate": ("config.json", "model.safetensors"), "report": ("metrics.json", "run.json")}
    opened["compare"] = ("predictions.csv", "metrics.json")
    for name in opened.get(command, ("config.json", "model.safetensors")):
        for content in payloads.values():
            kept = (run / name).read_bytes()
            (run / name).write_bytes(content)
            plant(run, content, ("pytorch_model.bin", "model.pt", "model.pkl", "weights.bin"))
            code = status()
            printed = capsys.readouterr().err
            assert "Traceback" not in printed, (name, printed)
            assert code in ((0, 2) if name == "metrics.json" else (2,)), (name, code, printed)
            assert code == 0 or name in printed, printed
            assert not marker.exists(), name
            (run / name).write_bytes(kept)
            shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("suffix", [".pt", ".h5", ".safetensors", ".npy", ".npz"])
def test_features_that_would_run_code(cohort, payloads, marker, tmp_path, suffix, capsys):
    for content in payloads.values():
        folder = tmp_path / "c"
        shutil.copytree(cohort, folder)
        (folder / "features" / "s00.safetensors").unlink()
        (folder / "features" / f"s00{suffix}").write_bytes(content)
        assert train(folder, folder / "new", epochs=1) == 2
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        assert "s00" in printed
        assert not marker.exists()
        shutil.rmtree(folder)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".parquet", ".arrow", ".feather", ".pkl", "", ".txt"])
def test_tables_that_would_run_code(cohort, payloads, marker, tmp_path, suffix, capsys):
    for content in payloads.values():
        (tmp_path / f"m{suffix}").write_bytes(content)
        options = ("--features_dir", cohort / "features", "--manifest", tmp_path / f"m{suffix}")
        assert main(["train", *map(str, (*options, "--output_dir", tmp_path / "new"))]) == 2
        assert "Traceback" not in capsys.readouterr().err
        assert not marker.exists()


def test_an_arrow_table_of_a_type_of_pythons_own(cohort, payloads, marker, tmp_path, capsys):
    """Older pyarrow unpickled the metadata of such a column as it read the schema."""
    about = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payloads["pickle"]}
    table = pa.table(
        {"slide_id": ["s00"], "label": ["normal"]},
        schema=pa.schema([pa.field("slide_id", pa.string(), metadata=about), pa.field("label", pa.string())]),
    )
    pyarrow.feather.write_feather(table, tmp_path / "m.feather", compression="uncompressed")
    with pa.OSFile(str(tmp_path / "m.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    for name in ("m.feather", "m.arrow"):
        options = ("--features_dir", cohort / "features", "--manifest", tmp_path / name)
        assert main(["train", *map(str, (*options, "--output_dir", tmp_path / "new"))]) == 2  # too few slides
        assert "Traceback" not in capsys.readouterr().err
        assert not marker.exists()


def test_a_dataset_that_was_saved_with_pickles_in_it(cohort, payloads, marker, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    about = {"features": {"slide_id": {"dtype": "string", "_type": "Value"}}}
    (tmp_path / "m" / "dataset_info.json").write_text(json.dumps(about))
    (tmp_path / "m" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data.arrow"}], "_split": None})
    )
    for content in payloads.values():
        plant(tmp_path / "m", content, ("data.arrow", "m.py", "dataset.pkl", "data-00000-of-00001.arrow"))
        options = ("--features_dir", cohort / "features", "--manifest", tmp_path / "m")
        assert main(["train", *map(str, (*options, "--output_dir", tmp_path / "new"))]) == 2
        assert "Traceback" not in capsys.readouterr().err
        assert not marker.exists()


def test_encoder_weights_and_folders_of_encoders(payloads, marker, tmp_path):
    from ds_wsi.evaluation.extract import build_extractor
    from ds_wsi.models.weights import read_tensors
    from ds_wsi.slides.policy import TilingPolicy

    for kind, content in payloads.items():
        for suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz"):
            (tmp_path / f"{kind}{suffix}").write_bytes(content)
            with pytest.raises(ValueError, match=r"encoder weights must be a whole file of tensors"):
                read_tensors(tmp_path / f"{kind}{suffix}")
        folder = tmp_path / f"encoder-{kind}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 0}))
        plant(folder, content, ("pytorch_model.bin", "model.pt", "modeling.py"))
        with pytest.raises(Exception, match=r"(?i)encoder|weights|checkpoint|pickle|safetensors"):
            build_extractor(f"local-dir:{folder}", TilingPolicy(tile_size_px=64))
    assert not marker.exists()


def test_a_folder_of_an_encoder_under_a_timm_that_takes_any_pickle(payloads, marker, tmp_path, monkeypatch):
    """The way in which timm 1.0.16 reads the file of such a folder; what it finds is torch's own answer."""
    from timm.models import _builder

    from ds_wsi.models.encoder import build_encoder

    monkeypatch.setattr(
        _builder, "load_state_dict_from_path", lambda path: torch.load(path / "pytorch_model.bin", weights_only=False)
    )
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 0}))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for content in payloads.values():
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"the weights of encoder 'local-dir:"):
            build_encoder("test_resnet", source=f"local-dir:{tmp_path}")
        assert not marker.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"])
def test_the_options_of_a_folder_do_not_name_weights(payloads, marker, tmp_path, name):
    from ds_wsi.models.hub import resolve_encoder

    (tmp_path / "e.pth").write_bytes(payloads["torch"])
    value = str(tmp_path / "e.pth") if name == "checkpoint_path" else {"file": str(tmp_path / "e.pth")}
    about = {"architecture": "test_resnet", "model_args": {name: value}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="must not say where its weights are"):
        resolve_encoder(f"local-dir:{tmp_path}")
    assert not marker.exists()


@pytest.mark.parametrize("reader", ["mask", "heat map", "report"])
def test_an_image_of_another_format_starts_no_program(marker, tmp_path, monkeypatch, reader):
    """Pillow has Ghostscript draw PostScript, whatever the file is called."""
    from PIL import Image

    from ds_wsi.evaluation.heatmap import is_heat_map
    from ds_wsi.evaluation.report import image_html
    from ds_wsi.slides.demo import write_pyramid
    from ds_wsi.slides.masks import MaskFile, read_mask
    from ds_wsi.slides.slide import Slide, SlideError

    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{marker}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    picture = tmp_path / "s.png"
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    if reader == "mask":
        write_pyramid(tmp_path / "s.tiff", np.full((64, 64, 3), 200, np.uint8), mpp=0.5)
        with Slide(tmp_path / "s.tiff") as slide, pytest.raises(SlideError, match=r"readable PNG.*s\.png"):
            read_mask(MaskFile(picture), slide, 1)
    elif reader == "heat map":
        assert not is_heat_map(picture)
    else:
        with pytest.raises(OSError, match=r"s\.png"):
            image_html(picture, "PNG", 64, "")
    assert not marker.exists()
    with Image.open(picture) as image, pytest.raises(OSError):
        image.load()
    assert marker.exists()


@pytest.mark.parametrize("name", ["socket.py", "pickle.py", "multiprocessing.py"])
def test_a_process_imports_nothing_from_the_present_folder(marker, tmp_path, monkeypatch, name):
    from ds_wsi.runtime.processes import from_own_path

    (tmp_path / "here").mkdir()
    (tmp_path / "here" / name).write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit\n")
    monkeypatch.chdir(tmp_path / "here")
    start = [sys.executable, "-c", "import multiprocessing.spawn"]
    with from_own_path():
        assert subprocess.run(start, check=False).returncode == 0
    assert not marker.exists()
    assert "PYTHONSAFEPATH" not in os.environ
    subprocess.run(start, check=False, capture_output=True)
    assert marker.exists()


def test_the_trainer_refuses_checkpoints_that_are_unpickled():
    from transformers import TrainingArguments

    from ds_wsi.engines.hf.trainer import _require_arguments

    arguments = TrainingArguments(output_dir="x", use_cpu=True, report_to=[])
    _require_arguments(arguments, {})
    arguments.fsdp = "full_shard"
    with pytest.raises(ValueError, match="fsdp must be off"):
        _require_arguments(arguments, {})
    arguments.fsdp = ""
    arguments.deepspeed_plugin = SimpleNamespace(deepspeed_config={"checkpoint": {"load_universal": True}})
    with pytest.raises(ValueError, match="load_universal of the DeepSpeed config must be off"):
        _require_arguments(arguments, {})


def test_grids_coordinates_and_packed_tiles(payloads, marker, tmp_path):
    from ds_wsi.slides.coords import import_clam, import_trident, read_grid
    from ds_wsi.slides.tile_store import StoredSlide

    for content in payloads.values():
        for name, read in {
            "g.safetensors": read_grid,
            "c.h5": lambda path: import_clam(path, None),
            "t.h5": lambda path: import_trident(path, None),
            "s.arrow": StoredSlide,
        }.items():
            path = Path(tmp_path / name)
            path.write_bytes(content)
            with pytest.raises((ValueError, OSError, RuntimeError)):
                read(path)
    assert not marker.exists()
