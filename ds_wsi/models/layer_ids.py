"""Layers of an encoder by parameter, counted from its input, for learning rates that fall towards the input.

[Note: layers] Embeddings, tokens and positions are layer 0, block i is layer i + 1, what comes after the n blocks (the
last norm) is n + 1, where the aggregator begins. Blocks are those of timm's own grouping (`group_matcher`), but that a
last norm is no part of the last block; an encoder without such a grouping has them in a list `blocks`. A LoRA adapter
is of the layer that it adapts. The rate of layer k is decay^(n + 1 - k) of the encoder's.

Source: Bao et al., "BEiT: BERT Pre-Training of Image Transformers" (2022), appendix; Clark et al., "ELECTRA" (2020).
"""

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from timm.models import group_parameters
from torch import nn

_WITH_THE_ONE_BEFORE = (99999,)  # how timm's matchers say that a part is of no layer of its own
_AFTER = "after all blocks"  # no parameter's name
_TOKENS = re.compile(r"(^|\.)\w*(_token|token|pos_embed|position\w*|bias_table|attention_biases)s?$")


def layer_ids(encoder: nn.Module) -> tuple[dict[str, int], int]:
    """Parameter name -> its layer, and n + 1, as [Note: layers] has it.

    Raises:
        ValueError: the encoder has no layers that are known.
    """
    names = [name for name, _ in encoder.named_parameters()]
    matcher: Any = getattr(encoder, "group_matcher", None)
    if matcher is not None:
        # The largest number is of what no pattern matches: one name is there that certainly is none.
        named = SimpleNamespace(named_parameters=lambda: [(name, None) for name in (*names, _AFTER)])
        by_name: dict[str, int] = group_parameters(named, _without_joined(matcher()), reverse=True)
        last = by_name.pop(_AFTER)
        return by_name, last
    blocks = dict(encoder.named_children()).get("blocks")
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise ValueError(
            f"--layer_decay must be given with an encoder whose layers are known, got {type(encoder).__name__}, which "
            "has neither timm's group_matcher nor a list `blocks`. HINT: leave it out, or name your blocks so."
        )
    return _by_blocks(names, len(blocks)), len(blocks) + 1


def _by_blocks(names: list[str], n_blocks: int) -> dict[str, int]:
    """Layers by a list of blocks: what is registered before them, the encoder's direct parameters too, is layer 0."""
    ids, seen = {}, False
    for name in names:
        block = re.match(r"blocks\.(\d+)\.", name)
        seen = seen or block is not None
        ids[name] = int(block[1]) + 1 if block else n_blocks + 1 if seen else 0
    return ids


def _without_joined(matcher: Any) -> Any:
    if not isinstance(matcher, Mapping):
        return matcher
    kept = {}
    for group, patterns in matcher.items():
        listed = isinstance(patterns, list | tuple)
        kept[group] = [one for one in patterns if one[1] != _WITH_THE_ONE_BEFORE] if listed else patterns
    return {group: patterns for group, patterns in kept.items() if patterns}


def decays(module: nn.Module, name: str, parameter: Any) -> bool:
    """Whether weight decay is for a parameter: no bias or scale, of one dimension, no token and no position.

    Args:
        module: the part that says of its own which names are without (timm's `no_weight_decay`), if it does.
        name: the parameter's name in that part.
        parameter: the parameter, whole, sharded by FSDP2 or of its whole shape.
    """
    without: Any = getattr(module, "no_weight_decay", None)
    is_named = without is not None and name in without()
    return parameter.dim() > 1 and not is_named and not name.endswith("bias") and _TOKENS.search(name) is None
