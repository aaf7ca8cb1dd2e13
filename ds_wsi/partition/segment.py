"""Part of a graph, computed for one chunk: a run of tiles, or a block of rows with its halos."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ds_wsi.partition.halo import Conv, Pointwise, Range, Window, convolve, row_rule
from ds_wsi.partition.hooks import compute_weights, is_plain_convolution, twin
from ds_wsi.partition.norm import Corrected, NormSite, Statistics
from ds_wsi.partition.trace import Traced, ancestors, evaluate
from ds_wsi.runtime.seeding import generator_states, set_generator_states

_QUIET = (nn.Conv2d, nn.Linear, nn.ReLU, nn.GELU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.LayerNorm, nn.GroupNorm)
_QUIET_FUNCTIONS = {"add", "mul", "getattr", "getitem", "cat", "flatten", "relu", "iadd"}


class Random:
    """Random numbers of each operation and chunk: drawn once, drawn again in every replay.

    Only operations that were seen to move a generator are recorded: 5 kB each on a CPU.
    """

    def __init__(self, device: torch.device, *, replayable: bool = True) -> None:
        self.device, self.replayable = device, replayable
        self.states: dict[Any, list[Tensor]] = {}
        self.quiet: set[Any] = set()

    def read(self) -> list[Tensor]:
        """The states of the generators that an operation could draw from."""
        return generator_states(self.device)

    def write(self, states: list[Tensor]) -> None:
        """Set them."""
        set_generator_states(states, self.device)

    def call(self, key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()` with the random numbers that it drew the first time it was called under `key`."""
        if not self.replayable or key in self.quiet:
            return compute()
        if key in self.states:
            ambient = self.read()
            self.write(self.states[key])
            try:
                return compute()
            finally:
                self.write(ambient)
        before = self.read()
        out = compute()
        if all(map(torch.equal, before, self.read())):
            self.quiet.add(key)
        else:
            self.states[key] = before
        return out


class Subgraph:
    """The operations between known values and wanted ones.

    Args:
        traced: the graph.
        sources: nodes whose values are known.
        targets: nodes whose values are wanted.
        sites: of the norms with population statistics.
        rules: of the operations in rows; None for tiles.
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
        known = set(sources)
        wanted = ancestors(self.targets, known)
        self.nodes = [node for node in traced.nodes if node in wanted]
        read = {parent for node in self.nodes for parent in node.all_input_nodes}
        self.sources = [node for node in (traced.source, *traced.nodes) if node in known and node in read]
        # A wanted value that is known: passed through.
        self.sources += [node for node in self.targets if node in known and node not in self.sources]
        self._dead_after = self._last_uses()
        self._leaves = {node: self._safe_leaf(node) for node in self.nodes if node in traced.leaves}
        self.parameters = self._parameters()
        self.barriers = [node for node in self.nodes if node in sites]
        users = {node: [user for user in node.users if user in wanted] for node in self.nodes}
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
        if value not in self.sources and value not in self.targets and len(value.users) == 1:
            return leaf
        out_of_place = twin(leaf)
        out_of_place.inplace = False
        return out_of_place

    def _parameters(self) -> list[nn.Parameter]:
        found: dict[int, nn.Parameter] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                value = evaluate(self.traced.module, node, (), {})
                held = [value] if isinstance(value, nn.Parameter) else []
            elif node in self.sites and self.sites[node].batch:
                held = []  # gamma and beta: by reduction
            else:
                held = list(self._leaves[node].parameters()) if node in self._leaves else []
            found.update((id(parameter), parameter) for parameter in held)
        return list(found.values())

    def rows(self, own: dict[fx.Node, Range]) -> dict[fx.Node, Range]:
        """The rows of every value that a chunk computes: what it owns, and what that is computed from."""
        assert self.rules is not None
        needed = dict(own)
        for node in reversed(self.nodes):
            if node not in needed:
                continue
            rule = self.rules.get(node)
            if rule is None:
                continue  # not an image
            wanted = rule.needs(needed[node])
            for parent in node.all_input_nodes:
                if parent in self.heights:
                    needed[parent] = hull(needed[parent], wanted) if parent in needed else wanted
        return needed

    def run(
        self,
        values: dict[fx.Node, Any],
        statistics: dict[fx.Node, Statistics],
        random: Random,
        chunk: Any,
        *,
        needed: dict[fx.Node, Range] | None = None,
        corrected: dict[fx.Node, Range | None] | None = None,
        known: dict[fx.Node, Tensor] | None = None,
    ) -> dict[fx.Node, Tensor]:
        """The targets' values for one chunk.

        Args:
            values: of the sources: the chunk's tiles, or the rows `needed` of them. Emptied as they are used.
            statistics: of the norms.
            random: the call's random numbers; `chunk` names this chunk among them.
            needed: rows of every value, of `rows`; None for tiles.
            corrected: norms whose input's gradient is corrected inside the graph, with the rows that this chunk owns.
            known: results of final convolutions that need not be computed again.
        """
        root = self.traced.module
        for node in self.nodes:
            if node in self.sites:
                z = self._input(node, node.all_input_nodes[0], values, needed)
                if corrected is not None and node in corrected:
                    own = corrected[node]
                    if own is not None and needed is not None:
                        start = needed[node.all_input_nodes[0]][0]
                        z_rows = values[node.all_input_nodes[0]]
                        z_rows = Corrected.apply(
                            z_rows, self.sites[node], statistics[node], (own[0] - start, own[1] - start)
                        )
                        first, last = needed[node]
                        z = z_rows[:, :, first - start : last - start]
                    else:
                        z = Corrected.apply(z, self.sites[node], statistics[node], None)
                values[node] = self.sites[node].apply(z, statistics[node])
            elif self.rules is not None and isinstance(self.rules.get(node), Window):
                values[node] = self._window(node, values, needed, known)
            else:
                args = fx.map_arg(node.args, lambda item: self._input(node, item, values, needed))  # noqa: B023
                kwargs = fx.map_arg(node.kwargs, lambda item: self._input(node, item, values, needed))  # noqa: B023
                if known is not None and node in known and self._defers(node):
                    leaf: Any = self._leaves[node]
                    values[node] = self._deferred(leaf, args[0], known[node])
                elif self._is_quiet(node):
                    values[node] = self._compute(root, node, args, kwargs)
                else:
                    values[node] = random.call(
                        (node, chunk),
                        lambda: self._compute(root, node, args, kwargs),  # noqa: B023
                    )
            for dead in self._dead_after.get(node, ()):
                del values[dead]
        return {node: values[node] for node in self.targets}

    def _defers(self, node: fx.Node) -> bool:
        """Whether backward needs no result of the node's convolution; hooks may be set at any time."""
        return node in self._deferrable and is_plain_convolution(self._leaves[node])

    def _compute(self, root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node not in self._leaves:
            return evaluate(root, node, args, kwargs)
        if self._leaves[node] is root:
            compute_weights(root, *args)
            return self.traced.forward(*args, **kwargs)
        return self._leaves[node](*args, **kwargs)

    def _is_quiet(self, node: fx.Node) -> bool:
        """Whether the operation is known to draw no random number."""
        if node in self._leaves:
            return isinstance(self._leaves[node], _QUIET)
        return getattr(node.target, "__name__", "") in _QUIET_FUNCTIONS or node.op == "get_attr"

    def _input(
        self, node: fx.Node, parent: fx.Node, values: dict[fx.Node, Any], needed: dict[fx.Node, Range] | None
    ) -> Any:
        value = values[parent]
        if needed is None or parent not in self.heights:
            return value
        assert self.rules is not None
        return _crop(value, needed[parent], self.rules[node].needs(needed[node]))

    def _window(
        self,
        node: fx.Node,
        values: dict[fx.Node, Any],
        needed: dict[fx.Node, Range] | None,
        known: dict[fx.Node, Tensor] | None,
    ) -> Tensor:
        assert needed is not None
        assert self.rules is not None
        rule: Any = self.rules[node]
        image = self._input(node, node.all_input_nodes[0], values, needed)
        result = known.get(node) if known is not None and self._defers(node) else None
        if isinstance(rule, Conv):
            return rule(image, needed[node], result)
        return rule(image, needed[node])

    def _deferred(self, leaf: Any, image: Tensor, known: Tensor) -> Tensor:
        if isinstance(leaf.padding, str) or leaf.padding_mode != "zeros":
            return leaf(image)
        return convolve(image, leaf, leaf.padding, known)


def image_rules(traced: Traced, values: dict[fx.Node, Any]) -> tuple[dict[fx.Node, Pointwise | Window], dict[str, str]]:
    """The rule of every operation on images, and why the others have none (by the operation's name)."""
    rules: dict[fx.Node, Pointwise | Window] = {}
    refused = {}
    for node in traced.nodes:
        if node.op == "get_attr":
            continue
        if not isinstance(values[node], Tensor):
            refused[node.name] = f"{node.name}: it reads the image's size"
            continue
        rule = row_rule(node, traced.leaves.get(node), values)
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


def _crop(value: Tensor, has: Range, wanted: Range) -> Tensor:
    return value if has == wanted else value[:, :, wanted[0] - has[0] : wanted[1] - has[0]]
