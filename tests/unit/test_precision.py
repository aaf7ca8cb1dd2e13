"""Evaluation in half precision: the encoder's alone, rounding's difference, told wherever results are kept."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from ds_wsi.bags.bag import FailureLog
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.features import read_about
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.cli import main
from ds_wsi.evaluation import validator
from ds_wsi.evaluation.norm_choice import NormPlan, choose_norms
from ds_wsi.evaluation.predict import encode_slides, predict_slides
from ds_wsi.evaluation.record import RunRecord
from ds_wsi.evaluation.validator import ValidationWork
from ds_wsi.models import ModelConfig, build_encoder, build_model, load_model, save_model
from ds_wsi.slides.policy import TilingPolicy

TILE_PX = 64
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}
LAYERS = 10  # of ResNet-10t, whose roundings add up at worst


@pytest.fixture(scope="module")
def cohort(demo_manifest):
    return load_cohort(demo_manifest, TilingPolicy(tile_size_px=TILE_PX))


def make_model(evaluation="running"):
    torch.manual_seed(0)
    tiling = {"tile_size_px": TILE_PX, "mpp": 0.5}
    model = build_model(ModelConfig("resnet10t", "gated_abmil", ("normal", "tumor"), tiling))
    return model.set_norms(evaluation=evaluation)


def features_of(model, cohort):
    slides, grids = cohort.manifest.slides, cohort.grids
    failures = FailureLog(slides, grids, 0.0)
    stream = encode_slides(model.eval(), slides, grids, [0, 3], ReadPolicy(0, chunk_tiles=5), failures)
    return [encoded.features for encoded in stream]


@pytest.mark.parametrize("evaluation", ["running", "bag"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_differs_by_rounding_alone(precision, evaluation, cohort):
    model = make_model(evaluation)
    plain = features_of(model, cohort)
    model.evaluation_precision = precision
    for one, half in zip(plain, features_of(model, cohort), strict=True):
        assert half.dtype == one.dtype == torch.float32
        error = (half - one).norm() / one.norm()
        assert 0 < error < LAYERS * ROUNDING[precision]  # not 0: the encoder did compute in it
    slides, grids = cohort.manifest.slides, cohort.grids
    failures = FailureLog(slides, grids, 0.0)
    (prediction,) = predict_slides(model, slides, grids, [0], ReadPolicy(0), failures)
    assert prediction.logits.dtype == prediction.attention.dtype == torch.float32


def test_without_the_option_nothing_is_cast_and_float64_never_is(cohort):
    model = make_model()
    assert model.evaluation_precision == "no"
    before = features_of(model, cohort)
    model.evaluation_precision = "bf16"
    features_of(model, cohort)
    model.evaluation_precision = "no"
    assert all(map(torch.equal, features_of(model, cohort), before))
    wide = make_model().double()
    exact = features_of(wide, cohort)
    wide.evaluation_precision = "bf16"
    for one, other in zip(exact, features_of(wide, cohort), strict=True):
        assert one.dtype == other.dtype == torch.float64
        assert torch.equal(one, other)


def test_features_keep_their_dtype_and_say_their_precision(demo_manifest, tmp_path, capsys):
    weights = tmp_path / "encoder.pt"
    torch.save(build_encoder("resnet10t").state_dict(), weights)
    given = ["features", "--encoder", "resnet10t", "--encoder_weights", str(weights), "--manifest", str(demo_manifest)]
    given += ["--tile_size_px", str(TILE_PX), "--dataloader_num_workers", "0", "--device", "cpu", "--output_dir"]
    assert main([*given, str(tmp_path / "plain")]) == 0
    assert "encoder in float32 on cpu (--precision)" in capsys.readouterr().err
    assert main([*given, str(tmp_path / "half"), "--precision", "bf16"]) == 0
    assert "encoder in bf16 mixed precision on cpu" in capsys.readouterr().err
    for plain in (tmp_path / "plain").glob("*.safetensors"):
        half = tmp_path / "half" / plain.name
        one, other = (load_file(path)["features"] for path in (plain, half))
        assert one.dtype == other.dtype == torch.float32
        assert 0 < (one - other).norm() / one.norm() < LAYERS * ROUNDING["bf16"]
        assert read_about(half)["encoder"] == f"{read_about(plain)['encoder']} in bf16"
    assert main([*given, str(tmp_path / "plain"), "--precision", "bf16"]) == 2
    assert "in bf16, got resnet10t" in capsys.readouterr().err
    assert main([*given, str(tmp_path / "half"), "--precision", "bf16"]) == 0
    assert "kept" in capsys.readouterr().out


def predictions(folder):
    with (folder / "predictions.csv").open() as file:
        return [float(row["probability_tumor"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_run_and_its_evaluations_follow_the_option_and_record_it(demo_manifest, tmp_path):
    run = tmp_path / "run"
    train = ["train", "--manifest", str(demo_manifest), "--encoder", "resnet10t", "--tile_size_px", str(TILE_PX)]
    train += ["--dataloader_num_workers", "0", "--num_train_epochs", "1", "--tiles_per_slide", "4"]
    assert main([*train, "--eval_precision", "bf16", "--output_dir", str(run)]) == 0
    assert RunRecord.read(run).settings["eval_precision"] == "bf16"
    assert "encoder in bf16 mixed precision" in (run / "report.html").read_text()
    assert load_model(run)[0].evaluation_precision == "no"  # of a command, not of the model
    evaluate = ["evaluate", "--model", str(run), "--manifest", str(demo_manifest), "--dataloader_num_workers", "0"]
    for precision in ("no", "bf16"):
        folder = tmp_path / precision
        given = [] if precision == "no" else ["--precision", precision]
        assert main([*evaluate, "--device", "cpu", *given, "--output_dir", str(folder)]) == 0
        assert RunRecord.read(folder).settings.get("eval_precision", "no") == precision
    assert predictions(tmp_path / "bf16") == predictions(run) != predictions(tmp_path / "no")
    assert predictions(tmp_path / "bf16") == pytest.approx(predictions(tmp_path / "no"), abs=0.02)
    again = [*train, "--output_dir", str(run), "--resume_from_checkpoint"]
    assert main(again) == 2


def test_the_process_beside_training_validates_in_it_too(cohort, tmp_path):
    model = make_model()
    tiling = {"tile_size_px": TILE_PX, "mpp": 0.5}
    config = ModelConfig("resnet10t", "gated_abmil", ("normal", "tumor"), tiling)
    save_model(tmp_path, config, model.state_dict())
    slides, grids = cohort.manifest.slides, cohort.grids
    plan, policy = NormPlan(rows=cohort.rows("validation")), ReadPolicy(0)
    losses = {}
    for precision in ("no", "bf16"):
        failures = FailureLog(slides, grids, 0.0)
        work = ValidationWork(config, slides, grids, plan, policy, "cpu", precision)
        beside = validator._validate(work, tmp_path / "model.safetensors", failures).choice.metrics
        model.evaluation_precision = precision
        assert beside == choose_norms(model, slides, grids, policy, failures, plan).metrics
        losses[precision] = beside["running"]["eval_loss"]
    assert 0 < abs(losses["no"] - losses["bf16"]) < 0.02


def test_a_model_of_features_has_nothing_to_cast(tmp_path, capsys):
    torch.manual_seed(0)
    config = ModelConfig(None, "gated_abmil", ("normal", "tumor"), {}, in_dim=8)
    save_model(tmp_path / "model", config, build_model(config).state_dict())
    (tmp_path / "features").mkdir()
    lines = ["slide_id,label,split"]
    for number in range(4):
        torch.save(torch.randn(5, 8), tmp_path / "features" / f"s{number}.pt")
        lines.append(f"s{number},{('normal', 'tumor')[number % 2]},test")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    given = ["evaluate", "--model", str(tmp_path / "model"), "--manifest", str(tmp_path / "m.csv"), "--features_dir"]
    given += [str(tmp_path / "features"), "--precision", "bf16", "--device", "cpu", "--dataloader_num_workers", "0"]
    assert main([*given, "--output_dir", str(tmp_path / "out")]) == 0
    assert "--precision: without effect" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())
