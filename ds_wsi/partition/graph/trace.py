"""A module as a graph of operations: barriers, levels, the points where one tensor alone is alive.

A module without a barrier needs no graph on the batch axis: it is one operation.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ds_wsi.partition.graph.leaves import (
    is_known_norm,
    is_leaf_of_graph,
    keeps_shape,
    needs_batch_statistics,
    needs_image_statistics,
)
from ds_wsi.partition.graph.record import Example, Recording, record, where_it_stopped
from ds_wsi.partition.graph.sizes import FEW, MANY, MORE, NAMED, join
from ds_wsi.partition.graph.unrecorded import ForbiddenError, UnrecordedError
from ds_wsi.partition.module.outputs import OutputForm, form_of
from ds_wsi.runtime.log import logger

ROOT = ""  # the target of an untraced module's only operation


def stays_whole(module: nn.Module, axis: str) -> bool:
    """Whether a chunk can run the module as one operation: nothing couples tiles."""
    return axis == "batch" and not any(needs_batch_statistics(part) for part in module.modules())


class Traced:
    """A module's graph, for one setting of its `training` flags and one kind of input.

    Args:
        module: the module to trace.
        axis: "batch" or "spatial".
        example: an example of the module's input; None only where the module stays one operation.
        forward: the module's own forward, where `module.forward` is another's.
        whole: whether a module without barriers may stay one operation.

    Attributes:
        nodes: operations in order of execution.
        source, target: the input's node and the node of the output.
        arguments: nodes of the tensors beside the tiles -> their paths.
        dependent: nodes whose values depend on the tiles; the others are the same for every chunk.
        barriers: norm nodes -> nodes of their inputs, whose statistics couple chunks.
        values: the nodes' values: tensors without numbers, of the example's shape.
        by_tile: nodes that have one row for each tile.
        form: the output's form; None where it is not known before the first chunk.
        attributes: (part, name, value) that the forward sets, whatever the tiles.

    Raises:
        ValueError: the forward cannot be recorded, or does what no partition may do.
    """

    def __init__(
        self,
        module: nn.Module,
        axis: str,
        example: Example | None = None,
        forward: Callable[..., Any] | None = None,
        *,
        whole: bool = True,
    ) -> None:
        self.module, self.axis = module, axis
        self.forward = forward or module.forward
        self.opaque = whole and stays_whole(module, axis)
        self.form: OutputForm | None = None
        self.values: dict[fx.Node, Any] = {}
        self.by_tile: set[fx.Node] = set()
        self.attributes: list[tuple[nn.Module, str, Any]] = []
        self._whole: set[str] = set()
        self._counts = {0}  # of tiles, for which the operations are known to be these
        if self.opaque:
            graph = _one_operation()
        else:
            assert example is not None
            graph = self._recorded(example)
        self.graph = graph  # nodes do not keep it alive
        self.nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        self.source, *beside = [node for node in graph.nodes if node.op == "placeholder"]
        self.arguments = {node: str(node.meta["path"]) for node in beside}
        (output,) = [node for node in graph.nodes if node.op == "output"]
        self.target: fx.Node = output.args[0]
        self.leaves = {node: self._leaf(node) for node in self.nodes if node.op == "call_module"}
        for node, leaf in self.leaves.items():
            node.meta["leaf"] = leaf
        self.dependent = self._dependent()
        if self.target not in self.dependent:
            raise ValueError(
                f"the output of {type(module).__name__} must depend on its tiles, got {self.target.name!r}, which does "
                "not. HINT: partition the part that returns features of tiles."
            )
        self.barriers: dict[fx.Node, fx.Node] = {}
        for node, leaf in self.leaves.items():
            image = axis == "spatial" and needs_image_statistics(leaf)
            if needs_batch_statistics(leaf) or image:
                self.barriers[node] = node.all_input_nodes[0]

    def _leaf(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _dependent(self) -> set[fx.Node]:
        dependent = {self.source}
        for node in self.nodes:
            if any(parent in dependent for parent in node.all_input_nodes) or node.meta.get("sized"):
                dependent.add(node)
        return dependent

    def _recorded(self, example: Example) -> fx.Graph:
        if needs_batch_statistics(self.module) and is_known_norm(type(self.module)):
            return self._one_norm(example)
        parts = {name: part for name, part in self.module.named_modules()}
        if self.axis == "spatial":
            recording = self._record(example, None)
            self.attributes = [(parts[name], key, value) for (name, key), value in recording.made.items()]
        else:
            recording = self._record(example, FEW)
            other = self._record(example, MORE)
            join(recording, other, type(self.module).__name__)
            self._counts |= {FEW, MORE}
            self.attributes = [
                (parts[name], key, value)
                for (name, key), value in recording.made.items()
                if other.made.get((name, key)) == value and type(other.made[name, key]) is type(value)
            ]
            self.by_tile = {
                node
                for node, value in recording.values.items()
                if isinstance(value, Tensor) and value.dim() and value.shape[0] == FEW
            }
        self.values, self.form = recording.values, recording.form
        return recording.graph

    def require(self, example: Example) -> None:
        """Refuse a module whose operations are others for as many tiles as the example has.

        Raises:
            ValueError: they are.
        """
        tiles = example.shape[0] if example.shape[0] <= NAMED else MANY
        if self.opaque or self.axis == "spatial" or self.form is None or tiles in self._counts:
            return
        if needs_batch_statistics(self.module) and is_known_norm(type(self.module)):
            return
        try:
            whole = self._whole
            other = record(
                self.module,
                self.forward,
                example,
                tiles=tiles,
                is_leaf=lambda part, name: name in whole or is_leaf_of_graph(part, name),
                is_norm=keeps_shape,
            )
        except ForbiddenError:
            raise
        except Exception as error:  # so many tiles are perhaps more than it takes; the call itself will tell
            logger.debug("%s is not recorded for %d tiles: %s", type(self.module).__name__, tiles, error)
        else:
            join(Recording(self.graph, self.values, self.form, {}), other, type(self.module).__name__, tiles)
        self._counts.add(tiles)

    def _one_norm(self, example: Example) -> fx.Graph:
        """A norm is a part of others' graphs, whose forward nobody runs; as the whole module too."""
        graph = _one_operation()
        like = torch.empty(example.shape, dtype=example.dtype, device="meta")
        self.values = {node: like for node in graph.nodes if node.op != "output"}
        self.by_tile = set(self.values)
        self.form = form_of(like, max(1, len(like)), type(self.module).__name__)
        return graph

    def _record(self, example: Example, tiles: int | None) -> Recording:
        """The forward recorded; a sub-module that cannot be looked into stays whole, where no barrier is in it."""
        whole = self._whole

        def is_leaf(part: nn.Module, name: str) -> bool:
            return name in whole or is_leaf_of_graph(part, name)

        while True:
            try:
                return record(self.module, self.forward, example, tiles=tiles, is_leaf=is_leaf, is_norm=keeps_shape)
            except ForbiddenError:
                raise
            except Exception as error:  # a module's Python raises whatever it likes
                # `record` writes it on an error of any class, which Python may have raised before the forward ran.
                stack = getattr(error, "stack", [self.module])
                names = {id(part): name for name, part in self.module.named_modules()}
                part, name = stack[-1], names.get(id(stack[-1]), "")
                if not name or name in whole or self._couples(part):
                    raise ValueError(self._not_recorded(error, part, name)) from error
                whole.add(name)

    def _couples(self, part: nn.Module) -> bool:
        image = self.axis == "spatial"
        return any(needs_batch_statistics(item) or (image and needs_image_statistics(item)) for item in part.modules())

    def _not_recorded(self, error: Exception, part: nn.Module, name: str) -> str:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if isinstance(error, UnrecordedError):
            reason = error.reason
        where = where_it_stopped(error)
        return (
            f"{type(self.module).__name__} must be a graph of operations to be partitioned across train-mode BatchNorm "
            f"or in space, got {reason} in {name!r} ({type(part).__name__})" + (f", {where}" if where else "") + ". "
            "HINT: partition the sub-module that holds the layers, or set its BatchNorm to evaluation mode."
        )


def evaluate(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The value of a node that calls no module."""
    if node.op == "get_attr":
        value: Any = root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    return node.target(*args, **kwargs)  # type: ignore[operator]


def levels(nodes: list[fx.Node], barriers: dict[fx.Node, fx.Node]) -> dict[fx.Node, int]:
    """How many barriers deep each node lies among `nodes`: all nodes of a level need one pass over the chunks.

    A norm whose result is read later only is taken to the later level: its input is stored in any case, and its result
    need not be.
    """
    inside = set(nodes)
    depths: dict[fx.Node, int] = {}
    for node in nodes:
        deepest = max((depths.get(parent, 0) for parent in node.all_input_nodes), default=0)
        depths[node] = deepest + 1 if node in barriers else deepest
    for node in reversed(nodes):
        # What a norm reads must be complete a level before.
        readers = [depths[user] - (user in barriers) for user in node.users if user in inside]
        light = node in barriers or (node.op == "call_module" and len(node.all_input_nodes) == 1)
        if light and readers and not _is_heavy(node):
            depths[node] = max(depths[node], min(readers))
    return depths


def cut_candidates(traced: Traced, tensors: set[fx.Node]) -> list[fx.Node]:
    """Nodes after which their tensor alone is alive, and where storing it pays: at most one per residual block.

    The input of a norm is none: its statistics belong to the segment that reads it.
    """
    last_use = {node: index for index, user in enumerate(traced.nodes) for node in user.all_input_nodes}
    alive: set[fx.Node] = {traced.source}
    single = []
    for index, node in enumerate(traced.nodes):
        if node in traced.dependent:
            alive.add(node)
        alive = {item for item in alive if last_use.get(item, -1) > index}
        whole = node in tensors and (traced.axis == "spatial" or node in traced.by_tile)
        if alive == {node} and whole and node not in traced.barriers.values():
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


def _one_operation() -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.create_node("call_module", ROOT, (graph.placeholder("input"),)))
    return graph


def ancestors(targets: Iterable[fx.Node], stops: set[fx.Node]) -> set[fx.Node]:
    """All nodes that `targets` are computed from, going no further back than `stops`, which are not included."""
    nodes: set[fx.Node] = set()
    waiting = [node for node in targets if node not in stops]
    while waiting:
        node = waiting.pop()
        if node in nodes:
            continue
        nodes.add(node)
        waiting += [parent for parent in node.all_input_nodes if parent not in stops]
    return nodes
