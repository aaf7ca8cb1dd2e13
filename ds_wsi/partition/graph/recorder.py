"""What a forward calls, written down as it is called: its operations as nodes, and which tensor holds which value."""

import inspect
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ds_wsi.partition.graph.asked import BY_STRIDES, UnknownError, answer, is_asked, reader_of
from ds_wsi.partition.graph.contexts import is_inference, surroundings_now
from ds_wsi.partition.graph.functions import Applied
from ds_wsi.partition.graph.recorded_ops import (
    PURE,
    Here,
    Item,
    ThroughView,
    Written,
    in_place_of_here,
    map_aggregate,
    name_of,
    tensor_attributes,
    tensors_in,
)
from ds_wsi.partition.graph.unrecorded import ForbiddenError, UnrecordedError
from ds_wsi.partition.module.hooks import is_compiled, is_engines, is_torchs, uncompiled
from ds_wsi.partition.module.observed import version_of

_DIFFERENTIATES = {
    torch.autograd.grad, torch.autograd.backward, Tensor.backward, Tensor.register_hook, Tensor.requires_grad_,
    Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook,
}  # fmt: skip


@dataclass
class _Storage:
    root: "_Held"
    epoch: int = 0


@dataclass
class _Held:
    """A tensor of the recorded run.

    Attributes:
        node: the node of its value as of `epoch` of its storage.
        parent, hop: the tensor that it is a view of, and the view's operation; None for the first tensor of a storage.
        fixed: why it must not be written, "" where it may.
        owner: the sub-module of a parameter or buffer; None for the one that is running.
    """

    tensor: Tensor
    node: fx.Node
    storage: _Storage
    epoch: int
    parent: "_Held | None" = None
    hop: tuple[Callable[..., Any], Any, Any] | None = None
    fixed: str = ""
    owner: str | None = None


class Recorder(TorchFunctionMode):
    """Inside, each call of torch or of a sub-module becomes a node of `graph`.

    Args:
        module: the module whose forward is run.
        is_leaf, is_norm: see `record`.
        kind: the type of the device whose autocast settings count.

    Attributes:
        values: the values of all nodes.
        stack: the modules that are running, the innermost last.
        paused: nothing is recorded.
    """

    def __init__(
        self, module: nn.Module, is_leaf: Callable[[nn.Module, str], bool], is_norm: Callable[..., bool], kind: str
    ) -> None:
        super().__init__()
        self.module, self.is_leaf, self.is_norm = module, is_leaf, is_norm
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.names = {id(part): name for name, part in module.named_modules(remove_duplicate=False)}
        self.state: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in (*tensor_attributes(module), *module.named_buffers(), *module.named_parameters()):
            self.state.setdefault(id(tensor), (name, tensor))
        self.held: dict[int, _Held] = {}
        self.storages: dict[int, _Storage] = {}
        self.stack: list[nn.Module] = [module]
        self.pretends: FakeTensorMode | None = None  # in which tensors with numbers are used without them
        self.twins: dict[int, Tensor] = {}  # id of a parameter, buffer or attribute -> it without numbers
        self.paused = False
        self.thread = threading.get_ident()
        self.kind = kind
        self.graded = torch.is_grad_enabled()
        self.detached = self.cut = False  # by no_grad; in an autograd.Function, which nothing inside makes undone
        self.ambient = self.surroundings = surroundings_now(kind, graded=True)

    # ------------------------------------------------------------------------------------------ what is called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or threading.get_ident() != self.thread:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            self.detached = self.detached if self.cut else self.graded and not args[0]
            return func(*args, **kwargs)
        if self.graded and not (self.detached or torch.is_grad_enabled() or is_inference()):
            raise UnrecordedError("an autograd.Function is called, whose backward is its own")
        if func in _DIFFERENTIATES or getattr(func, "__name__", "") == "__set__":
            raise UnrecordedError(f"{name_of(func)} is called, which is no function of values")
        if name_of(func) in BY_STRIDES:
            raise UnrecordedError(f"{name_of(func)} is called, which is a view of memory, not of values")
        if args and is_asked(name_of(func)) and not is_engines(reader_of(inspect.currentframe())):
            held = self.held.get(id(args[0]))
            if held is not None and held.node.op != "get_attr":
                return self._answer(name_of(func), held)
        return self._record(func, args, kwargs, lambda: func(*args, **kwargs))

    def _answer(self, name: str, held: _Held) -> Any:
        try:
            return answer(name, self._node_of(held), self.values, self.module.get_submodule, graded=self.graded)
        except UnknownError:
            sentence = f"must not ask what autograd does with its tiles, got a read of {name}"
            raise ForbiddenError(self._in_module(sentence)) from None

    def call_function(self, function: Applied, args: Any, kwargs: Any) -> Any:
        """An autograd.Function's call: whole, where autograd follows."""
        if self.paused or threading.get_ident() != self.thread:
            return function(*args, **kwargs)
        if torch.is_grad_enabled() and function.stands_in:
            return function.original(*args)
        if torch.is_grad_enabled():
            return self._whole(function, args, kwargs, lambda: self._results(function, args, kwargs))
        before, self.cut = self.cut, True
        try:
            return function(*args, **kwargs)  # what it computes: nothing of it has a gradient
        finally:
            self.cut = before

    def _results(self, function: Applied, args: Any, kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        function.require((args, kwargs), result)
        return result

    def _whole(self, target: Any, args: Any, kwargs: Any, compute: Callable[[], Any]) -> Any:
        """What is one operation, in which nothing is looked at."""
        self.paused = True
        try:
            return self._record(target, args, kwargs, compute)
        finally:
            self.paused = False

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
        out = self._whole(name, args, kwargs, lambda: self._leaf_values(call, leaf, args, kwargs))
        self.stack.pop()
        return out

    def _leaf_values(self, call: Callable[..., Any], leaf: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.is_norm(leaf):  # its forward would count batches, or refuse what is not on a GPU
            return torch.empty_like(args[0])
        out = call(leaf, *args, **kwargs)
        if any(out is item for item in tensors_in((args, kwargs))) and not is_torchs(leaf):
            return out.view_as(out)  # on another's terms it may return something else in a chunk
        return out

    def make_twins(self) -> None:
        """Put parameters and buffers without their numbers into the module, until `untouched` ends.

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
        before = [(tensor, version_of(tensor)) for tensor in tensors_in((args, kwargs))]
        self.surroundings = surroundings_now(self.kind, graded=not self.detached)
        with torch.no_grad():
            result = compute()
        written = {id(tensor): tensor for tensor, version in before if version_of(tensor) != version}
        outputs = tensors_in(result)
        if not outputs and not written:
            return result
        if not written and all(any(tensor is given for given, _ in before) for tensor in outputs):
            return result  # the argument itself
        if len(written) > 1:  # views of one memory count its changes together
            first = args[0] if args and isinstance(args[0], Tensor) else None
            memories = {tensor.untyped_storage()._cdata for tensor in written.values()}
            if first is None or id(first) not in written or len(memories) > 1:
                raise UnrecordedError(f"{name_of(target)} writes several tensors in place")
            written = {id(first): first}
        node_args, node_kwargs = self._nodes(args), self._nodes(kwargs)
        if not written:
            self._new_values(self.add_node(target, node_args, node_kwargs), result, target, args, kwargs)
            return result
        (changed,) = written.values()
        if any(tensor is not changed for tensor in outputs):
            raise UnrecordedError(f"{name_of(target)} writes a tensor in place and returns another")
        self._write(changed, self._write_node(target, changed, args, kwargs, node_args, node_kwargs))
        return result

    def _write_node(
        self, target: Any, changed: Tensor, args: Any, kwargs: Any, node_args: Any, node_kwargs: Any
    ) -> fx.Node:
        if isinstance(target, str):
            node = self.add_node(target, node_args, node_kwargs)
            node.meta["writes"] = True
            return node
        name = name_of(target)
        if name in PURE and changed is args[0]:
            others = tensors_in((args[1:], kwargs))
            if all(torch.promote_types(other.dtype, changed.dtype) == changed.dtype for other in others):
                target = PURE[name]
                return self.add_node(target, node_args, node_kwargs)
        if node_kwargs.get("inplace") is True and changed is args[0]:
            return self.add_node(target, node_args, {**node_kwargs, "inplace": False})
        positions = [index for index, item in enumerate(args) if item is changed]
        position: int | str | None = positions[0] if positions else None
        if position is None:
            position = next((key for key, item in kwargs.items() if item is changed), None)
        if position is None:
            raise UnrecordedError(f"{name} writes a tensor inside a list")
        return self.add_node(Written(target, position), node_args, node_kwargs)

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
        root.node = self.add_node(ThroughView(functions), (base, node, arguments), {})
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
            raise UnrecordedError(f"{name_of(target)} returns a {type(result).__name__}")
        for key, item in items:
            if not tensors_in(item):
                continue
            part = self.add_node(operator.getitem, (node, key), {})
            self._new_values(part, item, Item(target, key), args, kwargs)

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
        parents = [self.held[id(item)] for item in tensors_in((args, kwargs)) if id(item) in self.held]
        parent = next((item for item in parents if item.storage is storage), None)
        if parent is None:
            # A view made where nobody looked: it can be read, and must not be written, nor its base.
            held = _Held(tensor, node, storage, storage.epoch)
            storage.root.fixed = storage.root.fixed or "must not write a tensor that shares its memory unseen"
        else:
            hop_args, hop_kwargs = (
                map_aggregate(item, lambda leaf: Here() if leaf is parent.tensor else self.leaf_of(leaf))
                for item in (tuple(args), dict(kwargs))
            )
            held = _Held(tensor, node, storage, storage.epoch, parent, (target, hop_args, hop_kwargs))
        self.held[id(tensor)] = held

    def source(self, tensor: Tensor, name: str, fixed: str, path: str | None = None) -> fx.Node:
        """A placeholder."""
        node = self.graph.placeholder(name)
        node.meta["path"] = path
        self.values[node] = tensor
        held = _Held(tensor, node, None, 0, fixed=fixed)  # type: ignore[arg-type]
        held.storage = self.storages[tensor.untyped_storage()._cdata] = _Storage(held)
        self.held[id(tensor)] = held
        return node

    # ------------------------------------------------------------------------------------------------- nodes

    def _nodes(self, arguments: Any) -> Any:
        return map_aggregate(
            tuple(arguments) if isinstance(arguments, (list, tuple)) else dict(arguments), self.leaf_of
        )

    def leaf_of(self, item: Any) -> Any:
        """A tensor's node; what is no tensor as it is."""
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
        args, kwargs = (in_place_of_here(item, parent) for item in (args, kwargs))
        held.node, held.epoch = self.add_node(function, args, kwargs), held.storage.epoch
        self.values[held.node] = held.tensor
        return held.node

    def _outside(self, tensor: Tensor) -> Any:
        """A tensor that no recorded operation made: a parameter, a buffer, an attribute, or a constant."""
        named = self.state.get(id(tensor))
        if named is not None:
            node = self.graph.create_node("get_attr", named[0])
            node.meta["module"] = self._where()
            self.values[node] = tensor
            owner, _, key = named[0].rpartition(".")
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

    def add_node(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """An operation, in the sub-module that is running."""
        if isinstance(target, str):
            node = self.graph.create_node("call_module", target, args, kwargs)
        else:
            node = self.graph.create_node(
                "call_function", target, args, kwargs, name=name_of(target).strip("_") or None
            )
        node.meta["module"] = self._where()
        if self.surroundings != self.ambient:
            node.meta["surroundings"] = self.surroundings
        return node

    def _where(self) -> str:
        return self.names.get(id(self.stack[-1]), "")

    def _in_module(self, sentence: str, name: str | None = None) -> str:
        name = self._where() if name is None else name
        kind = type(self.module.get_submodule(name)).__name__
        return f"{name!r} ({kind}) {sentence}. HINT: keep it out of the partition."
