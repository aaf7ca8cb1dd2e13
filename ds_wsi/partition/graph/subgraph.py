"""Part of a graph, computed for one chunk: a run of tiles, or a block of rows with its halos."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from ds_wsi.partition.graph.contexts import is_detached, surroundings_of
from ds_wsi.partition.graph.halo import Conv, Pointwise, Range, Window, convolve, image_of, row_rule
from ds_wsi.partition.graph.norm import Corrected, NormSite, Statistics
from ds_wsi.partition.graph.replay import Random
from ds_wsi.partition.graph.sizes import resolved
from ds_wsi.partition.graph.trace import Traced, ancestors, evaluate
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.hooks import compute_weights, is_plain_convolution, twin
from ds_wsi.partition.module.outputs import form_of, tensors_of

_QUIET = (nn.Conv2d, nn.Linear, nn.ReLU, nn.GELU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.LayerNorm, nn.GroupNorm)
_QUIET_FUNCTIONS = {
    "add", "sub", "mul", "div", "getitem", "cat", "flatten", "relu", "gelu", "silu", "linear", "matmul", "conv2d",
    "pad", "reshape", "view", "permute", "transpose", "unsqueeze", "squeeze", "mean", "softmax", "layer_norm",
}  # fmt: skip


class Subgraph:
    """The operations between known values and wanted ones.

    Args:
        traced: the graph.
        sources: nodes whose values are known.
        targets: nodes whose values are wanted.
        sites: the norms with population statistics, by their nodes.
        rules: how operations are computed in rows, by their nodes; None for tiles.
    """

    def __init__(
        self,
        traced: Traced,
        sources: Iterable[fx.Node],
        targets: Iterable[fx.Node],
        sites: dict[fx.Node, NormSite],
        rules: dict[fx.Node, Pointwise | Window] | None,
        heights: dict[fx.Node, int],
    ) -> None:
        self.traced, self.sites, self.rules, self.heights = traced, sites, rules, heights
        self.targets = list(targets)
        available = set(sources)
        computed = ancestors(self.targets, available)
        self.nodes = [node for node in traced.nodes if node in computed]
        read = {parent for node in self.nodes for parent in node.all_input_nodes}
        self.sources = [node for node in (traced.source, *traced.nodes) if node in available and node in read]
        # A target that is a source too: passed through.
        self.sources += [node for node in self.targets if node in available and node not in self.sources]
        self.constants = [node for node in traced.arguments if node in read]
        self._dead_after = self._last_uses()
        self._leaves = {node: self._safe_leaf(node) for node in self.nodes if node in traced.leaves}
        self.parameters = self._parameters()
        self.barriers = [node for node in self.nodes if node in sites]
        users = {node: [user for user in node.users if user in computed] for node in self.nodes}
        self._deferrable = {
            node
            for node in self.targets
            if not users.get(node) and isinstance(self._leaves.get(node), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        }

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for parent in node.all_input_nodes:
                last[parent] = node
        dead: dict[fx.Node, list[fx.Node]] = {}
        for value, node in last.items():
            if value not in self.targets:
                dead.setdefault(node, []).append(value)
        return dead

    def _safe_leaf(self, node: fx.Node) -> nn.Module:
        """The node's module; a copy that does not work in place, where its input is read again."""
        leaf = self.traced.leaves[node]
        if not getattr(leaf, "inplace", False):
            return leaf
        (value,) = node.all_input_nodes
        alone = value.meta.get("fresh") and len(value.users) == 1
        if alone and value not in self.sources and value not in self.targets:
            return leaf
        out_of_place = twin(leaf)
        out_of_place.inplace = False
        return out_of_place

    def _parameters(self) -> list[nn.Parameter]:
        parameters: dict[int, nn.Parameter] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                value = evaluate(self.traced.module, node, (), {})
                held = [value] if isinstance(value, nn.Parameter) else []
            elif node in self.sites and self.sites[node].batch:
                held = []  # gamma and beta: by reduction
            else:
                held = list(self._leaves[node].parameters()) if node in self._leaves else []
            parameters.update((id(parameter), parameter) for parameter in held)
        return list(parameters.values())

    def rows(self, owned: dict[fx.Node, Range]) -> dict[fx.Node, Range]:
        """The rows of every value that a chunk computes: what it owns, and what that is computed from."""
        assert self.rules is not None
        needed = dict(owned)
        for node in reversed(self.nodes):
            if node not in needed:
                continue
            rule = self.rules.get(node)
            if rule is None:
                continue  # not an image
            read = rule.needs(needed[node])
            for parent in node.all_input_nodes:
                if parent in self.heights:
                    needed[parent] = hull(needed[parent], read) if parent in needed else read
        return needed

    def run(
        self,
        values: dict[fx.Node, Any],
        statistics: dict[fx.Node, Statistics],
        random: Random,
        chunk: Any,
        tiles: int,
        arguments: Arguments,
        *,
        needed: dict[fx.Node, Range] | None = None,
        corrected: dict[fx.Node, Range | None] | None = None,
        known: dict[fx.Node, Tensor] | None = None,
    ) -> dict[fx.Node, Tensor]:
        """The targets' values for one chunk.

        Args:
            values: the sources' values: the chunk's tiles, or the rows `needed` of them. Emptied as they are used.
            statistics: the statistics of the norms.
            random: the call's random numbers; `chunk` names this chunk among them.
            tiles: the number of the chunk's tiles.
            arguments: what the call has beside the tiles.
            needed: the rows of every value, from `rows`; None for tiles.
            corrected: norms whose input's gradient is corrected inside the graph, with the rows that this chunk owns.
            known: results of final convolutions that need not be computed again.
        """
        tensors = arguments.tensors if self.constants else {}
        values.update((node, tensors[self.traced.arguments[node]]) for node in self.constants)
        for node in self.nodes:
            with surroundings_of(node):
                if node in self.sites:
                    values[node] = self._normed(node, values, statistics[node], needed, corrected)
                elif self.rules is not None and isinstance(self.rules.get(node), Window):
                    values[node] = self._window(node, values, needed, known)
                else:
                    args = fx.map_arg(node.args, lambda item: self._input(node, item, values, needed))  # noqa: B023
                    kwargs = fx.map_arg(node.kwargs, lambda item: self._input(node, item, values, needed))  # noqa: B023
                    if node.meta.get("sized"):
                        args, kwargs = resolved(args, tiles), resolved(kwargs, tiles)
                    if known is not None and node in known and self._defers(node):
                        leaf: Any = self._leaves[node]
                        values[node] = self._deferred(leaf, args[0], known[node])
                    elif self._is_quiet(node):
                        values[node] = self._compute(node, args, kwargs, tiles, arguments)
                    else:
                        # What does not depend on the tiles is drawn once per call, for all chunks.
                        values[node] = random.call(
                            (node, chunk if node in self.traced.dependent else None),
                            lambda: self._compute(node, args, kwargs, tiles, arguments),  # noqa: B023
                        )
            for dead in self._dead_after.get(node, ()):
                del values[dead]
        return {node: values[node] for node in self.targets}

    def _defers(self, node: fx.Node) -> bool:
        """Whether backward needs no result of the node's convolution; hooks may be set at any time."""
        deferrable = node in self._deferrable and not is_detached(node)
        return deferrable and is_plain_convolution(self._leaves[node])

    def _compute(self, node: fx.Node, args: Any, kwargs: Any, tiles: int, arguments: Arguments) -> Any:
        if node not in self._leaves:
            return evaluate(self.traced.module, node, args, kwargs)
        leaf = self._leaves[node]
        if leaf is self.traced.module:
            return self._whole(args[0], tiles, arguments)
        if not node.meta.get("writes") or hasattr(leaf, "inplace"):
            return leaf(*args, **kwargs)
        args = fx.node.map_aggregate(args, lambda item: item.clone() if isinstance(item, Tensor) else item)
        out = leaf(*args, **kwargs)
        return args[0] if out is None else out

    def _whole(self, tiles: Tensor, count: int, arguments: Arguments) -> Tensor:
        """A module that is one operation: its output as one tensor, in the form that its first chunk had."""
        traced = self.traced
        compute_weights(traced.module, tiles)
        out = arguments.call(traced.forward, tiles)
        rows = None if traced.form is None or not traced.form.is_plain else traced.form.leaves[0].shape
        if rows is not None and isinstance(out, Tensor) and out.shape == (count, *rows):
            return out
        form = form_of(out, count, type(traced.module).__name__)
        if traced.form is None:
            traced.form = form
        elif form != traced.form:
            raise ValueError(
                f"the output of {type(traced.module).__name__} must have tiles on its first axis and be the same "
                f"otherwise, got {form.words} for {count} tiles, and {traced.form.words} for others. "
                "HINT: partition the part that returns features of tiles."
            )
        return form.pack(tensors_of(out)) if not form.is_plain else out

    def _is_quiet(self, node: fx.Node) -> bool:
        """Whether the operation is known to draw no random number."""
        if node in self._leaves:
            # A subclass, a forward of its own or a parametrization may draw.
            leaf = self._leaves[node]
            return type(leaf) in _QUIET and "forward" not in leaf.__dict__
        return getattr(node.target, "__name__", "") in _QUIET_FUNCTIONS or node.op == "get_attr"

    def _input(
        self, node: fx.Node, parent: fx.Node, values: dict[fx.Node, Any], needed: dict[fx.Node, Range] | None
    ) -> Any:
        value = values[parent]
        if needed is None or parent not in self.heights:
            return value
        assert self.rules is not None
        return _crop(value, needed[parent], self.rules[node].needs(needed[node]))

    def _normed(
        self,
        node: fx.Node,
        values: dict[fx.Node, Any],
        statistics: Statistics,
        needed: dict[fx.Node, Range] | None,
        corrected: dict[fx.Node, Range | None] | None,
    ) -> Tensor:
        """A norm's output by its population's statistics; see `run` of the gradient that is corrected."""
        site, parent = self.sites[node], node.all_input_nodes[0]
        z = self._input(node, parent, values, needed)
        if corrected is not None and node in corrected:
            owned = corrected[node]
            if owned is not None and needed is not None:
                start = needed[parent][0]
                z_rows = Corrected.apply(values[parent], site, statistics, (owned[0] - start, owned[1] - start))
                first, last = needed[node]
                z = z_rows[:, :, first - start : last - start]
            else:
                z = Corrected.apply(z, site, statistics, None)
        return site.apply(z, statistics)

    def _window(
        self,
        node: fx.Node,
        values: dict[fx.Node, Any],
        needed: dict[fx.Node, Range] | None,
        results: dict[fx.Node, Tensor] | None,
    ) -> Tensor:
        assert needed is not None
        assert self.rules is not None
        rule: Any = self.rules[node]
        image = self._input(node, node.all_input_nodes[0], values, needed)
        result = results.get(node) if results is not None and self._defers(node) else None
        if isinstance(rule, Conv):
            return rule(image, needed[node], result)
        return rule(image, needed[node])

    def _deferred(self, leaf: Any, image: Tensor, like: Tensor) -> Tensor:
        if isinstance(leaf.padding, str) or leaf.padding_mode != "zeros":
            return leaf(image)
        return convolve(image, leaf, leaf.padding, like)


def image_rules(traced: Traced) -> tuple[dict[fx.Node, Pointwise | Window], dict[str, str]]:
    """The rule of every operation on images, and why the others have none (by the operation's name)."""
    rules: dict[fx.Node, Pointwise | Window] = {}
    refused = {}
    for node in traced.nodes:
        if node not in traced.dependent:
            continue
        if not isinstance(image_of(traced.values[node]), Tensor):
            refused[node.name] = f"{node.name}: it returns several tensors"
            continue
        node.meta["several"] = not isinstance(traced.values[node], Tensor)
        rule = row_rule(node, traced.leaves.get(node), traced.values, traced.dependent)
        if isinstance(rule, str):
            kind = f" ({type(traced.leaves[node]).__name__})" if node in traced.leaves else ""
            refused[node.name] = f"{node.target if node in traced.leaves else node.name}{kind}: {rule}"
        else:
            rules[node] = rule
    return rules, refused


def hull(one: Range, other: Range) -> Range:
    """The smallest range that holds both; an empty range adds nothing."""
    if one[0] >= one[1]:
        return other
    if other[0] >= other[1]:
        return one
    return min(one[0], other[0]), max(one[1], other[1])


def _crop(value: Any, has: Range, needed: Range) -> Any:
    if has == needed:
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_crop(item, has, needed) for item in value)
    return value[:, :, needed[0] - has[0] : needed[1] - has[0]]
