"""Numbers that no run can mean: refused by name when they are given, not by a library, and not never."""

import dataclasses
import json

import pytest
from tiny_runs import write_cohort

from ds_wsi.bags.policy import AugmentPolicy, ReadPolicy
from ds_wsi.cli import main
from ds_wsi.config import read_section
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.runtime import log
from ds_wsi.runtime.units import parse_bytes
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.training.settings import DataSettings, OptimSettings, RunSettings

HUGE = 99_999_999_999_999_999_999
REFUSED = [
    (OptimSettings, "gradient_accumulation_steps", HUGE),
    (OptimSettings, "learning_rate", 1e300),
    (OptimSettings, "encoder_learning_rate", 1e300),
    (OptimSettings, "weight_decay", 1e300),
    (StackingPolicy, "virtual_workers", HUGE),
    (StackingPolicy, "sample_tiles", HUGE),
    *((StackingPolicy, "cost_per_tile", float(value)) for value in ("nan", "inf")),
    (ReadPolicy, "workers", 100_000),
    (AugmentPolicy, "blur", 1e300),
    (EvaluationProtocol, "runs", HUGE),
    (RunSettings, "ddp_timeout", HUGE),
    (RunSettings, "seed", 10**14),
    (RunSettings, "seed", -1),
    (TilingPolicy, "mpp", 1e308),
    (TilingPolicy, "mpp", 1e-300),
    (TilingPolicy, "overview_mpp", 1e-3),
    *((DataSettings, "slide_mpp", float(value)) for value in ("nan", "inf", "-1", "0", "1e-300", "1e300")),
]


@pytest.mark.parametrize(("policy", "name", "value"), REFUSED, ids=lambda one: getattr(one, "__name__", str(one)))
def test_a_number_that_no_run_can_mean_is_refused_by_name(policy, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*got {str(value).split('e')[0].removesuffix('.0')}"):
        dataclasses.replace(policy(), **{name: value})


@pytest.mark.parametrize("words", [("gradient_accumulation_steps", HUGE), ("seed", 10**20), ("slide_mpp", "nan")])
def test_a_run_of_such_a_number_ends_at_once(tmp_path, words, capsys):
    folder, (name, value) = write_cohort(tmp_path), words
    given = ["--features_dir", folder / "features", "--manifest", folder / "m.csv", "--aggregator", "abmil"]
    line = ["train", *map(str, given), "--dry_run", f"--{name}", str(value), "--output_dir", str(tmp_path / "run")]
    try:
        status = main(line)
    except SystemExit as left:
        status = left.code
    assert status == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["--workers -5", "--workers 0", "--jpeg_quality 101", "--jpeg_quality x", "--slide_mpp nan", "--slide_mpp x"],
)
def test_tiling_begins_with_no_such_number(words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tile", "--manifest", "none.csv", "--output_dir", str(tmp_path / "t"), *words.split()])
    assert f"{words.split()[0]}" in (told := capsys.readouterr().err)
    assert "must be" in told
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("words", ["--seed -1", f"--seed {HUGE}", "--n_resamples 0", f"--n_resamples {HUGE}"])
def test_a_comparison_draws_with_no_such_number(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "a", "b", "--output_dir", "c", *words.split()])
    assert "must be a whole number from" in capsys.readouterr().err


def test_a_size_of_more_digits_than_a_float_has_is_refused(capsys):
    with pytest.raises(ValueError, match=r"gpu must be from 1 byte to .*got '9{40}\.\.\.'"):
        parse_bytes("9" * 400 + "GiB", "gpu")
    with pytest.raises(ValueError, match="from 1 byte"):
        parse_bytes("0")
    assert parse_bytes("1024 TiB") == 2**50
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--gpu_budget", "9" * 400 + "GiB"])
    assert "--gpu_budget" in capsys.readouterr().err


def test_the_json_is_held_to_the_same(tmp_path):
    section = json.loads(f'{{"stacking": {{"virtual_workers": {HUGE}}}}}')
    with pytest.raises(ValueError, match=r"ds_wsi\.stacking: virtual_workers must be at most"):
        read_section(section)


def test_a_rank_that_is_no_number_is_named_by_those_who_need_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(SystemExit, match="0"):
        main(["tile", "--help"])
    (tmp_path / "m.csv").write_text("slide_id,path\n")
    assert main(["tile", "--manifest", str(tmp_path / "m.csv"), "--output_dir", str(tmp_path / "t")]) == 2
    assert "RANK must be a number" in capsys.readouterr().err
    assert main(["train", "--write_config", str(tmp_path / "run.yaml")]) == 2
    assert "RANK must be a number, got 'x'. HINT: unset it" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "expected"), [(" 0", 0), ("-1", -1), ("", 0)])
def test_a_rank_is_what_is_a_number(monkeypatch, text, expected):
    monkeypatch.setenv("RANK", text)
    assert log.rank() == expected


def test_a_seed_of_a_run_of_before_is_taken():
    """A time in milliseconds, which earlier versions trained with: a resumed run must have the seed of its start."""
    assert dataclasses.replace(RunSettings(), seed=1_764_500_000_000).seed
