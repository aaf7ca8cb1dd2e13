"""A module as a graph of operations: barriers, levels, the points where one tensor alone is alive.

torch.fx traces the module, whose building blocks stay whole. A module without a barrier needs no tracing on the batch
axis: it is one operation.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ds_wsi.norms.population import takes_population
from ds_wsi.partition.hooks import is_compiled, twin, uncompiled

ROOT = ""  # the target of an untraced module's only operation


def needs_batch_statistics(module: nn.Module) -> bool:
    """Whether the module normalises with statistics over its whole batch: the only coupling between tiles."""
    return isinstance(module, _BatchNorm) and takes_population(module)


def needs_image_statistics(module: nn.Module) -> bool:
    """Whether the module normalises with statistics over whole images, which couple their rows."""
    if isinstance(module, _InstanceNorm):
        return module.training or not module.track_running_stats
    return isinstance(module, nn.GroupNorm)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        # A subclass of a norm is the norm, whatever it adds (timm's BatchNormAct2d: drop and act).
        norms = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
        return isinstance(module, norms) or super().is_leaf_module(module, qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # What torch.compile has wrapped is traced as it was: chunks are compiled by a policy's `compile`.
        if is_compiled(m):
            return self.call_module(uncompiled(m), uncompiled(m).__call__, args, kwargs)
        if m._compiled_call_impl is not None and not self.is_leaf_module(m, ""):
            forward = m._call_impl
        return super().call_module(m, forward, args, kwargs)


class Traced:
    """A module's graph, for one setting of its `training` flags.

    Args:
        module: to trace.
        axis: "batch" or "spatial".
        forward: its own, where `module.forward` is another's.
        whole: whether a module without barriers may stay one operation.

    Attributes:
        nodes: operations in order of execution.
        source, target: the input's node and the node of the output.
        barriers: norm nodes -> nodes of their inputs, whose statistics couple chunks.
    """

    def __init__(
        self, module: nn.Module, axis: str, forward: Callable[..., Any] | None = None, *, whole: bool = True
    ) -> None:
        self.module = module
        self.forward = forward or module.forward
        couples = [needs_batch_statistics(part) for part in module.modules()]
        self.opaque = whole and axis == "batch" and not any(couples)
        graph = _one_operation() if self.opaque else _trace(module)
        self.nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        (self.source,) = [node for node in graph.nodes if node.op == "placeholder"]
        (output,) = [node for node in graph.nodes if node.op == "output"]
        self.target = output.args[0]
        if not isinstance(self.target, fx.Node):
            raise ValueError(
                f"{type(module).__name__}.forward must return one tensor, got {self.target!r}. "
                "HINT: partition the sub-module that returns the features."
            )
        self.graph = graph  # nodes do not keep it alive
        self.leaves = {node: self._leaf(node) for node in self.nodes if node.op == "call_module"}
        self.barriers: dict[fx.Node, fx.Node] = {}
        for node, leaf in self.leaves.items():
            image = axis == "spatial" and needs_image_statistics(leaf)
            if needs_batch_statistics(leaf) or image:
                self.barriers[node] = node.all_input_nodes[0]

    def _leaf(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def propagate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[fx.Node, Any]:
        """Every node's value as a fake tensor for an input of this shape: shapes and dtypes, nothing is computed."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            values: dict[fx.Node, Any] = {self.source: torch.empty(shape, dtype=dtype, device=device)}
            for node in self.nodes:
                args = fx.map_arg(node.args, lambda item: values[item])
                kwargs = fx.map_arg(node.kwargs, lambda item: values[item])
                if node.op == "call_module":
                    leaf = self.leaves[node]
                    state: dict[str, Tensor] = {
                        name: mode.from_tensor(tensor.new_empty(_full_shape(tensor)))
                        for name, tensor in (*leaf.named_parameters(), *leaf.named_buffers())
                    }
                    if isinstance(leaf, _BatchNorm):  # would count its batches, or refuse what is not on a GPU
                        values[node] = torch.empty_like(args[0])
                    else:
                        forward = twin(leaf)
                        forward.__dict__.pop("forward", None)
                        forward._compiled_call_impl = None
                        values[node] = torch.func.functional_call(forward, state, tuple(args), kwargs)
                else:
                    values[node] = evaluate(self.module, node, args, kwargs)
            return values


def evaluate(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The value of a node that calls no module."""
    if node.op == "get_attr":
        value: Any = root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    if node.op == "call_function":
        if kwargs.get("inplace"):
            kwargs = {**kwargs, "inplace": False}
        return node.target(*args, **kwargs)  # type: ignore[operator]
    name = str(node.target)
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]  # in place, an operation would change a value that is read again in backward
    return getattr(args[0], name)(*args[1:], **kwargs)


def levels(nodes: list[fx.Node], barriers: dict[fx.Node, fx.Node]) -> dict[fx.Node, int]:
    """How many barriers deep each node lies among `nodes`: all nodes of a level need one pass over the chunks.

    A norm whose result is read later only is taken to the later level: its input is stored in any case, and its result
    need not be.
    """
    inside = set(nodes)
    found: dict[fx.Node, int] = {}
    for node in nodes:
        deepest = max((found.get(parent, 0) for parent in node.all_input_nodes), default=0)
        found[node] = deepest + 1 if node in barriers else deepest
    for node in reversed(nodes):
        # What a norm reads must be complete a level before.
        readers = [found[user] - (user in barriers) for user in node.users if user in inside]
        light = node in barriers or (node.op == "call_module" and len(node.all_input_nodes) == 1)
        if light and readers and not _is_heavy(node):
            found[node] = max(found[node], min(readers))
    return found


def cut_candidates(traced: Traced, tensors: set[fx.Node]) -> list[fx.Node]:
    """Nodes after which their tensor alone is alive, and where storing it pays: at most one a residual block.

    The input of a norm is none: its statistics belong to the segment that reads it.
    """
    last_use = {node: index for index, user in enumerate(traced.nodes) for node in user.all_input_nodes}
    alive: set[fx.Node] = {traced.source}
    single = []
    for index, node in enumerate(traced.nodes):
        if node in tensors and node.op != "get_attr":
            alive.add(node)
        alive = {item for item in alive if last_use.get(item, -1) > index}
        if alive == {node} and node not in traced.barriers.values():
            single.append(node)
    splits = [node for node in single if len(node.users) > 1]
    if len(splits) < 2:  # a chain without residuals
        splits = [node for node in single if any(_is_heavy(user) for user in node.users)]
    return splits


def _is_heavy(node: fx.Node) -> bool:
    """Whether recomputing the node costs more than moving its tensors: it contracts, or it is whole to us."""
    names = ("conv", "linear", "matmul", "attention", "einsum", "pool")
    if node.op == "call_module":
        leaf = node.graph.owning_module.get_submodule(str(node.target)) if node.graph.owning_module else None
        kind = node.meta.get("leaf", leaf)
        return any(name in type(kind).__name__.lower() for name in names)
    return any(name in str(node.target).lower() for name in names)


def _full_shape(tensor: Tensor) -> torch.Size:
    return getattr(tensor, "ds_shape", tensor.shape)  # under ZeRO-3 a parameter's own shape is empty


def _one_operation() -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_module(ROOT, (graph.placeholder("input"),)))
    return graph


def _trace(module: nn.Module) -> fx.Graph:
    try:
        graph = _Tracer().trace(module, concrete_args=_defaults(module))
    except Exception as error:  # fx raises whatever the module's Python does with a proxy
        raise ValueError(
            f"{type(module).__name__} must be traceable by torch.fx to be partitioned across train-mode BatchNorm or "
            f"in space, got {type(error).__name__}: {str(error).splitlines()[0]}. HINT: partition the sub-module that "
            "holds the layers, or set its BatchNorm to evaluation mode."
        ) from error
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "call_module":
            node.meta["leaf"] = module.get_submodule(str(node.target))
    return graph


def _defaults(module: nn.Module) -> dict[str, Any]:
    import inspect

    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    return {entry.name: entry.default for entry in parameters if entry.default is not entry.empty}


def ancestors(targets: Iterable[fx.Node], stops: set[fx.Node]) -> set[fx.Node]:
    """All nodes that `targets` are computed from, going no further back than `stops`, which are not included."""
    found: set[fx.Node] = set()
    waiting = [node for node in targets if node not in stops]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        waiting += [parent for parent in node.all_input_nodes if parent not in stops]
    return found
