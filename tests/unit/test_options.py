import argparse
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_wsi.runtime.setting import names, numbers, ratio, size_in_bytes, size_or_none, tiles_or_all
from ds_wsi.slides.policy import parse_slide_mpp
from ds_wsi.training.optim import learning_rate_at
from ds_wsi.training.options import add_train_options, settings_from
from ds_wsi.training.setting_list import OPTIONS
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.settings.optim import SCHEDULES


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    return settings_from(parser.parse_args([str(argument) for argument in arguments]))


def settings_of(*arguments):
    return parse(*arguments)[0]


def write_config(tmp_path, section, **more):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **more, "ds_wsi": section}))
    return path


def value_at(settings, place):
    for name in place.split("."):
        settings = getattr(settings, name)
    return settings


def test_without_options_all_is_default_but_the_demos_tiles_and_model():
    settings, config = parse()
    assert config is None
    assert settings.policies.tiling.tile_size_px == 64
    assert (settings.model.encoder, settings.optim.num_train_epochs) == ("resnet10t", 4)
    default = TrainSettings()
    default = replace(default, model=replace(default.model, encoder="resnet10t"))
    default = replace(default, optim=replace(default.optim, num_train_epochs=4))
    assert (settings.data, settings.model, settings.optim, settings.run) == (
        default.data,
        default.model,
        default.optim,
        default.run,
    )


@pytest.mark.parametrize(
    ("options", "encoder", "epochs"),
    [
        (("--num_train_epochs", "3"), "resnet10t", 3),
        (("--aggregator", "transmil"), "resnet10t", 4),
        (("--encoder", "resnet18"), "resnet18", 8),
        (("--encoder_weights", "file.safetensors"), "resnet18", 8),
        (("--demo", "stains"), "resnet18", 8),
        (("--manifest", "table.csv"), "resnet18", 8),
        (("--features_dir", "features"), "resnet18", 8),
    ],
)
def test_the_demos_model_is_for_who_says_nothing_of_encoder_or_slides(options, encoder, epochs):
    settings, _ = parse(*options)
    assert (settings.model.encoder, settings.optim.num_train_epochs) == (encoder, epochs)


EXAMPLES = {
    size_in_bytes: ("2GiB", 2**31),
    size_or_none: ("3GiB", 3 * 2**30),
    tiles_or_all: ("256", 256),
    int: ("3", 3),
    float: ("0.25", 0.25),
    parse_slide_mpp: ("0.25", 0.25),
    str: ("x", "x"),
    names: ("x, y", ("x", "y")),
    numbers: ("0.5,2.0", (0.5, 2.0)),
    ratio: ("4:1", (4, 1)),
    "flag": (None, True),
    "switch": (None, True),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dashes", [False, True])
def test_every_option_sets_its_field_with_underscores_or_dashes(name, dashes, tmp_path):
    field_path, declared, _, _ = OPTIONS[name]
    kind = declared.kind
    if name == "classes":
        given, expected = "b, a,", ("b", "a")
    elif name == "class_weights":
        given, expected = "1, 2.5", (1.0, 2.5)
    elif name == "lora_targets":
        given, expected = "fc1, qkv", ("fc1", "qkv")
    elif name in ("aggregator_options", "encoder_options"):
        given, expected = "hidden_dim=64", (("hidden_dim", 64),)
    elif name == "allow_code":
        given, expected = "mine, other.models", ("mine", "other.models")
    elif name == "metric_for_best_model":
        given = expected = "tumour.auc"
    elif name == "deepspeed":
        given = expected = str(write_config(tmp_path, {}))
    elif isinstance(kind, tuple):
        given = expected = kind[-1]
    else:
        given, expected = EXAMPLES[kind]
    option = f"--{name.replace('_', '-') if dashes else name}"
    needed = {
        "nvme_budget": ["--nvme_path", "/"],
        "eval_runs": ["--eval_tiles", "9"],
        "validation_device": ["--validate_beside"],
        "momentum": ["--optim", "sgd"],
    }.get(name, [])
    settings = settings_of(option, *([] if given is None else [given]), *needed)
    assert value_at(settings, field_path) == expected


def test_the_command_line_overrides_the_json_and_the_json_the_defaults(tmp_path):
    section = {"tiling": {"tile_size_px": 96, "mpp": 1}, "reading": {"workers": 2}, "augment": {"colour": 0.3}}
    path = write_config(tmp_path, section, optimizer={"type": "AdamW"})
    settings, config = parse("--deepspeed", path, "--mpp", 0.25, "--dataloader-num-workers", 5)
    assert config["optimizer"] == {"type": "AdamW"}
    policies = settings.policies
    assert (policies.tiling.tile_size_px, policies.tiling.mpp) == (96, 0.25)
    assert policies.tiling.min_tissue_fraction == 0.6
    assert policies.reading.workers == 5
    assert policies.augment.colour == 0.3


@pytest.mark.parametrize("option", ["--no_augment_flips", "--no-augment-flips"])
def test_what_is_on_is_switched_off(option, tmp_path):
    assert settings_of().policies.augment.flips
    assert not settings_of(option).policies.augment.flips
    path = write_config(tmp_path, {"augment": {"flips": False}})
    assert not settings_of("--deepspeed", path).policies.augment.flips
    assert settings_of("--deepspeed", path, "--augment_flips").policies.augment.flips


def test_a_json_without_a_section_changes_nothing(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text("{}")
    settings, config = parse("--deepspeed", path)
    assert config == {}
    assert settings.policies == settings_of().policies


@pytest.mark.parametrize(
    ("section", "arguments", "expected"),
    [
        ({}, (), 64),
        ({}, ("--manifest", "m.csv"), 256),
        ({}, ("--tile_size_px", 32), 32),
        ({}, ("--manifest", "m.csv", "--tile_size_px", 32), 32),
        ({"tiling": {"tile_size_px": 256}}, (), 256),
        ({"tiling": {"mpp": 1.0}}, (), 64),
        ({"tiling": {"tile_size_px": 128}}, ("--manifest", "m.csv"), 128),
    ],
)
def test_the_demos_tile_size_is_the_default_without_a_manifest_only(tmp_path, section, arguments, expected):
    settings = settings_of("--deepspeed", write_config(tmp_path, section), *arguments)
    assert settings.policies.tiling.tile_size_px == expected


@pytest.mark.parametrize("option", ["--resume_from_checkpoint", "--resume-from-checkpoint"])
def test_resume_with_and_without_a_path(option):
    assert settings_of().run.resume_from_checkpoint is None
    assert settings_of(option).run.resume_from_checkpoint == "latest"
    assert settings_of(option, "--seed", 1).run.resume_from_checkpoint == "latest"
    assert settings_of(option, "runs/a/checkpoint-3").run.resume_from_checkpoint == "runs/a/checkpoint-3"


def test_demon_with_and_without_a_beta():
    assert settings_of().optim.demon == 0
    assert settings_of("--demon").optim.demon == 0.9
    assert settings_of("--demon", 0.95, "--seed", 1).optim.demon == 0.95


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
def test_deepspeeds_local_rank_is_accepted_and_ignored(option):
    assert settings_of(option) == settings_of()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tile_size_px", 0), "tile_size_px must be at least 1, got 0"),
        (("--mpp", 0), "mpp must be positive"),
        (("--mpp", "nan"), "mpp must be positive"),
        (("--min_tissue_fraction", 2), "min_tissue_fraction must be in"),
        (("--max_failed_fraction", -1), "max_failed_fraction must be in"),
        (("--dataloader_num_workers", -1), "workers must be at least 0"),
        (("--augment_colour", 1), "colour must be in"),
        (("--num_train_epochs", 0), "--num_train_epochs must be at least 1, got 0"),
        (("--per_device_train_batch_size", 0), "--per_device_train_batch_size must be at least 1"),
        (("--gradient_accumulation_steps", 0), "--gradient_accumulation_steps must be at least 1"),
        (("--learning_rate", 0), "--learning_rate must be positive"),
        (("--weight_decay", -1), "--weight_decay must be at least 0"),
        (("--max_grad_norm", "nan"), "--max_grad_norm must be at least 0, got nan"),
        (("--learning_rate", "inf"), "--learning_rate must be positive, got inf"),
        (("--max_grad_norm", -1), "--max_grad_norm must be at least 0"),
        (("--warmup_steps", -1), "--warmup_steps must be at least 0"),
        (("--save_total_limit", 1), "--save_total_limit must be at least 2, got 1.*HINT"),
        (("--demon", 1), r"--demon must be in \[0, 1\), got 1.0. HINT"),
        (("--ema_decay", -0.1), r"--ema_decay must be in \[0, 1\)"),
        (("--save_steps", -1), "--save_steps must be at least 0"),
        (("--early_stopping_patience", -1), "--early_stopping_patience must be at least 0, got -1. HINT"),
        (("--validation_device", "cpu"), "--validation_device must be given with --validate_beside, got cpu alone"),
        (("--bf16", "--fp16"), "--bf16 and --fp16"),
        (("--deepspeed", "none.json"), r"got none\.json \(missing\)"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        settings_of(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--aggregator", "meen"), "invalid choice: 'meen'"),
        (("--optim", "lion"), "invalid choice: 'lion'"),
        (("--lr_scheduler_type", "step"), "invalid choice: 'step'"),
        (("--metric_for_best_model", "dice"), "or TARGET.METRIC, got 'dice'"),
        (("--seed", "x"), "invalid int value: 'x'"),
        (("--class_weights", "1,x"), "must be numbers such as 1,2.5, got '1,x'"),
        (("--eval_tiles", "x"), "must be a number of tiles, or all, got 'x'"),
        (("--gpu_budget", "x"), "must be bytes such as 24GiB or 800MB, got 'x'"),
        (("--learning_rate", "fast"), "invalid float value: 'fast'"),
        (("--tile_sise", "3"), "unrecognized arguments: --tile_sise"),
        (("--manifest",), "expected one argument"),
    ],
)
def test_what_is_no_option_or_value_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        settings_of(*arguments)
    assert message in capsys.readouterr().err


def test_a_section_with_an_error_names_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"ds_wsi\.tiling\.tile_size must be one of"):
        settings_of("--deepspeed", write_config(tmp_path, {"tiling": {"tile_size": 3}}))
    with pytest.raises(ValueError, match="ds_wsi must be an object"):
        settings_of("--deepspeed", write_config(tmp_path, 3))


def test_help_tells_every_option_and_its_default():
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    text = " ".join(parser.format_help().split())
    assert all(f"--{name}" in text for name in OPTIONS)
    assert "(default: 0.0003)" in text
    assert "local_rank" not in text


@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(1, 500),
    warmup=st.integers(0, 500),
    peak=st.floats(1e-6, 1.0),
)
def test_the_learning_rate_rises_to_its_peak_and_never_after(schedule, total, warmup, peak):
    rates = [
        learning_rate_at(step, total_steps=total, peak=peak, schedule=schedule, warmup_steps=warmup)
        for step in range(total)
    ]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == pytest.approx(peak)


def test_known_learning_rates():
    def rate(step, schedule):
        return learning_rate_at(step, total_steps=12, peak=1.0, schedule=schedule, warmup_steps=4)

    assert [rate(step, "cosine") for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(8, "linear") == rate(8, "cosine") == pytest.approx(0.5)
    assert rate(6, "linear") == 0.75
    assert rate(6, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert rate(12, "linear") == rate(12, "cosine") == 0
    assert rate(11, "constant") == 1.0
    with pytest.raises(ValueError, match=r"--lr_scheduler_type must be one of cosine, .*, got 'step'"):
        rate(0, "step")


def test_options_of_an_aggregator_are_numbers_or_words_and_checked_before_anything_is_read():
    settings = settings_of("--aggregator", "dtfd", "--aggregator_options", "pseudo_bags=2, distillation=maxs")
    assert settings.model.aggregator_options == (("pseudo_bags", 2), ("distillation", "maxs"))
    settings = settings_of("--aggregator", "clam_sb", "--aggregator_options", "subtyping=true")
    assert settings.model.aggregator_options == (("subtyping", True),)
    for text, words in {
        "heads=4": r"options of gated_abmil must be of hidden_dim, dropout, embed, embed_dropout, got 'heads'",
        "hidden_dim=4,hidden_dim=8": r"must name an option once",
        "dropout=0.5": r"must not hold dropout\. HINT: --dropout",
    }.items():
        with pytest.raises(ValueError, match=words):
            settings_of("--aggregator_options", text)
    with pytest.raises(SystemExit):
        settings_of("--aggregator_options", "hidden_dim")


def test_options_without_effect_are_told(caplog):
    settings_of("--lora_alpha", 4, "--comm_keep", 0.1, "--sample_tiles", 9, "--augment_blur_probability", 0.1)
    told = [message for message in caplog.messages if "without effect" in message]
    assert {message.split(":")[0]: message.partition("for want of ")[2] for message in told} == {
        "--lora_alpha": "--lora_rank",
        "--sample_tiles": "--framework sampling",
        "--comm_keep": "--comm_hook topk, dmgc or auto",
        "--augment_blur_probability": "--augment_blur",
    }
    caplog.clear()
    settings_of("--lora_alpha", 4, "--lora_rank", 2, "--comm_keep", 0.1, "--comm_hook", "topk")
    assert not caplog.messages
    for option in ("--per_device_train_batch_size", "--gradient_accumulation_steps"):
        with pytest.raises(ValueError, match=r"--bags_per_step must not be given with"):
            settings_of("--bags_per_step", 8, option, 2)
