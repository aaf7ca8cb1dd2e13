import argparse
import json
from dataclasses import replace

import pytest

from ds_wsi.bags.datasets import DATASETS
from ds_wsi.cli import main
from ds_wsi.training.dataset_options import WAYS, add_protocol_options, reading_names
from ds_wsi.training.options import add_train_options
from ds_wsi.training.presets import DEFAULTS, PRESETS, describe, presets_of
from ds_wsi.training.protocol import protocol_from
from ds_wsi.training.setting_list import options_of
from ds_wsi.training.settings import TrainSettings

SPLITTING = (*WAYS, "split_level", "keep_listed", "validation_fraction", "split_seed")


def parse(dataset, *arguments):
    parser = argparse.ArgumentParser()
    add_protocol_options(parser, dataset)
    add_train_options(parser, without=("split_seed", *options_of("task")))
    given = ["--data_dir", "data", *(str(argument) for argument in arguments)]
    return protocol_from(parser.parse_args(given), dataset)


def value_at(settings, place):
    for name in place.split("."):
        settings = getattr(settings, name)
    return settings


def write_json(tmp_path, config):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_sets_what_it_says(name):
    preset = PRESETS[name]
    protocol, settings, config, _ = parse(preset.dataset, "--preset", name)
    assert config is None
    assert {field_path: value_at(settings, field_path) for field_path in preset.settings} == dict(preset.settings)
    assert set(preset.protocol) <= {*reading_names(preset.dataset), *SPLITTING, "seeds"}
    assert len(protocol.seeds) == preset.protocol["seeds"]
    assert preset.source
    assert preset.evaluation


def test_every_dataset_has_a_default_and_the_list_shows_all():
    assert set(DEFAULTS) == set(DATASETS)
    text = "\n".join(describe(presets_of(dataset)) for dataset in DATASETS)
    for name, preset in PRESETS.items():
        assert f"\n{name}\n" in f"\n{text}", name
        assert preset.source in text


def test_the_list_is_printed_without_a_cohort(capsys):
    assert main(["protocol", "panda", "--list_presets"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("panda_cosine\n")
    assert "optim.num_train_epochs = 45" in printed
    assert main(["protocol", "panda"]) == 2
    assert "--data_dir must be given" in capsys.readouterr().err


# Big-Layers, sections 4.2.4 and 4.2.5: epochs, learning rate, slides, accumulation, tiles, schedule, frozen, DEMON.
PAPER = {
    "panda_cosine": (20, 1e-4, 2, 16, 256, "cosine", False, 0.0),
    "panda_frozen": (20, 1e-4, 2, 16, 256, "cosine", True, 0.0),
    "panda_exponential": (45, 5e-5, 2, 1, 256, "exponential", False, 0.0),
    "camelyon17": (90, 5e-5, 2, 2, 512, "cosine", False, 0.9),
    "camelyon17_frozen": (120, 1e-4, 2, 2, 1024, "cosine", True, 0.0),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_values(name):
    protocol, settings, *_ = parse(PRESETS[name].dataset, "--preset", name)
    optim, reading, tiling = settings.optim, settings.policies.reading, settings.policies.tiling
    values = (
        *(optim.num_train_epochs, optim.learning_rate, optim.per_device_train_batch_size),
        *(optim.gradient_accumulation_steps, reading.tiles_per_slide, optim.lr_scheduler_type),
        *(settings.model.freeze_encoder, optim.demon),
    )
    assert values == PAPER[name]
    # On any number of processes the paper's step.
    assert settings.policies.stacking.bags_per_step == PAPER[name][2] * PAPER[name][3]
    assert (optim.optim, optim.weight_decay, optim.warmup_steps) == ("adam", 1e-4, 0)
    assert (tiling.tile_size_px, tiling.mpp, settings.model.encoder) == (256, 0.5, "resnet18")
    panda = name.startswith("panda")
    assert settings.run.metric_for_best_model == ("quadratic_weighted_kappa" if panda else "accuracy")
    assert tiling.tissue == ("grey" if panda else "otsu")
    assert tiling.grey_range == ((3, 230) if panda else (0, 255))
    assert tiling.min_tissue_fraction == 0.6
    assert settings.model.encoder_features == "flattened"  # section 4.2.3, of all models
    assert protocol.seeds == (0, 1, 2)


def test_the_command_line_overrides_the_json_and_the_json_the_preset(tmp_path, caplog):
    section = {"tiling": {"mpp": 1.0}, "reading": {"tiles_per_slide": 64}}
    fixed = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": "auto"}}, "gradient_clipping": 1.0}
    path = write_json(tmp_path, {**fixed, "ds_wsi": section})
    given = ("--deepspeed", path, "--tiles_per_slide", 32, "--num_train_epochs", 3)
    with caplog.at_level("WARNING", "ds_wsi"):
        _, settings, config, preset = parse("panda", *given)
    assert config["optimizer"]["type"] == "AdamW"
    assert preset.settings["optim.num_train_epochs"] == 20
    assert settings.optim.num_train_epochs == 3
    assert settings.policies.reading.tiles_per_slide == 32
    assert settings.policies.tiling.mpp == 1.0
    assert settings.policies.tiling.tissue == "grey"  # the preset's, beside the JSON's other value
    assert (settings.optim.optim, settings.optim.learning_rate, settings.optim.max_grad_norm) == ("adamw", 3e-4, 1.0)
    assert settings.optim.weight_decay == 1e-4
    assert "optim.optim is adamw as the DeepSpeed JSON has it, the preset has adam" in caplog.text
    assert parse("panda", *given, "--learning_rate", 2)[1].optim.learning_rate == 2


@pytest.mark.parametrize("given", [("--per_device_train_batch_size", 4), ("--gradient_accumulation_steps", 2)])
def test_a_batch_that_is_given_replaces_the_presets_slides_a_step(given):
    assert parse("panda")[1].policies.stacking.bags_per_step == 32
    assert parse("panda", *given)[1].policies.stacking.bags_per_step is None
    with pytest.raises(ValueError, match=r"--bags_per_step must not be given with"):
        parse("panda", *given, "--bags_per_step", 6)


def test_a_batch_in_the_json_replaces_the_presets_slides_a_step_and_gives_way_to_the_command_lines(tmp_path):
    given = ("--deepspeed", write_json(tmp_path, {"gradient_accumulation_steps": 2}))
    assert parse("panda", *given)[1].policies.stacking.bags_per_step is None
    assert parse("panda", *given, "--bags_per_step", 6)[1].policies.stacking.bags_per_step == 6


def test_what_a_preset_switches_on_can_be_switched_off():
    def egfr(*given):
        return parse("custom", "--preset", "egfr", *given)[1].optim.mixed_precision

    assert (egfr(), egfr("--bf16"), egfr("--no_fp16")) == ("fp16", "bf16", "no")
    assert not parse("panda", "--preset", "panda_frozen", "--no_freeze_encoder")[1].model.freeze_encoder


def test_an_encoder_has_weights_where_any_option_brings_them():
    given = {"--encoder_weights": "x", "--encoder": "hf-hub:paige-ai/Virchow2"}
    assert all(parse("panda", *pair)[1].model.has_weights for pair in given.items())
    assert parse("panda", "--pretrained")[1].model.has_weights
    assert not parse("panda")[1].model.has_weights


def test_a_way_of_splitting_that_is_given_replaces_the_presets():
    assert parse("panda")[0].splitting == {"runs": 1}
    assert parse("panda", "--split_file", "x")[0].splitting == {"split": "x"}
    both = parse("custom", "--preset", "egfr", "--folds", 5, "--split_level", "slide", "--split_seed", 3)[0]
    assert both.splitting == {"folds": 5, "level": "slide", "seed": 3}
    assert parse("custom", "--preset", "egfr")[0].splitting == {"runs": 20}
    assert parse("custom", "--preset", "egfr", "--split_column", "part")[0].splitting == {}
    assert parse("camelyon17", "--target", "stage")[0].reading == {"target": "stage"}


def test_a_split_with_validation_of_its_own_replaces_the_presets_fraction():
    assert parse("camelyon17")[0].splitting["validation_fraction"] == 0.1
    for given in (("--split_file", "s"), ("--monte_carlo_runs", 2)):
        assert "validation_fraction" not in parse("camelyon17", *given)[0].splitting
    assert parse("tcga", "--folds", 3)[0].splitting["validation_fraction"] == 0.1
    with pytest.raises(ValueError, match=r"--seeds must be at least 1, got -1"):
        parse("panda", "--seeds", -1)


def test_seeds_go_on_from_the_first():
    assert parse("panda", "--seed", 5, "--seeds", 2)[0].seeds == (5, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", 0), r"--seeds must be at least 1, got 0"),
        (("--manifest", "x.csv"), r"--manifest must not be given here"),
        (("--resume_from_checkpoint", "x"), r"must be without a path here"),
        (("--features_dir", "x"), r"--features_dir must not be given here, where the slides"),
    ],
)
def test_what_has_no_place_in_a_protocol_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse("panda", *arguments)


def test_another_datasets_preset_is_refused():
    options = argparse.Namespace(preset="camelyon17", data_dir="x")
    with pytest.raises(ValueError, match=r"--preset must be one of panda_cosine, .*, got 'camelyon17'. HINT"):
        protocol_from(options, "panda")


def test_without_a_preset_nothing_has_changed():
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    from ds_wsi.training.options import settings_from

    settings, _ = settings_from(parser.parse_args(["--manifest", "m.csv"]))
    assert settings == replace(TrainSettings(), data=replace(TrainSettings().data, manifest="m.csv"))
