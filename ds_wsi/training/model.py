"""The run's model: built, with its weights, and what is not trained of it frozen."""

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from ds_wsi.engines.accelerator.engine import Accelerator
from ds_wsi.models import (
    ModelConfig,
    SlideModel,
    add_lora,
    build_model,
    freeze,
    freeze_until,
    resolve_encoder,
)
from ds_wsi.models.known_encoders import EncoderSource
from ds_wsi.models.own import source_files
from ds_wsi.models.weights import require_weights_file
from ds_wsi.runtime.log import logger
from ds_wsi.training.settings import TrainSettings


def check_encoder(settings: TrainSettings, accelerator: Accelerator) -> None:
    """Refuse an encoder, or a file of its weights, that cannot be had: before slides are tiled, which can take hours.

    Raises:
        ValueError: no encoder of this name, or no such file.
    """
    model = settings.model
    if settings.data.features_dir is not None:
        return
    with accelerator.main_process_first() if ":" in model.encoder else nullcontext():
        source = resolve_encoder(model.encoder, dict(model.encoder_options))
    source.weights_name(model.pretrained, model.encoder_weights)  # refuses weights of timm's for own code
    if model.encoder_weights is not None:
        require_weights_file(model.encoder_weights)


def build_slide_model(
    settings: TrainSettings, accelerator: Accelerator, classes: tuple[str, ...], in_dim: int | None, task: Any = None
) -> tuple[ModelConfig, SlideModel]:
    """The model, what is not trained of it frozen, and its description: of the plain one where it has adapters.

    Args:
        settings: the run's.
        accelerator: the run's.
        classes: names, in the order of the logits.
        in_dim: width of the features that it is trained on; None builds the encoder too.
        task: the task's part of config.json; empty or None: classification.

    Raises:
        ValueError: weights that cannot be had or do not fit, or a part of the encoder that it does not have.
    """
    chosen, tiling = settings.model, settings.tilings[0]
    of_the_aggregator: dict[str, Any] = {
        "dropout": chosen.dropout,
        "aggregator_options": dict(chosen.aggregator_options),
        "task": task or {},
        **_of_bags(settings),
    }
    if in_dim is not None:
        config = ModelConfig(None, chosen.aggregator, classes, {}, in_dim=in_dim, **of_the_aggregator)
        _tell_own_code(config)
        torch.manual_seed(settings.run.seed)
        return config, build_model(config, allow_code=config.own_code.values())
    elsewhere = chosen.pretrained or ":" in chosen.encoder
    # The main process downloads, the others then find the files.
    with accelerator.main_process_first() if elsewhere else nullcontext():
        source = resolve_encoder(chosen.encoder, dict(chosen.encoder_options))
        config = ModelConfig.of_source(
            *(source, chosen.aggregator, classes, asdict(tiling)),
            features=chosen.encoder_features,
            **of_the_aggregator,
        )
        torch.manual_seed(settings.run.seed)  # the same initial weights on every rank
        named = source.weights_name(chosen.pretrained, chosen.encoder_weights)
        module = build_model(config, chosen.encoder_weights, named, allow_code=config.own_code.values())
    _tell_own_code(config)
    _warn_of_the_encoder(settings, source)
    logger.info(
        "encoder: %s, %d features per tile (%s), normalised with mean %s, std %s",
        *(source.name, module.encoder.num_features, config.encoder_features, source.mean, source.std),
    )
    if chosen.encoder_weights is None and source.licence_words:
        logger.info("%s: %s", source.name, source.licence_words)
    if chosen.freeze_encoder:
        freeze(module.encoder)
    if chosen.freeze_until is not None:
        freeze_until(module.encoder, chosen.freeze_until)
    if chosen.lora_rank:
        add_lora(module.encoder, chosen.lora_rank, chosen.lora_alpha, chosen.lora_targets, tiling.tile_size_px)
    return config, module.train()


def _warn_of_the_encoder(settings: TrainSettings, source: EncoderSource) -> None:
    """Say that the encoder starts from nothing, or is made for other tiles."""
    chosen = settings.model
    if not chosen.has_weights and not source.is_own:
        logger.warning(
            "--encoder_weights is not given: %s starts from RANDOM weights (seed %d)%s. HINT: --encoder_weights FILE, "
            "or --pretrained.",
            *(source.name, settings.run.seed),
            ", which stay as they are (--freeze_encoder)" if chosen.freeze_encoder else "",
        )
    for each in settings.tilings:
        source.warn_of_other_tiles(each.tile_size_px, each.mpp)


def _of_bags(settings: TrainSettings) -> dict[str, Any]:
    """What config.json says of what a bag holds."""
    data = settings.data
    return {"bag": data.bag, "mpps": data.mpps, "scale_embedding": settings.model.scale_embedding}


def _tell_own_code(config: ModelConfig) -> None:
    """Say from which files the code comes that the command line names."""
    for name, file in source_files(config.own_code).items():
        logger.info("own code: %s, of %s", name, file)
