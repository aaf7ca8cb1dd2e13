"""`partition_layers`: a module that computes in chunks, in place, and back."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_wsi.partition.plan import PartitionPlan, SegmentPlan
from ds_wsi.partition.policy import PartitionPolicy
from ds_wsi.partition.program import Program
from ds_wsi.partition.runner import Call, bag_ranges
from ds_wsi.partition.trace import Traced
from ds_wsi.runtime.log import logger

DEFAULT_CHUNK = {"batch": 32, "spatial": 64}


class PartitionedForward:
    """The forward of a partitioned module.

    Attributes:
        encodes_stacks: a caller may give a whole stack of bags with `cu_seqlens`, and `prepare`.
    """

    encodes_stacks = True

    def __init__(self, module: nn.Module, wanted: PartitionPlan | PartitionPolicy) -> None:
        self.module, self.wanted = module, wanted
        self.original = module.forward
        self._traces: dict[Any, Traced] = {}
        self._programs: dict[Any, Program] = {}
        self._plans: dict[Any, PartitionPlan] = {}

    def __call__(
        self,
        x: Tensor,
        *args: Any,
        cu_seqlens: Tensor | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The module's output, in the memory of the plan.

        Args:
            x: tiles [N, ...], or images [B, C, H, W] on the spatial axis; on the module's device or on the host.
            args, kwargs: None or the module's defaults: only `x` is partitioned.
            cu_seqlens: int [bags + 1], where each bag of the stack starts; the populations of `bn_population` "bag".
            prepare: applied to each chunk of `x` once it is on the device (normalising uint8 tiles, say).

        Raises:
            ValueError: other tensors are given; a population of one value.
            RuntimeError: called inside a checkpoint.
        """
        extra = [name for name, value in (*enumerate(args), *kwargs.items()) if isinstance(value, Tensor)]
        if extra:
            raise ValueError(
                f"{type(self.module).__name__} is partitioned, its forward must get one tensor, got one more ({extra[0]!r})"
            )
        if x.shape[0] == 0:
            return self.original(x if prepare is None else prepare(x), *args, **kwargs)
        _refuse_checkpoint()
        device = next((parameter.device for parameter in self.module.parameters()), x.device)
        plan = self.plan(x, device)
        if plan.mode == "native":
            x = x.to(device)
            return self.original(x if prepare is None else prepare(x), *args, **kwargs)
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        save = torch.is_grad_enabled() and (x.requires_grad or bool(parameters))
        probe = x[:1] if prepare is None else prepare(x[:1].to(device))
        call = Call(
            self._program(plan, (x.shape[0], *probe.shape[1:]), probe.dtype, device, save),
            x.detach(),
            bag_ranges(cu_seqlens if plan.bn_population == "bag" else None, x.shape[0]),
            prepare=prepare,
            save=save,
            input_grad=save and x.requires_grad,
            device=device,
            autocast=autocast_now(device),
            host_bytes=plan.host_bytes,
        )
        if not save:
            return call.forward()
        return _Partitioned.apply(call, x, *parameters)

    def plan(self, x: Tensor, device: torch.device) -> PartitionPlan:
        """The plan for an input: the given one, or the policy's for about as many tiles."""
        if isinstance(self.wanted, PartitionPlan):
            return self.wanted
        policy = self.wanted
        if policy.mode == "auto":
            raise NotImplementedError
        key = tuple(part.training for part in self.module.modules()), tuple(x.shape[1:])
        if key not in self._plans:
            self._plans[key] = uniform_plan(self.module, tuple(x.shape), policy, device, x.dtype)
        return self._plans[key]

    def traced(self, axis: str, *, whole: bool) -> Traced:
        """The module's graph in its present mode."""
        key = tuple(part.training for part in self.module.modules()), axis, whole
        if key not in self._traces:
            self._traces[key] = Traced(self.module, axis, self.original, whole=whole)
        return self._traces[key]

    def _program(
        self, plan: PartitionPlan, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, save: bool
    ) -> Program:
        specs = tuple(segment.spec for segment in plan.segments)
        traced = self.traced(plan.axis, whole=len(specs) == 1)
        place = shape if plan.axis == "spatial" else shape[1:]
        key = id(traced), specs, place, dtype, device
        if key not in self._programs:
            self._programs[key] = Program(traced, specs, plan.axis, shape, dtype, device)
        return self._programs[key]


class _Partitioned(torch.autograd.Function):
    """The whole module as one node of autograd's graph: each parameter receives its gradient once."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.call, ctx.parameters = call, parameters
        return call.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.call is None:
            raise RuntimeError(
                "a partitioned module's backward must run once, got a second one. HINT: call forward again; "
                "retain_graph does not keep what was freed."
            )
        call, parameters, ctx.call, ctx.parameters = ctx.call, ctx.parameters, None, None
        x_grad, found = call.backward(grad)
        gradients = [found.get(id(parameter)) for parameter in parameters]
        pairs = zip(gradients, parameters, strict=True)
        return None, x_grad, *(None if gradient is None else gradient.to(p.dtype) for gradient, p in pairs)


class Handle:
    """What `partition_layers` returns.

    Attributes:
        forward: the module's present forward, None once it is removed.
    """

    def __init__(self, module: nn.Module, forward: PartitionedForward) -> None:
        self.module = module
        self.forward: PartitionedForward | None = forward

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.forward is not None:
            original = self.forward.original
            if getattr(original, "__self__", None) is self.module:
                del self.module.__dict__["forward"]
            else:  # somebody else's wrapper was there before us
                self.module.forward = original
            self.forward = None


def partition_layers(module: nn.Module, plan_or_policy: PartitionPlan | PartitionPolicy) -> Handle:
    """Compute `module` in chunks, in place: same state_dict, same outputs and gradients, another memory.

    The module's forward takes one tensor and returns one. In training mode BatchNorm normalises over all tiles of the
    call; other layers must treat tiles independently. Gradients of parameters are summed in float32 (float64) and
    handed to autograd once.

    Args:
        module: an encoder of tiles [N, ...] -> [N, ...] (axis "batch"), or of images (axis "spatial").
        plan_or_policy: of `plan_partition`, or what it would be asked: then each call is planned for its size.

    Returns:
        A handle; `handle.remove()` undoes it.

    Raises:
        ValueError: the module is partitioned already, checkpoints itself, or cannot be traced where that is needed.
    """
    if isinstance(module.__dict__.get("forward"), PartitionedForward):
        raise ValueError(f"{type(module).__name__} must not be partitioned twice. HINT: handle.remove() first.")
    for name, part in module.named_modules():
        flags = (getattr(part, "grad_checkpointing", False), getattr(part, "gradient_checkpointing", False))
        if any(flag is True for flag in flags):
            raise ValueError(
                f"{name or type(part).__name__} must not checkpoint itself inside a partition, got "
                'grad_checkpointing=True. HINT: switch it off; mode "checkpoint" does the same, exactly.'
            )
    forward = PartitionedForward(module, plan_or_policy)
    module.forward = forward  # type: ignore[method-assign, assignment]
    logger.debug("partitioned %s", type(module).__name__)
    return Handle(module, forward)


def uniform_plan(
    module: nn.Module, shape: tuple[int, ...], policy: PartitionPolicy, device: torch.device, dtype: torch.dtype
) -> PartitionPlan:
    """Every segment in the policy's mode."""
    size = policy.chunk_size or DEFAULT_CHUNK[policy.axis]
    host = policy.mode == "stream"
    whole = (SegmentPlan("", policy.mode, size, host),)
    segments = whole
    if policy.mode != "recompute":
        traced = Traced(module, policy.axis)
        specs = tuple(segment.spec for segment in whole)
        cuts = [] if traced.opaque else Program(traced, specs, policy.axis, shape, dtype, device).candidates()
        segments = (*(SegmentPlan(node.name, policy.mode, size, host) for node in cuts), *whole)
    return PartitionPlan(segments, policy.axis, policy.bn_population, shape, compile=policy.compile)


def autocast_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast settings in force, to be entered again in backward.

    Without the cache of cast weights: an entry made in one chunk's graph would be part of the next one's.
    """
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    if not enabled:
        return lambda: torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    return lambda: torch.autocast(kind, dtype=dtype, cache_enabled=False)


def _refuse_checkpoint() -> None:
    """Recomputing a partitioned module as a whole would update running statistics twice and double its cost."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    packing = getattr(hooks[0], "__qualname__", "") if hooks else ""
    if "_checkpoint_hook" in packing or torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a partitioned module must not be called inside torch.utils.checkpoint, got such a call. "
            "HINT: take it out of the checkpoint; the partition recomputes by itself."
        )
