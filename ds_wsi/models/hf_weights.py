"""Vision transformers of the transformers library as timm's: `hf:ORG/NAME`, of its ViT and Dinov2 classes.

Their tensors are renamed, and query, key and value laid in one. No code of a repository runs; blocks, partition, rates
by layer and adapters are those of any other vision transformer.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from ds_wsi.models.known_encoders import HF, IMAGENET, VIT, EncoderSource, vit_options
from ds_wsi.models.weights_file import read_weights
from ds_wsi.runtime.files import read_object

KINDS = ("vit", "dinov2")
NOT_TAKEN = ("pooler.", "embeddings.mask_token", "classifier.")
NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
OF_BLOCKS = {
    **{"layernorm_before": "norm1", "layernorm_after": "norm2", "norm1": "norm1", "norm2": "norm2"},
    **{"attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"},
    **{"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "mlp.weights_in": "mlp.fc1", "mlp.weights_out": "mlp.fc2"},
    **{"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"},
}


def hf_source(name: str) -> EncoderSource:
    """What a repository's config.json says of an encoder. Downloads it.

    Raises:
        ValueError: it cannot be had, or is of another class, or has code of its own.
    """
    config = read_object(_fetched(name, "config.json"), "config.json of an encoder")
    try:
        pixels = read_object(_fetched(name, "preprocessor_config.json"), "preprocessor_config.json")
    except EntryNotFoundError:
        pixels = {}
    kind = config.get("model_type")
    if kind not in KINDS:
        code = " with code of its own (auto_map), which is not run" if "auto_map" in config else ""
        raise ValueError(
            f"{HF} must name a repository of transformers' classes {' or '.join(KINDS)}, got {name} of "
            f"{kind!r}{code}. HINT: --encoder MODULE:CALLABLE builds it by code of yours."
        )
    mean: Any = tuple(pixels.get("image_mean", IMAGENET[0]))
    std: Any = tuple(pixels.get("image_std", IMAGENET[1]))
    return EncoderSource(name, VIT, mean, std, options=_options(config))


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    width, of_dinov2 = int(config["hidden_size"]), config["model_type"] == "dinov2"
    ratio = config.get("mlp_ratio", 4) if of_dinov2 else config.get("intermediate_size", 4 * width) / width
    return vit_options(
        *(width, int(config["num_hidden_layers"]), int(config["num_attention_heads"])),
        mlp_ratio=float(ratio),
        patch_size=int(config.get("patch_size", 14 if of_dinov2 else 16)),
        img_size=int(config.get("image_size", 224)),
        norm_eps=float(config.get("layer_norm_eps", 1e-6 if of_dinov2 else 1e-12)),
        init_values=float(config.get("layerscale_value", 1.0)) if of_dinov2 else None,
        swiglu=bool(config.get("use_swiglu_ffn", False)),
        qkv_bias=bool(config.get("qkv_bias", True)),
    )


def load_hf_weights(encoder: nn.Module, name: str) -> None:
    """Put a repository's safetensors into timm's vision transformer of the same sizes, in place. Downloads them.

    Raises:
        ValueError: they cannot be had, or are of another model.
    """
    path = _fetched(name, "model.safetensors")
    try:
        encoder.load_state_dict(renamed(read_weights(path)))
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"the weights of {name} must be of its architecture, got others ({str(error).splitlines()[0]}, {path})"
        ) from error


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' ViT or Dinov2 by timm's names.

    Raises:
        KeyError: a tensor that neither has.
    """
    named: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        short = re.sub(r"^(vit|dinov2)\.", "", key)
        if short.startswith(NOT_TAKEN):
            continue
        block = re.match(r"encoder\.layer\.(\d+)\.(.+)", short)
        inner = block[2] if block else short
        stem, _, leaf = inner.rpartition(".")
        if block and (part := re.match(r"attention\.attention\.(query|key|value)$", stem)):
            parts.setdefault(f"blocks.{block[1]}.attn.qkv.{leaf}", {})[part[1]] = value
            continue
        table = OF_BLOCKS if block else NAMES
        name = table[inner] if inner in table else f"{table[stem]}.{leaf}"
        named[f"blocks.{block[1]}.{name}" if block else name] = value
    joined = {name: torch.cat([of[part] for part in ("query", "key", "value")]) for name, of in parts.items()}
    return named | joined


def _fetched(name: str, file: str) -> Path:
    """The file of a repository, in the cache of huggingface_hub."""
    try:
        return Path(hf_hub_download(name.removeprefix(HF), file))
    except EntryNotFoundError:
        raise
    except Exception as error:  # a name that is none, no network, a gate: the client raises many kinds
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{file} of encoder {name!r} must be downloaded, got {type(error).__name__}: {reason} HINT: "
            "--encoder_weights FILE takes weights from a local file; a gated model needs `hf auth login`."
        ) from error
