"""Whether what backward reads again is still what forward read: autograd's own check, for what no graph holds.

Autograd compares version counters of what it has saved. A partition computes again: it reads its input, parameters and
buffers in backward, which somebody may have changed in place by then. Writes by `.data` count no version, here as
there. What is computed again is asked for as a whole: a bias that plain autograd would not need may not change either.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ds_wsi.norms.population import takes_population
from ds_wsi.partition.graph.segments import Segment
from ds_wsi.partition.module.observed import version_of


def require_version(tensor: Tensor, expected: int, name: str | None) -> None:
    """Refuse a tensor that was changed in place since it had the expected version.

    Raises:
        RuntimeError: autograd's own sentence, with the tensor's name where there is one.
    """
    if version_of(tensor) == expected:
        return
    naming = "" if name is None else f" which is {name},"
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}],{naming} is at version {tensor._version}; expected version {expected} "
        "instead."
    )


class Guard:
    """One tensor, and the version that it must have when it is read.

    Args:
        tensor: the tensor as it is now.
        name: what it is, for the error.

    Attributes:
        armed: whether `check` checks: in backward, not in forward.
    """

    def __init__(self, tensor: Tensor, name: str | None) -> None:
        self.tensor, self.name, self.version, self.armed = tensor, name, version_of(tensor), False

    def check(self) -> None:
        """See `require_version`."""
        if self.armed:
            require_version(self.tensor, self.version, self.name)


def guards_of(segment: Segment, names: dict[int, str]) -> list[Guard]:
    """Guards of what a replay of the segment reads beside its input, as it is now: parameters and buffers."""
    tensors = {id(tensor): tensor for tensor in _read(segment)}
    guards = [Guard(tensor, names[key]) for key, tensor in tensors.items() if key in names]
    for guard in guards:
        guard.armed = True
    return guards


def name_changed(error: RuntimeError, guards: list[Guard]) -> RuntimeError | None:
    """Autograd's own error with the name of the tensor that was changed, where it is one of these."""
    if "modified by an inplace operation" in str(error):
        for guard in guards:
            try:
                require_version(guard.tensor, guard.version, guard.name)
            except RuntimeError as named:
                return named
    return None


def _read(segment: Segment) -> Iterator[Tensor]:
    graph = segment.whole
    for node in graph.nodes:
        leaf = graph.traced.leaves.get(node)
        if leaf is None:
            value = _attribute(graph.traced.module, node)
            if isinstance(value, Tensor):
                yield value
            continue
        for part in leaf.modules():
            yield from (tensor for tensor in part._parameters.values() if tensor is not None)
            if not _has_own_statistics(part):
                yield from (tensor for tensor in part._buffers.values() if tensor is not None)


def _attribute(root: Any, node: fx.Node) -> Any:
    if node.op != "get_attr":
        return None
    for part in str(node.target).split("."):
        root = getattr(root, part)
    return root


def _has_own_statistics(part: nn.Module) -> bool:
    """Whether the part is a norm that writes its running statistics, if at all, and does not read them."""
    if isinstance(part, _InstanceNorm):
        return part.training or not part.track_running_stats
    return isinstance(part, _NormBase) and takes_population(part)
