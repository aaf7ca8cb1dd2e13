"""Low-rank adapters of an encoder's linear layers, by peft: the base weights stay, the adapters are trained.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ds_wsi.models.features import features_shape
from ds_wsi.models.freezing import keep_in_eval
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seams import AnyBatchNorm

# Linear layers by the last parts of their names, of timm's and of transformers' vision transformers.
ATTENTION = (
    *("qkv", "proj", "q", "k", "v", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "query", "key", "value"),
    "attention.output.dense",
)
FEED_FORWARD = (
    *("fc1", "fc2", "fc1_g", "fc1_x", "w1", "w2", "w3", "w12", "weights_in", "weights_out"),
    *("intermediate.dense", "output.dense"),
)
SETS = {"attention": ATTENTION, "all": (*ATTENTION, *FEED_FORWARD)}
ADAPTER = "default"  # peft's name of a module's only adapter


def add_lora(encoder: nn.Module, rank: int, alpha: float, targets: Sequence[str], tile_size_px: int) -> None:
    """Give linear layers of `encoder` adapters, in place and before an engine wraps the model; all else is frozen.

    W x becomes W x + alpha / rank B A x, A [rank, in] random, B [out, rank] zero: at first nothing changes. BatchNorm
    stays in evaluation mode.

    Args:
        encoder: the encoder, every parameter of which is trained so far.
        rank: rank of the adapters.
        alpha: their scale.
        targets: the last parts of the names of linear layers, such as `qkv`; or `attention`, `all`, see `SETS`.
        tile_size_px: side of the tiles.

    Raises:
        ValueError: peft is not installed, a target names no linear layer, or the encoder reads a layer's weight without
            calling the layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError('--lora_rank needs peft, which is not installed. HINT: pip install "ds_wsi[lora]"') from error
    linear = [name for name, part in encoder.named_modules() if isinstance(part, nn.Linear)]
    chosen: list[str] = []
    for target in targets:
        matching = [name for name in linear if _ends_in(name, SETS.get(target, (target,)))]
        if not matching:
            leaves = sorted({name.rpartition(".")[2] for name in linear})
            shown = difflib.get_close_matches(target, leaves, n=5) or leaves
            raise ValueError(
                f"lora_targets must be the names of linear layers of {type(encoder).__name__}, got {target!r}. "
                f"HINT: {'did you mean ' + ', '.join(shown) + '?' if shown else 'it has none; --freeze_until instead.'}"
            )
        chosen += [name for name in matching if name not in chosen]
    _tell(linear, chosen)
    settings: Any = {"r": rank, "lora_alpha": alpha, "target_modules": chosen}  # declared int, any number does
    inject_adapter_in_model(LoraConfig(**settings), encoder, ADAPTER)
    keep_in_eval(encoder, [name for name, part in encoder.named_modules() if isinstance(part, AnyBatchNorm)])
    _require_calls(encoder, chosen, tile_size_px)


def _ends_in(name: str, targets: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _tell(linear: Sequence[str], chosen: Sequence[str]) -> None:
    """Say which layers get adapters, those of all blocks as one, and warn of feed-forward layers that get none."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in chosen)
    logger.info("LoRA: %s", ", ".join(f"{name} ({count})" for name, count in counts.items()))
    left = sorted({name.rpartition(".")[2] for name in linear if name not in chosen and _ends_in(name, FEED_FORWARD)})
    if left:
        logger.warning(
            "LoRA leaves the feed-forward layers %s as they are, most of a block's weights. HINT: --lora_targets all.",
            ", ".join(left),
        )


def _require_calls(encoder: nn.Module, names: Sequence[str], tile_size_px: int) -> None:
    called: set[str] = set()
    hooks = [
        encoder.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in names
    ]
    try:
        features_shape(encoder, tile_size_px)
    finally:
        for hook in hooks:
            hook.remove()
    unused = [name for name in names if name not in called]
    if unused:
        raise ValueError(
            f"lora_targets must be layers that {type(encoder).__name__} calls, got {unused[0]}, of which it reads the "
            "weight alone. HINT: leave it out of --lora_targets."
        )


def without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict as it was before `add_lora`: the base weights by their plain names."""
    base = {name: value for name, value in state.items() if ".lora_A." not in name and ".lora_B." not in name}
    return {name.replace(".base_layer.", "."): value for name, value in base.items()}


def merge_lora(state: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """The state_dict of the plain module that computes the same: W + alpha / rank B A in each adapter's place.

    Args:
        state: a module's with adapters of `add_lora`, under any prefix; its tensors are not written.
        rank, alpha: what the adapters were made with.
    """
    merged = {}
    for name, value in state.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer, base, leaf = name.rpartition(".base_layer.")
        down, up = (state.get(f"{layer}.lora_{part}.{ADAPTER}.weight") for part in "AB")
        if base and leaf == "weight" and down is not None and up is not None:
            value = value + (alpha / rank) * (up @ down)
        merged[f"{layer}.{leaf}" if base else name] = value
    return merged
