"""Recipes: settings that go together, from the literature, below whatever is given.

Sources: rates and layer decay by size, Bao et al., "BEiT" (2022), and He et al., "Masked Autoencoders" (2022); the
aggregator alone at first, Kumar et al., "Fine-Tuning can Distort Pretrained Features" (2022); adapters, Hu et al.,
"LoRA" (2021). No one has compared them on whole slides.
"""

from collections.abc import Mapping
from typing import Any

from ds_wsi.runtime.log import logger

RECIPE = "optim.recipe"
HEAD_RATE = 1e-4
BASE, LARGE = 150e6, 500e6  # parameters below which an encoder is like ViT-B, and like ViT-L
ADAPTED_FROM = 300e6


def recipe_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe asked for sets: field -> value, for all fields that are not given. Empty without a recipe.

    Args:
        given: field -> value of the command line and the YAML.

    Raises:
        ValueError: there is no encoder to tune.
    """
    if given.get(RECIPE) is None:
        return {}
    for path, name in (("data.features_dir", "--features_dir"), ("model.freeze_encoder", "--freeze_encoder")):
        if given.get(path):
            raise ValueError(
                f"--recipe finetune must be given with an encoder that is trained, got {name}. HINT: leave out one of "
                "them."
            )
    size, layers_are_known = _encoder_of(given)
    rate = 5e-5 if size < BASE else 1e-5 if size < LARGE else 1e-6
    chosen: dict[str, Any] = {
        "model.freeze_encoder_epochs": 1,
        "optim.learning_rate": HEAD_RATE,
        "optim.encoder_learning_rate": rate,
        **({"optim.layer_decay": 0.65 if size < BASE else 0.75} if layers_are_known else {}),
        "optim.no_decay_1d": True,
        "optim.weight_decay": 0.05,
        "optim.max_grad_norm": 1.0,
        "optim.lr_scheduler_type": "cosine",
        "optim.warmup_ratio": 0.05,
        "optim.ema_decay": 0.999,
    }
    if "optim.warmup_steps" in given:
        del chosen["optim.warmup_ratio"]
    if size >= ADAPTED_FROM and not given.get("model.freeze_until") and not given.get("optim.l2_sp"):
        chosen |= {"model.lora_rank": 16, "model.lora_alpha": 32.0, "model.lora_targets": ("all",)}
    return {path: value for path, value in chosen.items() if path not in given}


def tell_recipe(chosen: Mapping[str, Any], name: str) -> None:
    """Say what a recipe has set."""
    words = [f"--{path.split('.')[1]} {_typed(value)}".rstrip() for path, value in chosen.items()]
    logger.info("recipe %s sets %s; what is given stays", name, " ".join(words))


def _typed(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def _encoder_of(given: Mapping[str, Any]) -> tuple[float, bool]:
    """How many parameters the encoder has, and whether its layers are known; of own code neither is."""
    import timm
    import torch

    from ds_wsi.models.hub import layers_by_name, resolve_encoder
    from ds_wsi.training.settings.model import ModelSettings

    name = given.get("model.encoder", ModelSettings().encoder)
    source = resolve_encoder(name, dict(given.get("model.encoder_options", ())))
    if source.is_own:
        return 0.0, False
    with torch.device("meta"):
        encoder = timm.create_model(source.architecture, num_classes=0, **layers_by_name(source.options))
    return float(sum(parameter.numel() for parameter in encoder.parameters())), True
