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
from ds_wsi.models.weights import require_weights_file
from ds_wsi.runtime.log import logger
from ds_wsi.training.settings import TrainSettings


def check_encoder(settings: TrainSettings, accelerator: Accelerator) -> None:
    """Refuse an encoder, or a file of its weights, that cannot be had: before slides are tiled, which can take hours.

    Raises:
        ValueError: no encoder of this name, or no such file.
    """
    wanted = settings.model
    if settings.data.features_dir is not None:
        return
    with accelerator.main_process_first() if ":" in wanted.encoder else nullcontext():
        resolve_encoder(wanted.encoder)
    if wanted.encoder_weights is not None:
        require_weights_file(wanted.encoder_weights)


def build_slide_model(
    settings: TrainSettings, accelerator: Accelerator, classes: tuple[str, ...], in_dim: int | None
) -> tuple[ModelConfig, SlideModel]:
    """The model, what is not trained of it frozen, and its description: of the plain one where it has adapters.

    Args:
        settings: of the run.
        accelerator: of the run.
        classes: names, in the order of the logits.
        in_dim: width of the features that it is trained on; None builds the encoder too.

    Raises:
        ValueError: weights that cannot be had or do not fit, or a part of the encoder that it does not have.
    """
    wanted, tiling = settings.model, settings.policies.tiling
    of_the_aggregator: dict[str, Any] = {
        "dropout": wanted.dropout,
        "aggregator_options": dict(wanted.aggregator_options),
    }
    if in_dim is not None:
        config = ModelConfig(None, wanted.aggregator, classes, {}, in_dim=in_dim, **of_the_aggregator)
        torch.manual_seed(settings.run.seed)
        return config, build_model(config)
    elsewhere = wanted.pretrained or ":" in wanted.encoder
    # The main process downloads, the others then find the files.
    with accelerator.main_process_first() if elsewhere else nullcontext():
        source = resolve_encoder(wanted.encoder)
        config = ModelConfig.of_source(
            source,
            wanted.aggregator,
            classes,
            asdict(tiling),
            features=wanted.encoder_features,
            **of_the_aggregator,
        )
        torch.manual_seed(settings.run.seed)  # the same initial weights on every rank
        named = source.weights_name(wanted.pretrained, wanted.encoder_weights)
        module = build_model(config, wanted.encoder_weights, named)
    if not wanted.has_weights:
        logger.warning(
            "--encoder_weights is not given: %s starts from RANDOM weights (seed %d)%s. HINT: --encoder_weights FILE, "
            "or --pretrained.",
            *(source.name, settings.run.seed),
            ", which stay as they are (--freeze_encoder)" if wanted.freeze_encoder else "",
        )
    source.warn_of_other_tiles(tiling.tile_size_px, tiling.mpp)
    logger.info(
        "encoder: %s, %d features a tile (%s), normalised with mean %s, std %s",
        *(source.name, module.encoder.num_features, config.encoder_features, source.mean, source.std),
    )
    if wanted.freeze_encoder:
        freeze(module.encoder)
    if wanted.freeze_until is not None:
        freeze_until(module.encoder, wanted.freeze_until)
    if wanted.lora_rank:
        add_lora(module.encoder, wanted.lora_rank, wanted.lora_alpha, wanted.lora_targets, tiling.tile_size_px)
    return config, module.train()
