"""Epochs at the beginning in which the encoder rests and only the aggregator is trained, under any engine.

Engines must not see `requires_grad` change. So the encoder's parameters are a parameter group of their own, which gets
gradients of zero (`SlideModel.warming_up`), a learning rate of 0 and no weight decay: weights and Adam's moments stay
as they are, bit for bit. Only Adam's count of steps goes on, and is set back when the encoder begins: from there on
the group is one whose training starts then.
"""

from typing import Any

from ds_wsi.training.parameter_groups import DECAYS, ENCODER, SCALE

ENCODER_GROUP = 1  # of the optimizer's two, see `engines.accelerate.prepare`, where groups do not say it themselves


def encoder_rests(epochs: int, epoch: int) -> bool:
    """Whether the encoder is not trained yet in `epoch` (from 0), the first `epochs` being without it."""
    return epoch < epochs


def set_rates(
    optimizer: Any, learning_rate: float, weight_decay: float, *, resting: bool, encoder_factor: float = 1.0
) -> None:
    """Set the learning rate of every group before a step, the encoder's groups' times `encoder_factor`.

    Groups of `parameter_groups` have their share of it, and some no weight decay. While the encoder rests its groups
    have neither.
    """
    for index, group in enumerate(optimizer.param_groups):
        of_encoder = _is_encoders(index, group)
        rests = resting and of_encoder
        rate = learning_rate * encoder_factor if of_encoder else learning_rate
        group["lr"] = 0.0 if rests else rate * group.get(SCALE, 1.0)
        group["weight_decay"] = weight_decay if group.get(DECAYS, True) and not rests else 0.0


def _is_encoders(index: int, group: dict[str, Any]) -> bool:
    return bool(group.get(ENCODER, index == ENCODER_GROUP))


def forget_steps(optimizer: Any) -> None:
    """Set back the count of steps of the encoder's groups, in place: bias correction begins with its first gradient.

    Adam and AdamW of torch and of DeepSpeed; an optimizer that counts none is left as it is.
    """
    while hasattr(optimizer, "optimizer"):  # Accelerate's wrapper, and ZeRO's around the one that steps
        optimizer = optimizer.optimizer
    for index, group in enumerate(optimizer.param_groups):
        if not _is_encoders(index, group):
            continue
        if "step" in group:  # counted by group, in DeepSpeed's fused Adam
            group["step"] = 0
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"] * 0  # a number or a tensor
