"""A teacher's folder that does not fit is refused by name, before anything is trained; the distance is in the log."""

import json

import pytest
from distill_cases import DRAWN, ENCODER, TILE, write_cohort
from safetensors import safe_open
from safetensors.torch import save_file

from ds_wsi.bags.features import read_features, write_features
from ds_wsi.cli import build_parser, main
from ds_wsi.models.loss import distillation_losses
from ds_wsi.training.options import settings_from
from ds_wsi.training.teacher import require_teachable


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    write_cohort(folder)
    return folder


def train(folder, *more, teacher="teacher", epochs=2):
    options = {
        "manifest": folder / "cohort.csv",
        "tiles_dir": folder / "tiles",
        "encoder": ENCODER,
        "aggregator": "abmil",
        **{"tile_size_px": TILE, "tissue": "grey", "min_tissue_fraction": 0},
        "tiles_per_slide": DRAWN,
        "num_train_epochs": epochs,
        "dataloader_num_workers": 0,
        "distill": folder / teacher,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return main(["train", *words, *map(str, more)])


def copied(folder, name, change):
    """The teacher's folder, with `change` made to what its first slide's file says and holds."""
    (folder / name).mkdir()
    for path in sorted((folder / "teacher").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"]) if "about" in file.metadata() else dict(file.metadata())
        features, coords = read_features(path)
        side = float(about.pop("tile_size_level0_px", TILE))
        about = {key: value for key, value in about.items() if key in KEPT}
        if path.stem == "s0":
            features, coords, about = change(features, coords, about)
        write_features(folder / name / path.name, features, coords, side, about)


KEPT = ("slide_id", "encoder", "mean_and_std", "tiles", "slide", "pixels")


def test_a_run_beside_a_teacher_tells_its_distance(cohort, capfd):
    assert train(cohort, "--output_dir", cohort / "run", "--freeze_encoder_epochs", 1) == 0
    history = json.loads((cohort / "run" / "history.json").read_text())
    distances = [entry["distill_loss"] for entry in history]
    assert all(0 < distance < 10 for distance in distances)
    said = capfd.readouterr().err
    assert "teacher: " in said
    assert f"epoch 1: features {distances[0]:.4g} from the teacher's" in said


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("weights", lambda f, c, a: (f, c, {**a, "encoder": f"{ENCODER} with weights 00000000"}), "encoder must be"),
        ("normalised", lambda f, c, a: (f, c, {**a, "mean_and_std": "(0, 0, 0), (1, 1, 1)"}), "mean_and_std must be"),
        ("tiled", lambda f, c, a: (f, c, {**a, "tiles": "4 at coords 0, {}"}), "tiles must be"),
        ("of another slide", lambda f, c, a: (f, c, {**a, "slide": "another"}), "slide must be"),
        ("short", lambda f, c, a: (f[:1], c[:1], a), "must hold features of every tile, got none of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(cohort, capfd, name, change, words):
    copied(cohort, name, change)
    assert train(cohort, "--output_dir", cohort / f"run {name}", teacher=name) != 0
    said = " ".join(capfd.readouterr().err.split())
    assert words in said
    assert "s0" in said


def test_other_files_and_settings_are_refused(cohort, capfd):
    (cohort / "foreign").mkdir()
    save_file(
        {"features": read_features(cohort / "teacher" / "s0.safetensors").features}, cohort / "foreign/s0.safetensors"
    )
    assert train(cohort, "--output_dir", cohort / "no", teacher="foreign") != 0
    said = " ".join(capfd.readouterr().err.split())
    assert "must be a file that `ds-wsi features` wrote" in said
    assert "slide s4 must have one file of features" in said
    for given, words in (
        (("--freeze_encoder",), "got --freeze_encoder"),
        (("--features_dir", cohort / "teacher"), "got --features_dir"),
        (("--distill_weight", -1), "--distill_weight must be positive"),
    ):
        assert train(cohort, "--output_dir", cohort / "no", *given) != 0
        assert words in " ".join(capfd.readouterr().err.split())


def test_another_teacher_is_another_run(cohort, capfd):
    copied(cohort, "moved", lambda f, c, a: (f, c, a))
    run = cohort / "stopped"
    assert train(cohort, "--output_dir", run, epochs=1) == 0
    again = ("--output_dir", run, "--resume_from_checkpoint")
    assert train(cohort, *again, "--distill_weight", 2, epochs=1) != 0
    assert "distill_weight" in capfd.readouterr().err
    assert train(cohort, *again, teacher="moved", epochs=1) == 0


def test_the_distance_is_over_a_bags_own_tiles():
    import torch

    features = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    of_bags = distillation_losses(features, teacher, [2, 1])
    assert of_bags.tolist() == [(2.5 + 2.0) / 2, 8.0]
    assert distillation_losses(features, teacher, [2, 1], totals=[4, 1]).tolist() == [(2.5 + 2.0) / 4, 8.0]
    assert distillation_losses(features[2:], teacher[2:], [1], kind="cosine").item() == pytest.approx(1 - 3 / 5)


@pytest.mark.parametrize("more", [("--bag", "patient"), ("--mpps", "0.5,2.0")])
def test_a_teacher_of_slides_is_no_teacher_of_joined_bags(more):
    words = ["train", "--manifest", "cohort.csv", "--aggregator", "abmil", "--distill", "frozen", *more]
    settings, _ = settings_from(build_parser("train").parse_args(words))
    with pytest.raises(ValueError, match=rf"--distill must be given with bags of one slide .* got {more[0]}"):
        require_teachable(settings)
