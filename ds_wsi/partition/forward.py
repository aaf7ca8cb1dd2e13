"""The forward of a partitioned module: its plan, its graph, and a call."""

import logging
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.norms.roles import is_shared
from ds_wsi.partition.checking.case import Case
from ds_wsi.partition.checking.check import FirstCalls
from ds_wsi.partition.execution.aliases import exclusive
from ds_wsi.partition.execution.call import PartitionedCall, bag_ranges
from ds_wsi.partition.execution.host_store import HostStore, Spill
from ds_wsi.partition.execution.input_tensor import Prepare, input_cost, prepared
from ds_wsi.partition.execution.node import PartitionedNode
from ds_wsi.partition.graph.leaves import needs_batch_statistics
from ds_wsi.partition.graph.record import Example
from ds_wsi.partition.graph.segments import Program
from ds_wsi.partition.graph.trace import Traced, stays_whole
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.beside import inside
from ds_wsi.partition.module.devices import device_of, refuse_devices
from ds_wsi.partition.module.hooks import compute_weights, refuse_inner_hooks
from ds_wsi.partition.module.identity import module_key
from ds_wsi.partition.module.outputs import form_of, tensors_of
from ds_wsi.partition.module.partitioned import refuse_partitioned_parts
from ds_wsi.partition.module.shards import anchored, is_anchor, refuse_shards
from ds_wsi.partition.module.surroundings import (
    carrier_of,
    refuse_checkpoint,
    refuse_saved_tensor_hooks,
    refuse_transforms,
)
from ds_wsi.partition.planning.plan import PartitionPlan, SegmentPlan
from ds_wsi.partition.planning.search import find_plan
from ds_wsi.partition.planning.uniform import DEFAULT_CHUNK, planning_size, uniform_plan
from ds_wsi.partition.policy import PartitionPolicy
from ds_wsi.runtime.forked import make_pool_anew
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import free_host_bytes
from ds_wsi.runtime.numerics import autocast_dtype, autocast_now, memory_layout

TOLD_S = 1.0  # a plan that took longer is no silence


@dataclass(frozen=True)
class _Given:
    """What a call is given.

    Attributes:
        tiles: [N, ...], or images [B, C, H, W], on any device.
        arguments: those beside the tiles.
        prepare: applied to each chunk of the tiles on the device.
        anchor: the last argument where `give_anchor` put one.
        device: the device that computes.
        shared: other ranks hold tiles of the same population.
    """

    tiles: Tensor
    arguments: Arguments
    prepare: Prepare | None
    anchor: Tensor | None
    device: torch.device
    shared: bool


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
        plan_or_policy: PartitionPlan | PartitionPolicy,
        spill: Spill | None = None,
        *,
        check: bool = False,
    ) -> None:
        self.module, self.plan_or_policy, self.spill = module, plan_or_policy, spill
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
        return {"module": self.module, "plan_or_policy": self.plan_or_policy, "original": self.original, "check": check}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__init__(state["module"], state["plan_or_policy"], check=state["check"])  # type: ignore[misc]
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
            args, kwargs: the arguments of the module's own forward. The first, or what is given under the name of its
                first parameter, are the tiles [N, ...], or images [B, C, H, W] on the spatial axis; on the module's
                device or on the host. What stands beside them is shared by all tiles: see `Arguments`.
            cu_seqlens: int [bags + 1], where each bag of the stack starts; the populations of `bn_population` "bag".
            prepare: applied to each chunk of the tiles once it is on the device (normalising uint8 tiles, say). Where
                it has a method `at(part, first)` that is called, with the position of the chunk's first tile.

        Returns:
            What the module returns: a tensor, or a tuple, dict or ModelOutput of tensors with tiles on the first axis.

        Raises:
            ValueError: an argument that not all tiles share; a population of one value; an engine's shards in place of
                parameters; a module on several devices, or on another one than a CPU or a CUDA device; a module that
                does what no partition may do; a hook on a part (`partition.hooks`), or a part that is partitioned
                itself.
            RuntimeError: called inside a checkpoint, torch.func, forward mode or hooks on saved tensors. From backward:
                the input, a parameter or a buffer that is read again was changed in place since.
        """
        with inside():
            return self._call(args, kwargs, cu_seqlens, prepare)

    def _call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cu_seqlens: Tensor | None, prepare: Prepare | None
    ) -> Any:
        with exclusive(self.module):
            refuse_shards(self.module)
        given = self._bind(args, kwargs, prepare)
        x, arguments, device = given.tiles, given.arguments, given.device
        if x.shape[0] == 0 and not given.shared:
            return anchored(arguments.call(self.original, x if prepare is None else prepare(x)), given.anchor)
        arguments.require_shared(x.shape[0], type(self.module).__name__)
        refuse_checkpoint()
        probe = x[:1] if prepare is None else prepare(x[:1].to(device))
        with exclusive(self.module):
            parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
            save = torch.is_grad_enabled() and (x.requires_grad or bool(parameters))
            plan, bags = self._planned(given, probe.dtype, cu_seqlens, save=save)
        if plan.mode == "native":
            return self._native(given, bags)
        if save:
            refuse_saved_tensor_hooks({segment.mode for segment in plan.segments})
        grad = save and x.requires_grad
        if self._checked is not None:
            # On a GPU not under the lock, which autograd's own thread takes in the trial's backward.
            with exclusive(self.module) if device.type == "cpu" else nullcontext():
                case = Case(self.module, self._alone, self.on_trial, plan, arguments, device, save, grad)
                self._checked.check(case, x, prepare)
        with exclusive(self.module):
            example = Example((x.shape[0], *probe.shape[1:]), probe.dtype, device, arguments, memory_layout(probe))
            call = PartitionedCall(
                self._program(plan, example),
                x.detach(),
                bags,
                prepare=prepare,
                save=save,
                wants_input_grad=grad,
                device=device,
                autocast=autocast_now(device),
                store=self._host_store(plan, x.shape[0], device),
                arguments=arguments,
            )
        for part, name, value in call.program.traced.attributes:
            setattr(part, name, copy(value))  # as the forward itself would
        if save:
            call.carrier = carrier_of(x, *parameters)
            out = PartitionedNode.apply(call, x, given.anchor, *parameters)
        else:
            out = call.forward()
        form = call.program.traced.form
        return out if form is None or form.is_plain else form.unpack(out)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], prepare: Prepare | None) -> _Given:
        """The call's arguments by what they are, and the device that computes."""
        anchor = None
        if args and is_anchor(args[-1]):
            args, anchor = args[:-1], args[-1]
        owner = type(self.module).__name__
        x, arguments = Arguments.bind(self.original, args, kwargs, owner)
        if not hasattr(x, "shape") or not len(x.shape):
            raise ValueError(f"the tiles of a partitioned {owner} must be a tensor [N, ...], got a {type(x).__name__}")
        with exclusive(self.module):  # or another thread's stand-ins would be taken for the parameters
            shared = is_shared(self.module)
            device = device_of(self.module, x.device)
            if self.plan_or_policy.mode != "native":
                refuse_devices(self.module, device)
        return _Given(x, arguments, prepare, anchor, device, shared)

    def _planned(
        self, given: _Given, dtype: torch.dtype, cu_seqlens: Tensor | None, *, save: bool
    ) -> tuple[PartitionPlan, list[tuple[int, int]]]:
        """The call's plan for prepared tiles of a dtype, and the tiles [first, last) of each of its populations."""
        x = given.tiles
        early = self.plan_or_policy.mode not in ("auto", "native")  # else the plan decides
        if early:
            self._refuse_what_chunks_cannot(x, save=save)
        if save:
            plan = self.plan(x, given.device, dtype, given.prepare, given.arguments)
        else:
            plan = self._inference_plan(tuple(x.shape))
        # In evaluation a norm that has no running statistics to take has those of one bag, whatever was trained.
        by_bag = plan.bn_population == "bag" or not self.module.training
        bags = bag_ranges(cu_seqlens if by_bag else None, x.shape[0], shared=given.shared)
        if plan.axis == "spatial" and plan.mode != "native" and len(bags) > 1:
            bags = self._one_stack(bags)
        if plan.mode != "native" and not early:
            self._refuse_what_chunks_cannot(x, save=save)
        return plan, bags

    def _native(self, given: _Given, bags: list[tuple[int, int]]) -> Any:
        """The module's own forward, of each population."""
        outs = []
        for first, last in bags:
            part = given.tiles[first:last].to(given.device, non_blocking=True)
            part = part if given.prepare is None else prepared(given.prepare, part, first)
            outs.append(given.arguments.call(self.original, part))
        if len(outs) == 1:
            return anchored(outs[0], given.anchor)
        owner = type(self.module).__name__
        forms = [form_of(out, last - first, owner) for out, (first, last) in zip(outs, bags, strict=True)]
        joint = torch.cat([form.pack(tensors_of(out)) for form, out in zip(forms, outs, strict=True)])
        return anchored(forms[0].unpack(joint), given.anchor)

    def _one_stack(self, bags: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Images in rows are one population: norms over images do not ask which bag they are of."""
        for name, part in self.module.named_modules():
            if needs_batch_statistics(part):
                raise ValueError(
                    f"a spatial partition must be called with one bag where BatchNorm takes its statistics, got "
                    f"{len(bags)} bags for {name!r} ({type(part).__name__}). HINT: call it once per bag."
                )
        return [(bags[0][0], bags[-1][1])]

    def _refuse_what_chunks_cannot(self, x: Tensor, *, save: bool) -> None:
        """Hooks inside, parts that are partitioned, and a caller's autograd that chunks are no part of."""
        refuse_partitioned_parts(self.module)
        refuse_inner_hooks(self.module)
        refuse_transforms(x, list(self.module.parameters()), save=save)

    @property
    def plans(self) -> tuple[PartitionPlan, ...]:
        """The plans made so far, one for each size of input that was seen."""
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
        if isinstance(self.plan_or_policy, PartitionPlan):
            return self.plan_or_policy
        policy = self.plan_or_policy
        # For two tiles at least: of a population that other ranks hold too, one tile or none is no small part.
        shape = (planning_size(max(2, x.shape[0])) if policy.mode == "auto" else max(1, x.shape[0]), *x.shape[1:])
        if policy.axis == "spatial":
            shape = tuple(x.shape)
        kind = autocast_dtype(device)
        shape_key = shape if policy.mode == "auto" or policy.axis == "spatial" else shape[1:]
        arguments = arguments or Arguments()
        key = module_key(self.module), shape_key, dtype, kind, arguments.key
        if key not in self._plans:
            if policy.mode in ("auto", "native"):
                cost = input_cost(x, 2 if policy.axis == "spatial" else 0, device, prepare)
                answer = find_plan(
                    self.module,
                    shape,
                    policy,
                    dtype=dtype,
                    autocast=kind,
                    device=device,
                    source=cost,
                    arguments=arguments,
                )
                plan = answer.plan
                # Of bags that fit as they are there is nothing to say.
                logger.log(logging.DEBUG if plan.mode == "native" else logging.INFO, "%s", plan.summary)
                logger.log(logging.INFO if answer.seconds > TOLD_S else logging.DEBUG, "partition: %s", answer.words)
                logger.debug("%s", plan)
            else:
                example = Example(shape, dtype, device, arguments, memory_layout(x[:1]))
                plan = uniform_plan(policy, example, lambda: self.traced(policy.axis, example, whole=True))
            self._plans[key] = plan
        return self._plans[key]

    def _inference_plan(self, shape: tuple[int, ...]) -> PartitionPlan:
        """The plan of a call without a backward, which keeps nothing: one segment, chunk by chunk."""
        plan_or_policy = self.plan_or_policy
        size = plan_or_policy.chunk_size or DEFAULT_CHUNK[plan_or_policy.axis]
        if isinstance(plan_or_policy, PartitionPlan) and plan_or_policy.segments:
            size = plan_or_policy.segments[0].chunk_size
        if plan_or_policy.mode == "native":
            return PartitionPlan((), plan_or_policy.axis, plan_or_policy.bn_population, shape, mode="native")
        return PartitionPlan(
            (SegmentPlan("", "recompute", size),), plan_or_policy.axis, plan_or_policy.bn_population, shape
        )

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
        """The limit of host memory where the plan names none, because its mode was given, not planned."""
        if self.spill is None:
            return 2**62
        return self.plan_or_policy.host_budget_bytes or free_host_bytes()

    def traced(self, axis: str, example: Example, *, whole: bool) -> Traced:
        """The module's graph as the module is now, for inputs like the example."""
        shape_key = example.shape if axis == "spatial" else example.shape[1:]
        kind = autocast_dtype(example.device)
        # What a forward does may hang on whether autograd follows.
        follows = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        seen = shape_key, example.dtype, example.device, kind, example.arguments.key, example.layout, follows
        opaque = whole and stays_whole(self.module, axis)
        key = module_key(self.module), axis, opaque, self.plan_or_policy.compile, seen
        if key not in self._traces:
            make_pool_anew()  # a trace may compute with shapes
            traced = Traced(self.module, axis, example, self.original, whole=whole)
            if self.plan_or_policy.compile and traced.opaque:
                # Without the option each compiled graph draws in its own order and way: the pass without a gradient
                # and the one with it are two, and one dropout must be the same in both.
                traced.forward = torch.compile(self.original, options={"fallback_random": True})
            elif self.plan_or_policy.compile:
                logger.warning(
                    "compile: skipped for %s, whose chunks are operations between barriers or halos",
                    type(self.module).__name__,
                )
            self._traces[key] = traced
        self._traces[key].require(example)
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
