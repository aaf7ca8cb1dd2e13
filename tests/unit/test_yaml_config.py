"""Settings as YAML: what is written is read back, and each of preset, YAML, JSON and command line has its place."""

import argparse
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as of_hypothesis
from hypothesis import strategies as st

from ds_wsi.cli import main
from ds_wsi.training.options import add_train_options, settings_from
from ds_wsi.training.presets import PRESETS
from ds_wsi.training.setting_list import OPTIONS
from ds_wsi.training.yaml_config import NOT_WRITTEN, read_yaml, write_yaml, yaml_text


def settings_of(*arguments, preset=None):
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    return settings_from(parser.parse_args([str(argument) for argument in arguments]), preset)[0]


CHANGES = {
    "--manifest": "m.csv",
    "--classes": "normal,tumor",
    "--encoder": "hf-hub:ORG/NAME",
    "--aggregator_options": "hidden_dim=64",
    "--class_weights": "1,2.5",
    "--eval_tiles": "256",
    "--gpu_budget": "3GiB",
    "--tiles_per_slide": "512",
    "--learning_rate": "1e-5",
    "--demon": "0.8",
    "--tf32": "no",
    "--comm_hook": "dmgc",
    "--lora_rank": "2",
    "--bags_per_step": "8",
    "--seed": "3",
    "--bf16": None,
    "--no_augment_flips": None,
    "--skip_bad_slides": None,
}


@given(names=st.sets(st.sampled_from(sorted(CHANGES))))
@of_hypothesis(max_examples=40, deadline=None)
def test_what_is_written_is_read_back(names, tmp_path_factory):
    arguments = [word for name in names for word in (name, CHANGES[name]) if word is not None]
    settings = settings_of(*arguments)
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    write_yaml(settings, path)
    assert settings_of("--config", path) == settings


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_read_back(name, tmp_path):
    settings = settings_of("--manifest", "m.csv", preset=PRESETS[name].settings)
    write_yaml(settings, tmp_path / "run.yaml")
    assert settings_of("--config", tmp_path / "run.yaml") == settings


def test_what_has_no_option_is_written_below_the_section(tmp_path):
    section = {"stacking": {"balance": "round_robin"}, "tile_parallel": {"size": 2, "shares": [1.0, 2.0]}}
    (tmp_path / "ds.json").write_text(json.dumps({"ds_wsi": section}))
    settings = settings_of("--deepspeed", tmp_path / "ds.json")
    text = yaml_text(settings)
    assert yaml.safe_load(text)["ds_wsi"] == {
        "stacking": {"balance": "round_robin"},
        "tile_parallel": {"shares": [1.0, 2.0]},
    }
    (tmp_path / "run.yaml").write_text("".join(line for line in text.splitlines(True) if "deepspeed" not in line))
    assert settings_of("--config", tmp_path / "run.yaml").policies == settings.policies


def test_a_preset_gives_way_to_the_yaml_that_to_the_json_and_that_to_the_command_line(tmp_path, caplog):
    values = {"learning_rate": 2e-3, "mpp": 0.25, "tile_size_px": 96, "gradient_accumulation_steps": 3, "seed": 5}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "deepspeed": str(tmp_path / "ds.json")}))
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-3}}, "ds_wsi": {"tiling": {"tile_size_px": 128}}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    preset = {"optim.learning_rate": 1e-3, "optim.warmup_steps": 7, "policies.stacking.bags_per_step": 32}
    settings = settings_of("--config", tmp_path / "run.yaml", "--seed", 6, preset=preset)
    assert settings.optim.warmup_steps == 7, "of the preset"
    assert settings.policies.stacking.bags_per_step is None, "the YAML has a size of its own"
    assert (settings.policies.tiling.mpp, settings.optim.gradient_accumulation_steps) == (0.25, 3), "of the YAML"
    assert (settings.policies.tiling.tile_size_px, settings.optim.learning_rate) == (128, 3e-3), "of the JSON"
    assert settings.run.seed == 6, "of the command line"
    assert "the YAML or the preset has 0.002" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "lerning_rate: 1",
            r"lerning_rate must be an option of training, or ds_wsi. HINT: did you mean learning_rate\?",
        ),
        ("seed: x", r"seed must be what --seed takes, got 'x'"),
        ("seed: true", r"seed must be what --seed takes, got True"),
        ("bf16: 1", r"bf16 must be true or false, got 1"),
        ("aggregator: nothing", r"aggregator must be one of abmil, .*, got 'nothing'"),
        ("gpu_budget: 3XB", r"gpu_budget must be what --gpu_budget takes, got '3XB'"),
        ("- 1", r"--config must hold options and their values, got list"),
        ("a: [", r"--config must be a YAML file"),
        ("ds_wsi: 3", r"ds_wsi must hold policies and their keys, got 3"),
        ("ds_wsi: {stacking: {balanse: lpt}}", r"ds_wsi.stacking.balanse must be one of"),
    ],
)
def test_a_fault_is_named_with_its_file_key_and_value(text, words, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        settings_of("--config", tmp_path / "run.yaml")


def test_no_and_yes_are_words_where_an_option_takes_them(tmp_path):
    (tmp_path / "run.yaml").write_text("tf32: yes\neval_precision: no\neval-tiles: all\nlearning_rate: 1e-4\n")
    settings = settings_of("--config", tmp_path / "run.yaml").run
    assert (settings.tf32, settings.eval_precision, settings.eval_tiles) == ("yes", "no", None)
    assert read_yaml(tmp_path / "run.yaml")["optim.learning_rate"] == 1e-4


def test_the_command_writes_a_file_with_every_option_and_overwrites_none(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    assert main(["train", "--seed", "4", "--write_config", str(path)]) == 0
    assert "--config" in capsys.readouterr().out
    text = path.read_text()
    assert all(f"{name}:" in text for name in OPTIONS if name not in NOT_WRITTEN)
    assert NOT_WRITTEN == ("resume_from_checkpoint", "recipe", "allow_code")
    assert yaml.safe_load(text) == {"encoder": "resnet10t", "num_train_epochs": 4, "seed": 4, "tile_size_px": 64}
    assert main(["train", "--write_config", str(path)]) == 2
    assert path.read_text() == text
    assert "--write_config must be a new file" in capsys.readouterr().err
    demo = {"model.encoder": "resnet10t", "optim.num_train_epochs": 4, "policies.tiling.tile_size_px": 64}
    assert read_yaml(path) == {"run.seed": 4, **demo}
