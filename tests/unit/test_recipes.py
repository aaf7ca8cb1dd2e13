"""A recipe sets what is not given, and says so."""

import argparse

import pytest
from logs import logged

from ds_wsi.training.options import add_train_options, settings_from
from ds_wsi.training.recipes import recipe_settings


def settings_of(*words):
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    return settings_from(parser.parse_args([*words, "--recipe", "finetune"]))[0]


def test_what_is_given_stays_and_the_rest_is_told():
    with logged("INFO") as records:
        settings = settings_of("--encoder", "hf-hub:bioptimus/H0-mini", "--weight_decay", "0.1", "--ema_decay", "0")
    optim, model = settings.optim, settings.model
    assert (optim.weight_decay, optim.ema_decay) == (0.1, 0.0)
    assert (optim.learning_rate, optim.encoder_learning_rate, optim.layer_decay) == (1e-4, 5e-5, 0.65)
    assert (optim.max_grad_norm, optim.no_decay_1d, optim.lr_scheduler_type) == (1.0, True, "cosine")
    assert (model.freeze_encoder_epochs, model.lora_rank) == (1, 0)
    assert optim.warmup_of(200) == 10
    (told,) = [line for line in records if line.startswith("recipe finetune sets")]
    assert "--encoder_learning_rate 5e-05" in told
    assert "weight_decay" not in told


def test_a_large_encoder_learns_by_adapters_unless_it_is_said_otherwise():
    large = settings_of("--encoder", "hf:owkin/phikon-v2").model
    assert (large.lora_rank, large.lora_alpha, large.lora_targets) == (16, 32.0, ("all",))
    whole = settings_of("--encoder", "hf:owkin/phikon-v2", "--lora_rank", "0", "--warmup_steps", "3")
    assert whole.model.lora_rank == 0
    assert whole.optim.encoder_learning_rate == 1e-5
    assert (whole.optim.warmup_of(1000), whole.optim.layer_decay) == (3, 0.75)
    giant = recipe_settings({"optim.recipe": "finetune", "model.encoder": "hf:kaiko-ai/midnight"})
    assert giant["optim.encoder_learning_rate"] == 1e-6
    assert settings_of("--encoder", "hf:owkin/phikon-v2", "--freeze_until", "blocks.20").model.lora_rank == 0


@pytest.mark.parametrize("given", [("--freeze_encoder",), ("--features_dir", "features")])
def test_without_an_encoder_to_tune_it_is_refused(given):
    with pytest.raises(ValueError, match=f"must be given with an encoder that is trained, got {given[0]}"):
        settings_of(*given)
