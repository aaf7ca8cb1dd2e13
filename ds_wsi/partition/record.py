"""A module's forward as a graph of operations: it is run on tensors without numbers, and what it calls is recorded.

Python sees real sizes and flags: conditions on them, assertions, keyword arguments and outputs of any kind work.
What an operation writes in place is recorded as a new value, and every later reader of the tensor, or of a view of it,
reads the new one. Building blocks (torch's own modules, norms) stay whole.
"""

import inspect
import operator
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import node as fx_node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from ds_wsi.partition.arguments import Arguments
from ds_wsi.partition.hooks import is_compiled, uncompiled
from ds_wsi.partition.identity import plain_attributes
from ds_wsi.partition.observed import version_of
from ds_wsi.partition.outputs import OutputForm, form_of
from ds_wsi.partition.restored import (
    containers_of,
    foreign_generators,
    mark,
    own_generators,
    refill,
)
from ds_wsi.partition.surroundings import undisturbed
from ds_wsi.runtime.numerics import autocast_dtype

_PURE = {  # in place -> the operation that returns a new tensor
    name + "_": getattr(Tensor, name)
    for name in (
        "add", "sub", "mul", "div", "pow", "neg", "exp", "abs", "sqrt", "rsqrt", "relu", "sigmoid", "tanh", "clamp",
        "clamp_min", "clamp_max", "masked_fill",
    )
}  # fmt: skip
map_aggregate: Any = fx_node.map_aggregate  # whose types know no tensors and no places
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_running = threading.RLock()  # `nn.Module.__call__` is replaced while a forward is recorded: one at a time


@dataclass(frozen=True)
class Example:
    """What a module is recorded with.

    Args:
        shape: of the tiles [N, ...]; on the spatial axis of the images, and kept; else N does not matter.
        dtype, device: of the tiles.
        arguments: beside them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    arguments: Arguments = field(default_factory=Arguments)


@dataclass(frozen=True)
class Here:
    """In the arguments of a view: the tensor that it is a view of."""


class Written:
    """An operation that works in place, as one that returns what its argument then holds.

    Args:
        function: that writes.
        place: of the written tensor: an index of the arguments, or the name of a keyword.
    """

    def __init__(self, function: Callable[..., Any], place: int | str) -> None:
        self.function, self.place = function, place
        self.__name__ = _name(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The written tensor's new value."""
        if isinstance(self.place, str):
            written = kwargs[self.place].clone()
            kwargs = {**kwargs, self.place: written}
        else:
            written = args[self.place].clone()
            args = (*args[: self.place], written, *args[self.place + 1 :])
        self.function(*args, **kwargs)
        return written


class ThroughView:
    """A tensor after one of its views has got another value.

    Args:
        hops: functions from the tensor to the view, one after the other.
    """

    def __init__(self, hops: tuple[Callable[..., Any], ...]) -> None:
        self.hops = hops
        self.__name__ = "through_view"

    def __call__(self, base: Tensor, value: Tensor, arguments: Sequence[tuple[Any, Any]]) -> Tensor:
        """`base` with `value` in the place of the view; `arguments` of each hop hold `Here` for the tensor."""
        result = view = base.clone()
        for hop, (args, kwargs) in zip(self.hops, arguments, strict=True):
            view = hop(*_in_place_of_here(args, view), **_in_place_of_here(kwargs, view))
        if view.untyped_storage()._cdata != result.untyped_storage()._cdata:
            raise RuntimeError("a view that is written must be a view in every chunk, got a copy of its base")
        view.copy_(value)
        return result


class UnrecordedError(Exception):
    """What was called cannot be recorded; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ForbiddenError(ValueError):
    """The module does what no partition may do: a sentence for its user."""


@dataclass(frozen=True)
class Recording:
    """A recorded forward.

    Attributes:
        graph: with a placeholder for the tiles, and one for each tensor beside them, with `meta["place"]`.
        values: of every node: tensors without numbers, or what the operation returned.
        form: of the output; the graph's own output is the joint tensor.
    """

    graph: fx.Graph
    values: dict[fx.Node, Any]
    form: OutputForm


@dataclass
class _Storage:
    root: "_Held"
    epoch: int = 0


@dataclass
class _Held:
    """A tensor of the recorded run.

    Attributes:
        node: of its value as of `epoch` of its storage.
        parent, hop: that it is a view of, and by which operation; None for the first tensor of a storage.
        fixed: why it must not be written, "" where it may.
        owner: of a parameter or buffer, the sub-module; None for the one that is running.
    """

    tensor: Tensor
    node: fx.Node
    storage: _Storage
    epoch: int
    parent: "_Held | None" = None
    hop: tuple[Callable[..., Any], Any, Any] | None = None
    fixed: str = ""
    owner: str | None = None


class _Recorder(TorchFunctionMode):
    def __init__(
        self, module: nn.Module, is_leaf: Callable[[nn.Module, str], bool], is_norm: Callable[..., bool]
    ) -> None:
        super().__init__()
        self.module, self.is_leaf, self.is_norm = module, is_leaf, is_norm
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.names = {id(part): name for name, part in module.named_modules(remove_duplicate=False)}
        self.state: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in (*_attributes(module), *module.named_buffers(), *module.named_parameters()):
            self.state.setdefault(id(tensor), (name, tensor))
        self.held: dict[int, _Held] = {}
        self.storages: dict[int, _Storage] = {}
        self.stack: list[nn.Module] = [module]
        self.pretends: FakeTensorMode | None = None  # in which tensors with numbers are used without them
        self.twins: dict[int, Tensor] = {}  # of each parameter, buffer and attribute
        self.paused = False
        self.thread = threading.get_ident()

    # ------------------------------------------------------------------------------------------ what is called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or threading.get_ident() != self.thread:
            return func(*args, **kwargs)
        return self._record(func, args, kwargs, lambda: func(*args, **kwargs))

    def call_module(self, call: Callable[..., Any], leaf: nn.Module, args: Any, kwargs: Any) -> Any:
        """A sub-module's call: whole where it is a leaf, else what its forward calls."""
        if is_compiled(leaf):  # recorded as it was: chunks are compiled by a policy's `compile`
            return self.call_module(call, uncompiled(leaf), args, kwargs)
        if leaf._compiled_call_impl is not None:
            call = type(leaf)._call_impl
        name = self.names.get(id(leaf))
        if self.paused or name is None or threading.get_ident() != self.thread:
            return call(leaf, *args, **kwargs)
        if not self.is_leaf(leaf, name):
            self.stack.append(leaf)
            out = call(leaf, *args, **kwargs)
            self.stack.pop()  # not where it raised: the innermost is asked for then
            return out
        self.stack.append(leaf)
        out = self._record(name, args, kwargs, lambda: self._leaf_values(call, leaf, args, kwargs))
        self.stack.pop()
        return out

    def _leaf_values(self, call: Callable[..., Any], leaf: nn.Module, args: Any, kwargs: Any) -> Any:
        self.paused = True
        try:
            if self.is_norm(leaf):  # its forward would count batches, or refuse what is not on a GPU
                return torch.empty_like(args[0])
            return call(leaf, *args, **kwargs)
        finally:
            self.paused = False

    def make_twins(self) -> None:
        """Put parameters and buffers without their numbers into the module, until `_untouched` ends.

        The mode would compute with those that have some: a cast of a weight, say, on the device.
        """
        if self.pretends is None:
            return
        for key, (name, tensor) in list(self.state.items()):
            if not isinstance(tensor, FakeTensor):
                self.twins[key] = twin = self.pretends.from_tensor(tensor)
                self.state[id(twin)] = name, twin
        for part in self.module.modules():
            for table in (part._parameters, part._buffers):
                table.update((name, self.twins[id(item)]) for name, item in table.items() if id(item) in self.twins)  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------- how it is held

    def _record(self, target: Any, args: Any, kwargs: Any, compute: Callable[[], Any]) -> Any:
        if any(isinstance(leaf, torch.Generator) for leaf in pytree.tree_leaves((args, kwargs))):
            raise ForbiddenError(self._in_module("must draw from torch's default generators, got one of its own"))
        before = [(tensor, version_of(tensor)) for tensor in _tensors((args, kwargs))]
        result = compute()
        written = {id(tensor): tensor for tensor, version in before if version_of(tensor) != version}
        found = _tensors(result)
        if not found and not written:
            return result
        if not written and all(any(tensor is known for known, _ in before) for tensor in found):
            return result  # the argument itself
        if len(written) > 1:  # views of one memory count its changes together
            first = args[0] if args and isinstance(args[0], Tensor) else None
            memories = {tensor.untyped_storage()._cdata for tensor in written.values()}
            if first is None or id(first) not in written or len(memories) > 1:
                raise UnrecordedError(f"{_name(target)} writes several tensors in place")
            written = {id(first): first}
        node_args, node_kwargs = self._nodes(args), self._nodes(kwargs)
        if not written:
            self._new_values(self._node(target, node_args, node_kwargs), result, target, args, kwargs)
            return result
        (changed,) = written.values()
        if any(tensor is not changed for tensor in found):
            raise UnrecordedError(f"{_name(target)} writes a tensor in place and returns another")
        self._write(changed, self._write_node(target, changed, args, kwargs, node_args, node_kwargs))
        return result

    def _write_node(
        self, target: Any, changed: Tensor, args: Any, kwargs: Any, node_args: Any, node_kwargs: Any
    ) -> fx.Node:
        if isinstance(target, str):
            node = self._node(target, node_args, node_kwargs)
            node.meta["writes"] = True
            return node
        name = _name(target)
        if name in _PURE and changed is args[0]:
            others = _tensors((args[1:], kwargs))
            if all(torch.promote_types(other.dtype, changed.dtype) == changed.dtype for other in others):
                target = _PURE[name]
                return self._node(target, node_args, node_kwargs)
        if node_kwargs.get("inplace") is True and changed is args[0]:
            return self._node(target, node_args, {**node_kwargs, "inplace": False})
        places = [index for index, item in enumerate(args) if item is changed]
        place: int | str | None = places[0] if places else None
        if place is None:
            place = next((key for key, item in kwargs.items() if item is changed), None)
        if place is None:
            raise UnrecordedError(f"{name} writes a tensor inside a list")
        return self._node(Written(target, place), node_args, node_kwargs)

    def _write(self, changed: Tensor, node: fx.Node) -> None:
        """`changed` holds `node`'s value from now on, and with it every view of the same memory."""
        held = self.held[id(changed)]
        if held.storage.root.fixed:
            raise ForbiddenError(self._in_module(held.storage.root.fixed, held.storage.root.owner))
        self.values[node] = changed
        storage, root = held.storage, held.storage.root
        base = self._node_of(root)
        storage.epoch += 1
        held.node, held.epoch = node, storage.epoch
        if held is root:
            return
        hops = []
        view = held
        while view.parent is not None:
            assert view.hop is not None
            hops.append(view.hop)
            view = view.parent
        hops.reverse()
        arguments = tuple((args, kwargs) for _, args, kwargs in hops)
        functions = tuple(self.module.get_submodule(hop) if isinstance(hop, str) else hop for hop, _, _ in hops)
        root.node = self._node(ThroughView(functions), (base, node, arguments), {})
        self.values[root.node] = root.tensor
        root.epoch = storage.epoch

    def _new_values(self, node: fx.Node, result: Any, target: Any, args: Any, kwargs: Any) -> None:
        self.values[node] = result
        if isinstance(result, Tensor):
            self._hold(result, node, target, args, kwargs)
            return
        if isinstance(result, (tuple, list)):
            items = list(enumerate(result))
        elif isinstance(result, dict):
            items = list(result.items())
        else:
            raise UnrecordedError(f"{_name(target)} returns a {type(result).__name__}")
        for key, item in items:
            if not _tensors(item):
                continue
            part = self._node(operator.getitem, (node, key), {})
            self._new_values(part, item, _Item(target, key), args, kwargs)

    def _hold(self, tensor: Tensor, node: fx.Node, target: Any, args: Any, kwargs: Any) -> None:
        if id(tensor) in self.held:  # a leaf that returns one of its earlier results
            return
        key = tensor.untyped_storage()._cdata
        storage = self.storages.get(key)
        if storage is None:
            held = _Held(tensor, node, None, 0)  # type: ignore[arg-type]
            held.storage = self.storages[key] = _Storage(held)
            self.held[id(tensor)] = held
            node.meta["fresh"] = True
            return
        parents = [self.held[id(item)] for item in _tensors((args, kwargs)) if id(item) in self.held]
        parent = next((item for item in parents if item.storage is storage), None)
        if parent is None:
            # A view made where nobody looked: it can be read, and must not be written, nor its base.
            held = _Held(tensor, node, storage, storage.epoch)
            storage.root.fixed = storage.root.fixed or "must not write a tensor that shares its memory unseen"
        else:
            hop_args, hop_kwargs = (
                map_aggregate(item, lambda leaf: Here() if leaf is parent.tensor else self._leaf(leaf))
                for item in (tuple(args), dict(kwargs))
            )
            held = _Held(tensor, node, storage, storage.epoch, parent, (target, hop_args, hop_kwargs))
        self.held[id(tensor)] = held

    def source(self, tensor: Tensor, name: str, fixed: str, place: str | None = None) -> fx.Node:
        """A placeholder."""
        node = self.graph.placeholder(name)
        node.meta["place"] = place
        self.values[node] = tensor
        held = _Held(tensor, node, None, 0, fixed=fixed)  # type: ignore[arg-type]
        held.storage = self.storages[tensor.untyped_storage()._cdata] = _Storage(held)
        self.held[id(tensor)] = held
        return node

    # ------------------------------------------------------------------------------------------------- nodes

    def _nodes(self, arguments: Any) -> Any:
        return map_aggregate(tuple(arguments) if isinstance(arguments, (list, tuple)) else dict(arguments), self._leaf)

    def _leaf(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        held = self.held.get(id(item))
        return self._outside(item) if held is None else self._node_of(held)

    def _node_of(self, held: _Held) -> fx.Node:
        """The node of a tensor's present value: a view of what was written since is taken anew."""
        if held.epoch == held.storage.epoch or held.parent is None:
            return held.node
        assert held.hop is not None
        function, args, kwargs = held.hop
        parent = self._node_of(held.parent)
        args, kwargs = (_in_place_of_here(item, parent) for item in (args, kwargs))
        held.node, held.epoch = self._node(function, args, kwargs), held.storage.epoch
        self.values[held.node] = held.tensor
        return held.node

    def _outside(self, tensor: Tensor) -> Any:
        """A tensor that no recorded operation made: a parameter, a buffer, an attribute, or a constant."""
        known = self.state.get(id(tensor))
        if known is not None:
            node = self.graph.create_node("get_attr", known[0])
            node.meta["module"] = self._where()
            self.values[node] = tensor
            owner, _, key = known[0].rpartition(".")
            what = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            held = _Held(tensor, node, None, 0)  # type: ignore[arg-type]
            held.fixed, held.owner = f"must not write its {what} {key!r} in forward", owner
            keys = [tensor.untyped_storage()._cdata]
            if id(tensor) in self.twins:  # what its views are views of
                keys.append(self.twins[id(tensor)].untyped_storage()._cdata)
            held.storage = next((self.storages[key] for key in keys if key in self.storages), None) or _Storage(held)
            self.storages.update(dict.fromkeys(keys, held.storage))
            self.held[id(tensor)] = held
            return node
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            raise UnrecordedError("a tensor is made by what torch does not show (an autograd.Function, say)")
        return tensor  # a constant of the module's Python

    def _node(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        if isinstance(target, str):
            node = self.graph.create_node("call_module", target, args, kwargs)
        else:
            node = self.graph.create_node("call_function", target, args, kwargs, name=_name(target).strip("_") or None)
        node.meta["module"] = self._where()
        return node

    def _where(self) -> str:
        return self.names.get(id(self.stack[-1]), "")

    def _in_module(self, sentence: str, name: str | None = None) -> str:
        name = self._where() if name is None else name
        kind = type(self.module.get_submodule(name)).__name__
        return f"{name!r} ({kind}) {sentence}. HINT: keep it out of the partition."


class _Item:
    """One of an operation's results."""

    def __init__(self, function: Any, key: Any) -> None:
        self.function, self.key, self.__name__ = function, key, "getitem"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)[self.key]


def record(
    module: nn.Module,
    forward: Callable[..., Any],
    example: Example,
    *,
    tiles: int | None,
    is_leaf: Callable[[nn.Module, str], bool],
    is_norm: Callable[[nn.Module], bool],
) -> Recording:
    """One run of `forward` on tensors without numbers.

    Args:
        module: whose forward it is; nothing of it is changed.
        forward: its own.
        example: of its input.
        tiles: to run with in place of the example's; None for the example's.
        is_leaf: whether a sub-module, with its name, stays one operation.
        is_norm: whether a leaf returns what it is given, in shape, and is not to be run.

    Raises:
        ForbiddenError: the forward writes its input or a buffer, changes an attribute, or draws from another generator.
        UnrecordedError, or whatever the forward raises: with `stack`, the modules that it was in.
    """
    recorder = _Recorder(module, is_leaf, is_norm)
    shape = example.shape if tiles is None else (tiles, *example.shape[1:])
    with _running, ExitStack() as stack:
        stack.enter_context(_untouched(module))
        stack.enter_context(undisturbed())
        modes = _get_current_dispatch_mode_stack()
        if not any(isinstance(mode, FakeTensorMode) for mode in modes) and example.device.type != "meta":
            stack.enter_context(_disable_current_modes())  # a meter would count what takes no memory
            modes = []
        recorder.pretends = next((mode for mode in modes if isinstance(mode, FakeTensorMode)), None)
        if recorder.pretends is None and example.device.type != "meta":
            recorder.pretends = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        recorder.make_twins()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        kind = example.device.type if example.device.type != "meta" else "cpu"
        cast = autocast_dtype(torch.device(kind))
        if cast is not None:  # without the cache: it would keep tensors without numbers for those who come after
            stack.enter_context(torch.autocast(kind, dtype=cast, cache_enabled=False))
        x = torch.empty(shape, dtype=example.dtype, device=example.device)
        recorder.source(x, "input", "must not change its input in place")
        beside = {
            place: torch.empty_like(value, device=value.device if example.device.type != "meta" else "meta")
            for place, value in example.arguments.tensors.items()
        }
        for index, (place, value) in enumerate(beside.items()):
            recorder.source(value, f"argument_{index}", f"must not change its argument {place!r} in place", place)
        stack.enter_context(_calls_of(recorder))
        stack.enter_context(recorder)
        try:
            output = example.arguments.replaced(beside).call(forward, x)
        except Exception as error:
            error.stack = recorder.stack  # type: ignore[attr-defined]
            raise
        recorder.paused = True
        form = form_of(output, shape[0], type(module).__name__)
        leaves = [recorder._leaf(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if not all(isinstance(leaf, fx.Node) for leaf in leaves):
            raise ForbiddenError(f"the output of {type(module).__name__} must depend on its tiles, got a constant")
        if form.is_plain:
            target = leaves[0]
        else:
            target = recorder._node(form.pack, (leaves,), {})
            recorder.values[target] = torch.empty((shape[0], 1), dtype=form.dtype, device=example.device)
        recorder.graph.output(target)
    _erase_unused(recorder.graph, {name for name, part in module.named_modules() if part.training and is_norm(part)})
    return Recording(recorder.graph, recorder.values, form)


def where_it_stopped(error: BaseException) -> str:
    """The file and line of the user's code that raised."""
    ours = ("ds_wsi/partition/", "/torch/")
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not any(p in frame.filename for p in ours)
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


@contextmanager
def _calls_of(recorder: _Recorder) -> Iterator[None]:
    original = nn.Module.__call__

    def call(leaf: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_module(original, leaf, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Every part's attributes are afterwards what they were, and all generators but torch's where they were.

    Raises:
        ForbiddenError: a number, flag or string has another value, or one of these generators has moved.
    """
    generators = [*foreign_generators(), *own_generators(module)]
    states = [generator.read() for generator in generators]
    parts = list(module.named_modules())
    before = [
        (
            dict(part.__dict__),
            {key: dict(part.__dict__[key]) for key in _TABLES},
            dict(plain_attributes(part)),
            containers_of(part),
        )
        for _, part in parts
    ]
    try:
        yield
        for generator, state in zip(generators, states, strict=True):
            if mark(generator.read()) != mark(state):
                raise ForbiddenError(
                    f"{type(module).__name__} must draw from torch's default generators, got draws of "
                    f"{generator.name}. HINT: torch.rand."
                )
        for (name, part), (_, _, plain, _) in zip(parts, before, strict=True):
            for key, value in plain_attributes(part):
                old = plain.get(key)
                if old is not None and value is not None and value != old:
                    raise ForbiddenError(
                        f"{name!r} ({type(part).__name__}) must not change its attribute {key!r} in forward, got "
                        f"{old!r} -> {value!r}. HINT: keep it out of the partition."
                    )
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.write(state)
        for (_, part), (attributes, tables, _, containers) in zip(parts, before, strict=True):
            for container, content in containers:
                refill(container, content)
            for key in set(part.__dict__) - set(attributes):
                del part.__dict__[key]
            part.__dict__.update(attributes)
            for key, table in tables.items():
                present = part.__dict__[key]
                if [(name, id(item)) for name, item in present.items()] != [
                    (name, id(item)) for name, item in table.items()
                ]:
                    present.clear()
                    present.update(table)


_TABLES = ("_parameters", "_buffers", "_modules")


def _erase_unused(graph: fx.Graph, norms: set[str]) -> None:
    """Operations whose results nobody reads; a norm's running statistics follow even so."""
    for node in reversed(graph.nodes):
        counts = node.op == "call_module" and node.target in norms
        if not node.users and not counts and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are plain attributes of a part."""
    for name, part in module.named_modules():
        for key, value in part.__dict__.items():
            if isinstance(value, Tensor):
                yield (f"{name}.{key}" if name else key), value


def _in_place_of_here(tree: Any, value: Any) -> Any:
    return map_aggregate(tree, lambda leaf: value if isinstance(leaf, Here) else leaf)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def look(item: Any) -> Any:
        if isinstance(item, Tensor):
            found.append(item)
        return item

    for leaf in pytree.tree_leaves(tree):
        map_aggregate(leaf, look) if isinstance(leaf, slice) else look(leaf)
    return found


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    name: str = getattr(target, "__name__", type(target).__name__)
    if name == "__get__" and inspect.ismethodwrapper(target):  # a property's: Tensor.T, say
        name = getattr(target.__self__, "__name__", name)
    return name
