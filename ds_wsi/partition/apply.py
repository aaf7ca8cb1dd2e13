"""`partition_layers`: a module that computes in chunks, in place, and back."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.norms.roles import is_shared
from ds_wsi.partition.aliases import exclusive
from ds_wsi.partition.arguments import Arguments
from ds_wsi.partition.beside import inside, watch_children
from ds_wsi.partition.case import Case
from ds_wsi.partition.check import FirstCalls
from ds_wsi.partition.hooks import compute_weights, is_compiled, refuse_inner_hooks, uncompiled
from ds_wsi.partition.identity import module_key
from ds_wsi.partition.outputs import form_of, tensors_of
from ds_wsi.partition.paper import apply_paper
from ds_wsi.partition.plan import PartitionPlan, SegmentPlan
from ds_wsi.partition.planner import PAPER_CHUNK, plan_partition
from ds_wsi.partition.policy import PartitionPolicy
from ds_wsi.partition.program import Program
from ds_wsi.partition.record import Example
from ds_wsi.partition.runner import Call, bag_ranges
from ds_wsi.partition.staging import HostStore, Spill
from ds_wsi.partition.surroundings import (
    once_differentiable,
    refuse_batched,
    refuse_checkpoint,
    refuse_saved_tensor_hooks,
    refuse_transforms,
)
from ds_wsi.partition.trace import Traced, stays_whole
from ds_wsi.partition.values import InputCost, Prepare, prepared
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import ByteMeter, free_host_bytes
from ds_wsi.runtime.numerics import autocast_dtype, autocast_now
from ds_wsi.runtime.seams import check_seams

DEFAULT_CHUNK = {"batch": 32, "spatial": 64}  # of a mode that is given, where the policy names no chunk


class PartitionedForward:
    """The forward of a partitioned module.

    Attributes:
        encodes_stacks: a caller may give a whole stack of bags with `cu_seqlens`, and `prepare`.
        takes_host_tiles: the stack may lie in host memory.
    """

    encodes_stacks = True
    takes_host_tiles = True

    def __init__(
        self,
        module: nn.Module,
        wanted: PartitionPlan | PartitionPolicy,
        spill: Spill | None = None,
        *,
        check: bool = False,
    ) -> None:
        self.module, self.wanted, self.spill = module, wanted, spill
        self._checked = FirstCalls() if check else None
        self._alone = self._run_alone  # one object: what was checked is known by it
        self.original = module.forward
        self._traces: dict[Any, Traced] = {}
        self._programs: dict[Any, Program] = {}
        self._programs_of: list[int] = []  # ids of the parameters that the programs name
        self._plans: dict[Any, PartitionPlan] = {}
        self._store: HostStore | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of the module trace and plan anew."""
        if self.spill is not None:
            raise TypeError(f"a partitioned {type(self.module).__name__} with a disk must not be copied or pickled")
        check = self._checked is not None
        return {"module": self.module, "wanted": self.wanted, "original": self.original, "check": check}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__init__(state["module"], state["wanted"], check=state["check"])  # type: ignore[misc]
        self.original = state["original"]

    @torch.compiler.disable  # a compiled caller runs the chunks as they are
    def __call__(
        self,
        *args: Any,
        cu_seqlens: Tensor | None = None,
        prepare: Prepare | None = None,
        **kwargs: Any,
    ) -> Any:
        """The module's output, in the memory of the plan.

        Args:
            args, kwargs: of the module's own forward. The first, or what is given under the name of its first
                parameter, are the tiles [N, ...], or images [B, C, H, W] on the spatial axis; on the module's device or
                on the host. What stands beside them is shared by all tiles: see `Arguments`.
            cu_seqlens: int [bags + 1], where each bag of the stack starts; the populations of `bn_population` "bag".
            prepare: applied to each chunk of the tiles once it is on the device (normalising uint8 tiles, say). Where
                it has a method `at(part, first)` that is called, with the place of the chunk's first tile.

        Returns:
            What the module returns: a tensor, or a tuple, dict or ModelOutput of tensors with tiles on the first axis.

        Raises:
            ValueError: an argument that not all tiles share; a population of one value; an engine's shards in place of
                parameters; a module that does what no partition may do; a hook on a part (`partition.hooks`), or a part
                that is partitioned itself.
            RuntimeError: called inside a checkpoint, torch.func, forward mode or hooks on saved tensors. From backward:
                the input, a parameter or a buffer that is read again was changed in place since.
        """
        with inside():
            return self._call(args, kwargs, cu_seqlens, prepare)

    def _call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cu_seqlens: Tensor | None, prepare: Prepare | None
    ) -> Any:
        _refuse_shards(self.module)
        anchor = None
        if args and is_anchor(args[-1]):
            args, anchor = args[:-1], args[-1]
        owner = type(self.module).__name__
        x, arguments = Arguments.bind(self.original, args, kwargs, owner)
        if not hasattr(x, "shape") or not len(x.shape):
            raise ValueError(f"the tiles of a partitioned {owner} must be a tensor [N, ...], got a {type(x).__name__}")
        shared = is_shared(self.module)
        if x.shape[0] == 0 and not shared:
            return _anchored(arguments.call(self.original, x if prepare is None else prepare(x)), anchor)
        arguments.require_shared(x.shape[0], owner)
        refuse_checkpoint()
        device = next((parameter.device for parameter in self.module.parameters()), x.device)
        probe = x[:1] if prepare is None else prepare(x[:1].to(device))
        with exclusive(self.module):  # or another thread's aliases would be taken for the parameters
            parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
            save = torch.is_grad_enabled() and (x.requires_grad or bool(parameters))
            early = self.wanted.mode not in ("auto", "native")  # else the plan decides
            if early:
                self._refuse_what_chunks_cannot(x, save=save)
            shape = tuple(x.shape)
            plan = self.plan(x, device, probe.dtype, prepare, arguments) if save else self._inference_plan(shape)
            # In evaluation a norm that has no running statistics to take has those of one bag, whatever was trained.
            by_bag = plan.bn_population == "bag" or not self.module.training
            bags = bag_ranges(cu_seqlens if by_bag else None, x.shape[0], shared=shared)
            if plan.mode != "native" and not early:
                self._refuse_what_chunks_cannot(x, save=save)
        if plan.mode == "native":
            return self._native(x, arguments, bags, prepare, device, anchor)
        if save:
            refuse_saved_tensor_hooks({segment.mode for segment in plan.segments})
        grad = save and x.requires_grad
        if self._checked is not None:
            # On a GPU not under the lock, which autograd's own thread takes in the trial's backward.
            with exclusive(self.module) if device.type == "cpu" else nullcontext():
                case = Case(self.module, self._alone, self.on_trial, plan, arguments, device, save, grad)
                self._checked.check(case, x, prepare)
        with exclusive(self.module):
            example = Example((x.shape[0], *probe.shape[1:]), probe.dtype, device, arguments)
            call = Call(
                self._program(plan, example),
                x.detach(),
                bags,
                prepare=prepare,
                save=save,
                input_grad=grad,
                device=device,
                autocast=autocast_now(device),
                store=self._host_store(plan, x.shape[0], device),
                arguments=arguments,
            )
        out = _Partitioned.apply(call, x, anchor, *parameters) if save else call.forward()
        form = call.program.traced.form
        return out if form is None or form.is_plain else form.unpack(out)

    def _native(
        self,
        x: Tensor,
        arguments: Arguments,
        bags: list[tuple[int, int]],
        prepare: Prepare | None,
        device: torch.device,
        anchor: Tensor | None,
    ) -> Any:
        """The module's own forward, of each population."""
        outs = []
        for first, last in bags:
            part = x[first:last].to(device, non_blocking=True)
            part = part if prepare is None else prepared(prepare, part, first)
            outs.append(arguments.call(self.original, part))
        if len(outs) == 1:
            return _anchored(outs[0], anchor)
        owner = type(self.module).__name__
        forms = [form_of(out, last - first, owner) for out, (first, last) in zip(outs, bags, strict=True)]
        joint = torch.cat([form.pack(tensors_of(out)) for form, out in zip(forms, outs, strict=True)])
        return _anchored(forms[0].unpack(joint), anchor)

    def _refuse_what_chunks_cannot(self, x: Tensor, *, save: bool) -> None:
        """Hooks inside, parts that are partitioned, and a caller's autograd that chunks are no part of."""
        _refuse_partitioned_parts(self.module)
        refuse_inner_hooks(self.module)
        refuse_transforms(x, list(self.module.parameters()), save=save)

    @property
    def plans(self) -> tuple[PartitionPlan, ...]:
        """Those made so far, one for each size of input that was seen."""
        return tuple(self._plans.values())

    def plan(
        self,
        x: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        prepare: Prepare | None = None,
        arguments: Arguments | None = None,
    ) -> PartitionPlan:
        """The plan for an input: the given one, or the policy's for as many tiles or a few more."""
        if isinstance(self.wanted, PartitionPlan):
            return self.wanted
        policy = self.wanted
        # For two tiles at least: of a population that other ranks hold too, one tile or none is no small part.
        shape = (bucket(max(2, x.shape[0])) if policy.mode == "auto" else max(1, x.shape[0]), *x.shape[1:])
        if policy.axis == "spatial":
            shape = tuple(x.shape)
        kind = autocast_dtype(device)
        place = shape if policy.mode == "auto" or policy.axis == "spatial" else shape[1:]
        arguments = arguments or Arguments()
        key = module_key(self.module), place, dtype, kind, arguments.key
        if key not in self._plans:
            if policy.mode in ("auto", "native"):
                cost = input_cost(x, 2 if policy.axis == "spatial" else 0, device, prepare)
                plan = plan_partition(
                    self.module,
                    shape,
                    policy,
                    dtype=dtype,
                    autocast=kind,
                    device=device,
                    source=cost,
                    arguments=arguments,
                )
                # Of bags that fit as they are there is nothing to say.
                logger.log(logging.DEBUG if plan.mode == "native" else logging.INFO, "%s", plan.summary)
                logger.debug("%s", plan)
            else:
                example = Example(shape, dtype, device, arguments)
                plan = uniform_plan(policy, example, lambda: self.traced(policy.axis, example, whole=True))
            self._plans[key] = plan
        return self._plans[key]

    def _inference_plan(self, shape: tuple[int, ...]) -> PartitionPlan:
        """Without a backward nothing is kept: one segment, chunk by chunk."""
        wanted = self.wanted
        size = wanted.chunk_size or DEFAULT_CHUNK[wanted.axis]
        if isinstance(wanted, PartitionPlan) and wanted.segments:
            size = wanted.segments[0].chunk_size
        if wanted.mode == "native":
            return PartitionPlan((), wanted.axis, wanted.bn_population, shape, mode="native")
        return PartitionPlan((SegmentPlan("", "recompute", size),), wanted.axis, wanted.bn_population, shape)

    def _run_alone(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with the weights that hooks on it compute."""
        compute_weights(self.module, *args)
        return self.original(*args, **kwargs)

    def on_trial(self, plan: PartitionPlan) -> "PartitionedForward":
        """The same for the check's few tiles."""
        trial = PartitionedForward(self.module, plan)
        trial.original, trial._traces = self.original, self._traces
        return trial

    def _host_store(self, plan: PartitionPlan, tiles: int, device: torch.device) -> HostStore:
        """The store, with as much memory as the plan needs for this many tiles."""
        if self._store is None or self._store.device != device:
            limit = plan.host_budget_bytes or self._memory_limit()
            self._store = HostStore(device, spill=self.spill, limit_bytes=limit)
        self._store.reserve(plan.host_bytes * tiles // plan.input_shape[0])
        return self._store

    def _memory_limit(self) -> int:
        """Of host memory, where the plan names none: of a mode that was given, not planned."""
        if self.spill is None:
            return 2**62
        return getattr(self.wanted, "host_budget_bytes", None) or free_host_bytes()

    def traced(self, axis: str, example: Example, *, whole: bool) -> Traced:
        """The module's graph as the module is now, for inputs like the example."""
        place = example.shape if axis == "spatial" else example.shape[1:]
        kind = autocast_dtype(example.device)
        seen = place, example.dtype, example.device, kind, example.arguments.key
        opaque = whole and stays_whole(self.module, axis)
        key = module_key(self.module), axis, opaque, self.wanted.compile, seen
        if key not in self._traces:
            traced = Traced(self.module, axis, example, self.original, whole=whole)
            if self.wanted.compile and traced.opaque:
                # Without the option each compiled graph draws in its own order and way: the pass without a gradient
                # and the one with it are two, and one dropout must be the same in both.
                traced.forward = torch.compile(self.original, options={"fallback_random": True})
            elif self.wanted.compile:
                logger.warning(
                    "compile: skipped for %s, whose chunks are operations between barriers or halos",
                    type(self.module).__name__,
                )
            self._traces[key] = traced
        return self._traces[key]

    def _program(self, plan: PartitionPlan, example: Example) -> Program:
        present = [id(parameter) for parameter in self.module.parameters()]
        if present != self._programs_of:  # an engine, FSDP2 say, has put others in their place
            self._programs.clear()
            self._programs_of = present
        specs = tuple(segment.spec for segment in plan.segments)
        traced = self.traced(plan.axis, example, whole=len(specs) == 1)
        key = id(traced), specs
        if key not in self._programs:
            self._programs[key] = Program(traced, specs, plan.axis, example.shape)
        return self._programs[key]


class _Partitioned(torch.autograd.Function):
    """The whole module as one node of autograd's graph: each parameter receives its gradient once."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, anchor: Tensor | None, *parameters: nn.Parameter) -> Tensor:
        ctx.call, ctx.parameters, ctx.x_device = call, parameters, x.device
        ctx.flags = [(part, part.training) for part in call.program.traced.module.modules()]
        return call.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.call is None:
            raise RuntimeError(
                "a partitioned module's backward must run once, got a second one. HINT: call forward again; "
                "retain_graph does not keep what was freed."
            )
        refuse_batched(grad)
        call, parameters, ctx.call, ctx.parameters = ctx.call, ctx.parameters, None, None
        with inside(), _training_as(ctx.flags):
            x_grad, found = call.backward(grad)
        gradients = [found.get(id(parameter)) for parameter in parameters]
        if grad.shape[0] == 0:  # a rank without a tile: engines wait for a gradient of every parameter
            gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        pairs = zip(gradients, parameters, strict=True)
        if x_grad is not None:
            x_grad = x_grad.to(ctx.x_device)  # a host input's gradient is expected there
        return None, x_grad, None, *(None if gradient is None else gradient.to(p.dtype) for gradient, p in pairs)


@contextmanager
def _training_as(flags: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Backward computes again what forward did, whatever `train` and `eval` were called in between."""
    present = [(part, part.training) for part, _ in flags]
    for part, training in flags:
        part.training = training
    try:
        yield
    finally:
        for part, training in present:
            part.training = training


class _Anchored(torch.autograd.Function):
    """The identity on a module's output, as a function of the anchor too."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class Handle:
    """What `partition_layers` returns.

    Attributes:
        forward: the module's present forward, None once it is removed, and in mode "paper".
    """

    def __init__(
        self, module: nn.Module, forward: PartitionedForward | None, undo: Callable[[], None] | None = None
    ) -> None:
        self.module, self.forward, self._undo = module, forward, undo

    def remove(self) -> None:
        """Give the module its own forward back.

        Raises:
            ValueError: another forward was set over the partition's since; nothing is removed.
        """
        if self.forward is not None:
            present = self.module.__dict__.get("forward", self.forward)
            if present is not self.forward:
                name = getattr(present, "__qualname__", type(present).__qualname__)
                raise ValueError(
                    f"a partition must be the module's forward to be removed, got {name!r} set over it "
                    f"({type(self.module).__name__}). HINT: take that off first."
                )
        if self._undo is not None:
            self._undo()
            self._undo = None
        if self.forward is not None:
            original = self.forward.original
            if getattr(original, "__self__", None) is self.module:
                self.module.__dict__.pop("forward", None)
            else:  # somebody else's wrapper was there before us
                self.module.forward = original
            self.forward = None


def partition_layers(
    module: nn.Module,
    plan_or_policy: PartitionPlan | PartitionPolicy,
    *,
    spill: Spill | None = None,
    check: bool = True,
) -> Handle:
    """Compute `module` in chunks, in place: same state_dict, same outputs and gradients, another memory.

    The first argument of the module's forward is the tiles; what stands beside them is shared by all. In training mode
    BatchNorm normalises over all tiles of the call; other layers must treat tiles independently. Parameters' gradients
    are summed in float32 (float64) and handed to autograd once, which runs the hooks on them once. Parameters, buffers
    and the input must not change in place between forward and backward, biases included. Of a module that torch.compile
    has wrapped, what it has wrapped is partitioned.

    Args:
        module: an encoder of tiles [N, ...] -> [N, ...] (axis "batch"), or of images (axis "spatial").
        plan_or_policy: of `plan_partition`, or what it would be asked: then each call is planned for its size.
        spill: the disk of a policy with `nvme_path`: `ds_wsi.engines.nvme.NvmeSpill(path)`.
        check: compare the partition with the module alone, on up to 4 tiles, before the first call of each kind
            (`ds_wsi.partition.check`); a policy's `check` switches it off too.

    Returns:
        A handle; `handle.remove()` undoes it.

    Raises:
        ValueError: the module or a part of it is partitioned already, or checkpoints itself.
    """
    check_seams("torch", "class", "partition")
    if is_compiled(module):
        logger.warning(
            "partition: what torch.compile made of %s is left out, its chunks run uncompiled. "
            "HINT: PartitionPolicy(compile=True)",
            type(uncompiled(module)).__name__,
        )
        module = uncompiled(module)
    if is_partitioned(module):
        raise ValueError(f"{type(module).__name__} must not be partitioned twice. HINT: handle.remove() first.")
    _refuse_partitioned_parts(module)
    for name, part in module.named_modules():
        flags = (getattr(part, "grad_checkpointing", False), getattr(part, "gradient_checkpointing", False))
        if any(flag is True for flag in flags):
            raise ValueError(
                f"{name or type(part).__name__} must not checkpoint itself inside a partition, got "
                'grad_checkpointing=True. HINT: switch it off; mode "checkpoint" does the same, exactly.'
            )
    if spill is None and plan_or_policy.nvme_path:
        raise ValueError(
            f"{type(module).__name__}: a policy or plan with a disk must come with the disk, got spill=None. "
            "HINT: partition_layers(module, policy, spill=ds_wsi.engines.nvme.NvmeSpill(path))."
        )
    if plan_or_policy.mode == "paper":
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        axis = plan_or_policy.axis
        chunk = plan_or_policy.chunk_size or PAPER_CHUNK[axis]
        # An eighth of the budget for a map: a layer's input and output, their gradients, and room.
        stop = (getattr(plan_or_policy, "gpu_budget_bytes", None) or 0) // 8
        undo = apply_paper(module, device=device, axis=axis, chunk=chunk, stop_bytes=stop)
        hook = module.register_forward_pre_hook(lambda _, inputs: (inputs[0].cpu(), *inputs[1:]))

        def restore() -> None:
            hook.remove()
            undo()

        return Handle(module, None, restore)
    forward = PartitionedForward(module, plan_or_policy, spill, check=check and getattr(plan_or_policy, "check", True))
    module.forward = forward
    hook = module.register_forward_pre_hook(_give_anchor)
    # A compiler would break its graph at hooks.
    unwatch = (lambda: None) if plan_or_policy.compile else watch_children(module)

    def take_off() -> None:
        hook.remove()
        unwatch()

    logger.debug("partitioned %s", type(module).__name__)
    return Handle(module, forward, take_off)


def uniform_plan(policy: PartitionPolicy, example: Example, traced: Callable[[], Traced]) -> PartitionPlan:
    """Every segment in the policy's mode, for inputs like the example; `traced` gives the module's graph for them."""
    size = policy.chunk_size or DEFAULT_CHUNK[policy.axis]
    host = policy.mode == "stream"
    whole = (SegmentPlan("", policy.mode, size, host),)
    segments: tuple[SegmentPlan, ...] = whole
    if policy.mode != "recompute":
        graph = traced()
        specs = tuple(segment.spec for segment in whole)
        cuts = [] if graph.opaque else Program(graph, specs, policy.axis, example.shape).candidates()
        segments = (*(SegmentPlan(node.name, policy.mode, size, host) for node in cuts), *whole)
    return PartitionPlan(segments, policy.axis, policy.bn_population, example.shape, compile=policy.compile)


def input_cost(x: Tensor, dim: int, device: torch.device, prepare: Prepare | None) -> InputCost:
    """What a tile of `x`, or a row, takes before the encoder sees it, by one that is prepared for the trial."""
    if x.shape[dim] == 0:
        return InputCost()
    unit = x.narrow(dim, 0, 1)
    copied = 0 if x.device == device else unit.numel() * unit.element_size()
    ahead = copied > 0 and device.type == "cuda" and x.is_pinned()
    if prepare is None:
        return InputCost(copied, ahead=ahead)
    with torch.no_grad(), ByteMeter() as meter:
        result = prepare(unit.to(device))
    is_new = result.untyped_storage()._cdata != unit.untyped_storage()._cdata
    own = result.untyped_storage().nbytes() if is_new else 0
    return InputCost(copied, is_new, max(0, meter.peak - own - copied), ahead)


def bucket(tiles: int) -> int:
    """The number of tiles to plan for, at most half more: bags of all lengths share a few plans."""
    power = 1
    while power < tiles:
        power *= 2
    return power * 3 // 4 if power > 2 and tiles <= power * 3 // 4 else power


def _give_anchor(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give a module under ZeRO-3 one more input, an empty tensor that requires gradient.

    DeepSpeed reduces the gradients of a leaf module, and frees its parameters, once those of its inputs are known.
    Tiles require none: it would do so before the module's backward, with gradients of zero.
    """
    trained = next((parameter for parameter in module.parameters() if parameter.requires_grad), None)
    if trained is None or not hasattr(trained, "ds_id") or not torch.is_grad_enabled():
        return None
    # On the parameters' device: its backward runs on their thread, after their gradients are in place.
    return *args, torch.empty(0, device=trained.device, requires_grad=True)


def is_anchor(value: Any) -> bool:
    """Whether an argument is the empty tensor that a leaf module of ZeRO-3 is given: see `_give_anchor`."""
    return isinstance(value, Tensor) and value.numel() == 0 and value.requires_grad


def _anchored(out: Tensor, anchor: Tensor | None) -> Tensor:
    return out if anchor is None else _Anchored.apply(out, anchor)


def _refuse_shards(module: nn.Module) -> None:
    """Chunks run the submodules many times: parameters must be whole for the whole forward, and backward."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id") and getattr(parameter, "ds_z3_leaf_module", None) is not module:
            raise ValueError(
                f"a partitioned {type(module).__name__} must be gathered as a whole by ZeRO-3, got {name!r} outside "
                "of a leaf module. HINT: deepspeed.utils.set_z3_leaf_module(encoder, True) before deepspeed.initialize."
            )
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"a partitioned {type(module).__name__} must be one unit of FSDP2, got {name!r} in shards. "
                "HINT: fully_shard the encoder, not the layers in it."
            )


def is_partitioned(module: nn.Module) -> bool:
    """Whether the module computes in chunks, whatever was put over its forward since; or is a layer of mode "paper"."""
    own = getattr(module.__dict__.get("forward"), "__module__", None) or ""
    return own.startswith("ds_wsi.partition.") or _give_anchor in module._forward_pre_hooks.values()


def _refuse_partitioned_parts(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if part is not module and is_partitioned(part):
            raise ValueError(
                f"{type(module).__name__} must not hold a partitioned part, got {name!r}. "
                f"HINT: handle.remove() of {name!r} first, or partition parts side by side."
            )
