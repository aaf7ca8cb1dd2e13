"""What private names are read for, as functions: callers need not know them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ds_wsi.runtime.seams.checks import check_seams

if TYPE_CHECKING:
    from torch import Tensor


# --- torch ---


def storage_key(tensor: "Tensor") -> int:
    """What two tensors have in common that share a storage; of fake ones too, which have no address."""
    return int(tensor.untyped_storage()._cdata)


def operation_of(overload: Any) -> Any:
    """The operation (torch.ops.aten.add) of an overload (torch.ops.aten.add.Tensor)."""
    return overload._overloadpacket


def writes_to_inputs(overload: Any) -> bool:
    """Whether an operation changes an input in place."""
    return bool(overload._schema.is_mutable)


def default_store() -> Any:
    """The store that the world's process group was made with."""
    from torch.distributed import distributed_c10d

    check_seams("torch", "ranks")
    return distributed_c10d._get_default_store()


def fsdp_param_groups(unit: Any) -> list[Any]:
    """The groups of parameters of an FSDP2 unit; none of one without parameters."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


# --- DeepSpeed ---


def is_zero3_part(parameter: Any) -> bool:
    """Whether a parameter is this rank's part of one that ZeRO-3 partitions."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's shape, that of the whole one under ZeRO-3."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def fp16_scale_of(optimizer: Any) -> Callable[[], float]:
    """The loss scale of DeepSpeed's fp16, which its optimizers keep in one of two places."""
    return lambda: float(getattr(optimizer, "loss_scale_config", optimizer).cur_scale)
