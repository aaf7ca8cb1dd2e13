"""A run in words, for its screen and its report."""

from ds_wsi.training.context import RunContext
from ds_wsi.training.features import encoder_of_features
from ds_wsi.training.settings import TrainSettings


def model_words(run: RunContext) -> str:
    """Encoder, aggregator, and what of them is trained."""
    if run.config.in_dim is not None:
        encoder = encoder_of_features(run.cohort)
        whose = "" if encoder is None else f"{encoder.split()[0]}, "
        return f"{run.config.aggregator} on features of {whose}width {run.config.in_dim}"
    told = run.settings.model.has_weights or "encoder" in run.config.own_code  # own code's start is its own
    random = "" if told else " (from RANDOM weights)"
    return f"{run.settings.model.encoder}{random} + {run.config.aggregator}, {_training_words(run.settings)}"


def _training_words(settings: TrainSettings) -> str:
    model = settings.model
    if model.freeze_encoder:
        return "encoder frozen"
    words = "trained end to end"
    if model.freeze_until is not None:
        words = f"trained from {model.freeze_until} on"
    if model.lora_rank:
        words = f"trained with LoRA of rank {model.lora_rank} in {', '.join(model.lora_targets)}"
    return words + (f" after {model.freeze_encoder_epochs} frozen epochs" if model.freeze_encoder_epochs else "")


def tiles_words(run: RunContext) -> str:
    """Size, resolution and number of the tiles."""
    total = sum(run.cohort.lengths)
    if run.config.in_dim is not None:
        several = f" at {_resolutions(run)}" if run.config.mpps else ""
        return f"features from {run.settings.data.features_dir}{several}, {total} in all"
    return f"{run.config.tile_size_px} px at {_resolutions(run)}, {total} in all"


def _resolutions(run: RunContext) -> str:
    mpps = run.config.mpps or (run.config.tiling["mpp"],)
    return f"{' and '.join(map(str, mpps))} um/px"
