"""A module's forward as a graph of operations: it is run on tensors without numbers, and what it calls is recorded.

Python sees real sizes and flags: conditions on them, assertions, keyword arguments and outputs of any kind work.
What an operation writes in place is recorded as a new value, and every later reader of the tensor, or of a view of it,
reads the new one. Building blocks (torch's own modules, norms) stay whole.
"""

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from ds_wsi.partition.graph.functions import applied_functions
from ds_wsi.partition.graph.recorder import Recorder
from ds_wsi.partition.graph.unrecorded import ForbiddenError
from ds_wsi.partition.graph.untouched import untouched
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.outputs import OutputForm, form_of
from ds_wsi.partition.module.surroundings import undisturbed
from ds_wsi.runtime.numerics import autocast_dtype
from ds_wsi.runtime.seeding import generator_states, set_generator_states

_running = threading.RLock()  # `nn.Module.__call__` is replaced while a forward is recorded: one at a time


@dataclass(frozen=True)
class Example:
    """What a module is recorded with.

    Args:
        shape: the tiles' shape [N, ...], where N does not matter; on the spatial axis the images', which is kept.
        dtype, device: the tiles' dtype and device.
        arguments: what stands beside the tiles.
        layout: the tiles' layout in memory: a forward may ask whether they are contiguous.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    arguments: Arguments = field(default_factory=Arguments)
    layout: torch.memory_format = torch.contiguous_format


@dataclass(frozen=True)
class Recording:
    """A recorded forward.

    Attributes:
        graph: the operations, a placeholder for the tiles, and one with `meta["path"]` for each tensor beside them.
        values: the values of all nodes: tensors without numbers, or what the operation returned.
        form: the output's form; the graph's own output is the joint tensor.
        made: (part, name) -> value of plain attributes that were not there before.
    """

    graph: fx.Graph
    values: dict[fx.Node, Any]
    form: OutputForm
    made: dict[tuple[str, str], Any]


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
        module: the module whose forward it is; nothing of it is changed.
        forward: the module's own forward.
        example: an example of the module's input.
        tiles: the number of tiles to run with in place of the example's; None for the example's.
        is_leaf: whether a sub-module, with its name, stays one operation.
        is_norm: whether a leaf returns what it is given, in shape, and is not to be run.

    Raises:
        ForbiddenError: the forward writes its input or a buffer, changes an attribute, or draws from another generator.
        UnrecordedError, or whatever the forward raises: with `stack`, the modules that it was in.
    """
    shape = example.shape if tiles is None else (tiles, *example.shape[1:])
    kind = example.device.type if example.device.type != "meta" else "cpu"
    with _running, _as_now(module, example.device, kind) as made, ExitStack() as stack:
        recorder = Recorder(module, is_leaf, is_norm, kind)
        recorder.pretends = stack.enter_context(_without_numbers(example.device))
        recorder.make_twins()
        x, beside = _sources(recorder, example, shape)
        stack.enter_context(_calls_of(recorder))
        stack.enter_context(applied_functions(recorder.call_function))
        stack.enter_context(recorder)
        try:
            output = example.arguments.replaced(beside).call(forward, x)
        except Exception as error:
            error.stack = recorder.stack  # type: ignore[attr-defined]
            raise
        recorder.paused, recorder.surroundings = True, recorder.ambient
        form = form_of(output, shape[0], type(module).__name__)
        recorder.graph.output(_joint(recorder, module, output, form, shape[0], example.device))
    _erase_unused(recorder.graph, {name for name, part in module.named_modules() if part.training and is_norm(part)})
    return Recording(recorder.graph, recorder.values, form, made)


@contextmanager
def _as_now(module: nn.Module, device: torch.device, kind: str) -> Iterator[dict[tuple[str, str], Any]]:
    """The surroundings of a recorded run: the caller's autograd and autocast, and a module that is put back.

    Args:
        module: the module that runs.
        device: the example's device.
        kind: the type of the device that autocast is asked for.

    Yields:
        See `untouched`.
    """
    with ExitStack() as stack:
        made = stack.enter_context(untouched(module))
        stack.enter_context(undisturbed())
        stack.enter_context(_unseeded(module, device))
        cast = autocast_dtype(torch.device(kind))
        if cast is not None:  # without the cache: it would keep tensors without numbers for those who come after
            stack.enter_context(torch.autocast(kind, dtype=cast, cache_enabled=False))
        graded = torch.is_grad_enabled()
        stack.enter_context(_inference_as_now())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(graded))  # Python may ask; the operations themselves do without
        yield made


@contextmanager
def _without_numbers(device: torch.device) -> Iterator[FakeTensorMode | None]:
    """The mode in which tensors have no numbers: the one that is on, or a new one; None on the meta device."""
    modes = _get_current_dispatch_mode_stack()
    present = next((mode for mode in modes if isinstance(mode, FakeTensorMode)), None)
    if present is not None or device.type == "meta":
        yield present
        return
    with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode  # without the others: a meter would count what takes no memory


def _sources(recorder: Recorder, example: Example, shape: tuple[int, ...]) -> tuple[Tensor, dict[Any, Tensor]]:
    """The tiles, and path -> tensor of those beside them, all without numbers and known to the recorder."""
    x = torch.empty(shape, dtype=example.dtype, device=example.device, memory_format=example.layout)
    recorder.source(x, "input", "must not change its input in place")
    beside = {
        path: torch.empty_like(value, device=value.device if example.device.type != "meta" else "meta")
        for path, value in example.arguments.tensors.items()
    }
    for index, (path, value) in enumerate(beside.items()):
        recorder.source(value, f"argument_{index}", f"must not change its argument {path!r} in place", path)
    return x, beside


def _joint(
    recorder: Recorder, module: nn.Module, output: Any, form: OutputForm, tiles: int, device: torch.device
) -> fx.Node:
    """The node of the module's output as one tensor.

    Raises:
        ForbiddenError: a part of the output was computed from no tile.
    """
    leaves = [recorder.leaf_of(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if not all(isinstance(leaf, fx.Node) for leaf in leaves):
        raise ForbiddenError(f"the output of {type(module).__name__} must depend on its tiles, got a constant")
    if form.is_plain:
        target = leaves[0]
        if target.op == "placeholder":  # a segment ends with an operation
            target = recorder.add_node(Tensor.clone, (target,), {})
            recorder.values[target] = recorder.values[leaves[0]]
    else:
        target = recorder.add_node(form.pack, (leaves,), {})
        recorder.values[target] = torch.empty((tiles, 1), dtype=form.dtype, device=device)
    return target


@contextmanager
def _unseeded(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Refuses a forward that seeds torch's generators: what draws again in backward would not see it."""
    device = device if device.type == "cuda" else torch.device("cpu")
    with _disable_current_modes():  # among tensors without numbers a state would have none
        states = generator_states(device)
    yield
    with _disable_current_modes():
        if all(map(torch.equal, states, generator_states(device))):
            return
        set_generator_states(states, device)
    raise ForbiddenError(
        f"{type(module).__name__} must not seed torch's generators in forward, got another state. "
        "HINT: seed them before the call."
    )


@contextmanager
def _inference_as_now() -> Iterator[None]:
    """Whether the call is in inference mode, for a forward that asks: tensors that are recorded cannot be."""
    asked, thread = torch.is_inference_mode_enabled, threading.get_ident()
    if asked():
        torch.is_inference_mode_enabled = lambda: threading.get_ident() == thread or asked()
    try:
        yield
    finally:
        torch.is_inference_mode_enabled = asked


def where_it_stopped(error: BaseException) -> str:
    """The file and line of the user's code that raised."""
    library = ("ds_wsi/partition/", "/torch/")
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not any(p in frame.filename for p in library)
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


@contextmanager
def _calls_of(recorder: Recorder) -> Iterator[None]:
    original = nn.Module.__call__

    def call(leaf: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_module(original, leaf, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def _erase_unused(graph: fx.Graph, norms: set[str]) -> None:
    """Operations whose results nobody reads; a norm's running statistics follow even so."""
    for node in reversed(graph.nodes):
        counts = node.op == "call_module" and node.target in norms
        if not node.users and not counts and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
