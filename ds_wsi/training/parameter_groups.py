"""Parameter groups with rates and weight decay of their own: by layer of the encoder, and by kind of parameter.

Groups are of names, made before an engine wraps the model; what a group is of stands in it, where engines leave it, so
that `warmup.set_rates` gives each its share of the step's rate under any engine, optimizer and schedule.
"""

from typing import Any

from ds_wsi.models import SlideModel
from ds_wsi.models.layer_ids import decays, layer_ids

ENCODER, SCALE, DECAYS = "of_encoder", "lr_scale", "decays"  # keys of a group


def parameter_groups(module: SlideModel, layer_decay: float, *, no_decay_1d: bool) -> list[dict[str, Any]]:
    """The trained parameters in groups, the aggregator's before the encoder's, and these from the input on.

    Args:
        module: not wrapped by an engine.
        layer_decay: factor of the encoder's rate from a layer to the one before; 1 has one rate.
        no_decay_1d: no weight decay for biases, scales of norms, tokens and positions, see `decays`.

    Returns:
        "params" (names in the module), "of_encoder", "lr_scale" (of its part's rate) and "decays" of each group.

    Raises:
        ValueError: the layers of an encoder that is trained are not known.
    """
    trained = [name for name, parameter in module.encoder.named_parameters() if parameter.requires_grad]
    ids, last = layer_ids(module.encoder) if trained and layer_decay != 1 else (dict.fromkeys(trained, 0), 0)
    groups: dict[tuple[bool, int, bool], list[str]] = {}
    parts = (
        ("aggregator", "encoder") if module.scale_embedding is None else ("aggregator", "scale_embedding", "encoder")
    )
    for part in parts:
        owner = module.get_submodule(part)
        for name, parameter in owner.named_parameters():
            if parameter.requires_grad:
                layer = ids[name] if part == "encoder" else last
                key = part == "encoder", layer, not no_decay_1d or decays(owner, name, parameter)
                groups.setdefault(key, []).append(f"{part}.{name}")
    return [
        {"params": names, ENCODER: of_encoder, SCALE: layer_decay ** (last - layer), DECAYS: decayed}
        for (of_encoder, layer, decayed), names in sorted(groups.items())
    ]


def words_of(groups: list[dict[str, Any]]) -> str:
    """The groups in a line: how the rates of the encoder's layers lie, and how many parameters do not decay."""
    scales = sorted({group[SCALE] for group in groups if group[ENCODER]})
    free = sum(len(group["params"]) for group in groups if not group[DECAYS])
    total = sum(len(group["params"]) for group in groups)
    words = []
    if len(scales) > 1:
        words.append(f"{len(scales)} layers of the encoder, at {scales[0]:.3g} to {scales[-1]:.3g} of its rate")
    if free:
        words.append(f"{free} of {total} parameters without weight decay")
    return ", ".join(words) or "one rate and decay"
