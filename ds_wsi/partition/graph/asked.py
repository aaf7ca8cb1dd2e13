"""What a forward asks of a tensor beside its numbers: whether autograd follows it, and where it lies in memory.

A recorded value has neither autograd's graph nor an address. Whether it would require a gradient is told by the record;
what else a forward may ask would be answered otherwise than in the call, and is not.
"""

from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ds_wsi.partition.graph.contexts import is_detached
from ds_wsi.partition.graph.unrecorded import UnrecordedError

REQUIRES_GRAD, IS_LEAF, GRAD_FN = "requires_grad", "is_leaf", "grad_fn"
_OF_AUTOGRAD = {
    *(REQUIRES_GRAD, IS_LEAF, GRAD_FN, "grad", "retains_grad", "output_nr", "is_inference"),
    *("_version", "_base", "_is_view", "_backward_hooks"),
}
_OF_MEMORY = {
    *("data_ptr", "const_data_ptr", "storage", "untyped_storage", "is_pinned", "is_shared", "is_set_to"),
    *("_cdata", "_typed_storage"),
}
BY_STRIDES = {"as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter", "set_"}  # views of memory


def is_asked(name: str) -> bool:
    """Whether what is called asks for nothing that is computed."""
    return name in _OF_AUTOGRAD or name in _OF_MEMORY


def reader_of(frame: FrameType | None) -> str:
    """The name of the module whose code has called a frame's function."""
    caller = None if frame is None else frame.f_back
    return "" if caller is None else str(caller.f_globals.get("__name__", ""))


class UnknownError(Exception):
    """A forward asks for a state of autograd's that a chunk's own passes do not know either."""


class _Edge:
    """A value's place in autograd's graph: it is there, and that is all that can be said of it."""

    def __getattr__(self, name: str) -> Any:
        raise UnrecordedError(f"grad_fn.{name} of a value is read, which a recorded forward does not know")


def answer(
    name: str, node: fx.Node, values: dict[fx.Node, Any], part_of: Callable[[str], nn.Module], *, graded: bool
) -> Any:
    """What the call would be answered.

    Args:
        name: what is asked, see `is_asked`.
        node: the node of the tensor that is asked.
        values: the values of all nodes.
        part_of: name of a sub-module -> it.
        graded: whether autograd follows the call.

    Raises:
        UnrecordedError: a chunk knows it alone.
        UnknownError: a chunk does not know it: it hangs on whether the tiles require a gradient, say.
    """
    if name in _OF_MEMORY:
        raise UnrecordedError(f"{name} of a value is read, which a recorded forward does not know")
    if name not in (REQUIRES_GRAD, IS_LEAF, GRAD_FN) or _is_tiles(node):
        raise UnknownError
    follows: bool | None = False
    if graded:
        follows, other = (_follows(node, values, part_of, tiles=tiles) for tiles in (False, True))
        if follows is None or follows != other:
            raise UnknownError
    if name == GRAD_FN:
        return _Edge() if follows else None
    return follows if name == REQUIRES_GRAD else not follows


def _is_tiles(node: fx.Node) -> bool:
    """Whether it is the tiles: what stands beside them requires no gradient, and is known."""
    return node.op == "placeholder" and node.meta.get("path") is None


def _follows(
    target: fx.Node, values: dict[fx.Node, Any], part_of: Callable[[str], nn.Module], *, tiles: bool
) -> bool | None:
    """Whether autograd follows a value, where the tiles require a gradient or do not; None: nobody knows."""
    follows: dict[fx.Node, bool | None] = {}
    for node in target.graph.nodes:
        followed = [follows[parent] for parent in node.all_input_nodes]
        if node.op == "placeholder":
            follows[node] = tiles and _is_tiles(node)
        elif node.op == "get_attr":
            follows[node] = values[node].requires_grad
        elif is_detached(node):
            follows[node] = False
        elif None in followed:
            follows[node] = None
        elif node.op == "call_module":
            follows[node] = _leaf_follows(part_of(str(node.target)), any(followed), values[node])
        else:
            follows[node] = any(followed) and _function_follows(node, follows, values)
        if node is target:
            break
    return follows[target]


def _leaf_follows(leaf: nn.Module, followed: bool, value: Any) -> bool | None:
    followed = followed or any(parameter.requires_grad for parameter in leaf.parameters())
    if not followed:
        return False
    # What another's module does to its tensors is its own affair.
    certain = type(leaf).__module__.startswith("torch.nn") and isinstance(value, Tensor) and _can_follow(value)
    return True if certain else None


def _function_follows(node: fx.Node, follows: dict[fx.Node, bool | None], values: dict[fx.Node, Any]) -> bool | None:
    """Told by torch itself, on tensors without numbers: a comparison, `detach` or `zeros_like` is not followed."""

    def given(parent: fx.Node) -> Any:
        return fx.node.map_aggregate(
            values[parent],
            lambda item: (
                item.detach().requires_grad_(bool(follows[parent]) and _can_follow(item))
                if isinstance(item, Tensor)
                else item
            ),
        )

    function: Any = node.target
    try:
        with torch.enable_grad():
            result = function(*fx.map_arg(node.args, given), **fx.map_arg(node.kwargs, given))
    except Exception:  # in place, where torch's autograd does not allow it
        return None
    items = result if isinstance(result, (tuple, list)) else [result]
    return any(item.requires_grad for item in items if isinstance(item, Tensor))


def _can_follow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
