"""Communication hooks: one call for DeepSpeed at ZeRO 0 to 3, DDP and FSDP2.

A hook is `hook(state, bucket) -> mean`: it gets a flat buffer of gradients with the names and sizes of their
parameters and the group to exchange with, and returns the mean over the ranks (`ds_wsi.compression.Bucket`).
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ds_wsi.compression import DMGC, ByteCount, Cast, Compressor, TopK
from ds_wsi.compression import hook as compressed_mean
from ds_wsi.compression.comm import CommPolicy
from ds_wsi.config import SECTION
from ds_wsi.engines.comm_hooks.reducer import Dense, Hook, Reducer, allreduce, whole, whole_policy
from ds_wsi.engines.comm_hooks.state_files import on_host, read_states, write_state
from ds_wsi.engines.comm_hooks.torch_seams import DdpBuckets, hook_ddp, hook_fsdp
from ds_wsi.engines.policies.section import require_done
from ds_wsi.runtime.contracts import CountsBytes
from ds_wsi.runtime.log import logger

_REGISTERED = "_ds_wsi_comm_hook"
_WINDOW = 100  # messages
ALONE = "one process"
HOOKS: dict[str, Callable[[], Any]] = {
    "allreduce": Dense,
    "fp16": lambda: Compressor(Cast(torch.float16)),
    "bf16": lambda: Compressor(Cast(torch.bfloat16)),
    "topk": lambda: Compressor(TopK()),
    "powersgd": lambda: None,
    "dmgc": lambda: Compressor(DMGC()),
}


class CommHandle:
    """A registered hook.

    Attributes:
        name: the hook's name.
        target: what it was registered with.
        where: "ddp", "fsdp2" or "zero0" to "zero3"; "one process", where nothing is sent.
        state: the hook's state.
    """

    def __init__(
        self, name: str, target: Any, where: str, state: Any, reducer: Reducer | None, undo: Callable[[], None]
    ) -> None:
        self.name, self.target, self.where, self.state = name, target, where, state
        self._reducer, self._undo = reducer, undo
        self._removed = False

    @property
    def count(self) -> ByteCount | None:
        """The count of the bytes, where the hook counts them."""
        count = self.state.count if isinstance(self.state, CountsBytes) else None
        return count if isinstance(count, ByteCount) else None

    def metrics(self) -> dict[str, float]:
        """This rank's wire bytes since the registration, and its last messages' against dense float32 (M1).

        Empty where the hook does not count.
        """
        count, values = self.count, dict[str, float]()
        if count is None:
            return values
        for name, way in (("push", count.push), ("pull", count.pull)):
            if way.messages:
                values[f"comm/{name}_wire_bytes"] = way.wire_bytes
                values[f"comm/{name}_message_ratio"] = count.message_ratio(name, last=_WINDOW)
        if isinstance(self.state, Compressor) and self.state.divided:
            values["comm/divided_messages"] = float(self.state.divided)
        return values

    def remove(self) -> None:
        """Give the reductions back to the engine; what was not sent yet is lost. Later calls do nothing."""
        if not self._removed:
            self._removed = True
            self._undo()
            delattr(self.target, _REGISTERED)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's state, between two steps; empty for a hook without."""
        if self._reducer is not None:
            self._reducer.settle()
        return self.state.state_dict() if isinstance(self.state, Compressor) else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        if isinstance(self.state, Compressor):
            device = _device(self.target)
            self.state.load_state_dict({name: tensor.to(device) for name, tensor in state.items()})
        if self._reducer is not None:
            self._reducer.forget()

    def save(self, folder: str | Path) -> None:
        """Write this rank's state into a checkpoint's folder, one file per rank; every rank calls it.

        DeepSpeed's `client_state` is no place for it: of stages 0 to 2 it keeps rank 0's copy only.
        """
        self._say_what_is_not_saved()
        write_state(Path(folder), self.state_dict())

    def on_host(self) -> dict[str, dict[str, Tensor]]:
        """What `save` would write, by file name, its tensors copied to the host: for who writes them later."""
        self._say_what_is_not_saved()
        return on_host(self.state_dict())

    def load(self, folder: str | Path) -> None:
        """Continue from `save`. Of another number of ranks every rank gets their mean (`fold_states`), and says so.

        Raises:
            ValueError: a hook with a state, and a folder without it.
        """
        if isinstance(self.state, Compressor):
            self.load_state_dict(read_states(Path(folder)))

    def _say_what_is_not_saved(self) -> None:
        if self.name == "powersgd":
            logger.warning("powersgd's errors are not saved, torch keys them by DDP's buckets: a resumed run differs")


def register_comm_hook(
    target: Any, hook: str | Hook, state: Any = None, *, loss_scale: Callable[[], float] | None = None
) -> CommHandle:
    """Have a hook reduce the gradients of an engine or a wrapped model, which changes in place.

    On one process a named hook changes nothing, which the log says: there is nobody to send to, and what a hook keeps
    back would only come late. What more processes still owed when they saved a state is paid with the next step. A
    callable is called there too, of a wrapped target.

    Args:
        target: a DeepSpeedEngine (ZeRO 0 to 3), a DistributedDataParallel, or an FSDP2 root module; on one process a
            module that is not wrapped, too.
        hook: "allreduce", "fp16", "bf16", "topk", "powersgd" (DDP), "dmgc", or a callable `hook(state, bucket)` that
            returns the mean over the ranks in a tensor like the bucket's buffer.
        state: anything for a callable. For a named hook: None, its policy (`TopK`, `DMGC`, `Cast`), a `Compressor`; for
            "powersgd" torch's `PowerSGDState`.
        loss_scale: what gradients carry under DDP and FSDP2, such as a GradScaler's `get_scale`; DeepSpeed's is known.

    Returns:
        A handle: `remove()` restores the engine's own reductions.

    Raises:
        ValueError: what the hook cannot serve, with the reason.

    No collectives; the hook's come with each backward.
    """
    where = _where(target)
    if getattr(target, _REGISTERED, False):
        raise ValueError(f"a target must have one hook, got a second ({where}). HINT: handle.remove() of the first")
    alone = where == ALONE or _world_size(target, where) == 1
    if isinstance(hook, str):
        _require_hook(hook)
        if alone:
            logger.info("communication hook %s: left out, one process has nobody to send to", hook)
    if where == ALONE or (alone and hook == "powersgd"):
        handle = CommHandle(_name(hook), target, ALONE, None, None, lambda: None)
    else:
        handle = _register(target, where, hook, state, loss_scale)
    setattr(target, _REGISTERED, True)
    return handle


def _register(
    target: Any, where: str, hook: str | Hook, state: Any, loss_scale: Callable[[], float] | None
) -> CommHandle:
    if hook == "powersgd":
        return _powersgd(target, where, state)
    body, state = _body(hook, state, where, target)
    alone = isinstance(hook, str) and isinstance(state, Compressor) and _world_size(target, where) == 1
    if alone:
        body, state.policy = whole, whole_policy(state.policy)
    if where.startswith("zero"):
        from ds_wsi.engines.comm_hooks.zero_seams import hook_engine, loss_scale_of

        reducer = Reducer(body, state, step_of=lambda: int(target.global_steps), loss_scale=loss_scale_of(target))
        undo = hook_engine(target, reducer, pull=not alone and _pulls_weights(state, where, target))
    else:
        reducer = Reducer(body, state, loss_scale=loss_scale)
        undo = hook_ddp(target, DdpBuckets(target, reducer)) if where == "ddp" else hook_fsdp(target, reducer)
    return CommHandle(_name(hook), target, where, state, reducer, undo)


def attach(engine: Any, policy: CommPolicy | None = None, **keywords: Any) -> CommHandle | None:
    """Register what the policy says, by default `"ds_wsi": {"compression": {...}}` of the engine's DeepSpeed JSON.

    The section's other keys must have been followed before the engine wrapped the model, and are refused by name where
    they were not (`ds_wsi.initialize` follows them).

    Args:
        engine: what `register_comm_hook` takes as its target.
        policy: what replaces the section, which only a DeepSpeedEngine has.
        keywords: further arguments of `register_comm_hook`.

    Returns:
        None where there is neither a policy nor a section (which is warned of), where the policy's hook is "none", or
        where "auto" found that compression does not pay.

    Raises:
        ValueError: a key of the section that is unknown or not followed, or what the hook cannot serve.
    """
    where = _where(engine)
    if policy is None:
        section = _section(engine)
        if section is None:
            _say_nothing_attached(engine, where)
            return None
        policy = require_done(section, engine.module).compression
    if policy.hook == "none":
        return None
    hook = policy.hook
    if where == ALONE or _world_size(engine, where) == 1:
        return register_comm_hook(engine, "allreduce" if hook == "auto" else hook, **keywords)
    if hook == "auto":
        from ds_wsi.compression.cost import choose

        numel = sum(getattr(p, "ds_numel", p.numel()) for p in _module(engine).parameters() if p.requires_grad)
        choice = choose(policy, numel, _device(engine))
        logger.info("%s", choice)
        if choice.hook == "none":
            return None
        hook = choice.hook
    state: Any = policy.build(hook)
    if hook == "powersgd":
        state = _powersgd_state(engine, policy.approx_rank, policy.dense_steps)
    handle = register_comm_hook(engine, hook, state, **keywords)
    whose = state.policy if isinstance(state, Compressor) else "torch's"
    logger.info("communication hook: %s under %s, %s", hook, handle.where, whose)
    return handle


def _name(hook: str | Hook) -> str:
    return hook if isinstance(hook, str) else getattr(hook, "__name__", type(hook).__name__)


def _section(target: Any) -> Mapping[str, Any] | None:
    """The "ds_wsi" section of an engine's DeepSpeed JSON; a model's own `config` is another thing."""
    if not hasattr(target, "zero_optimization_stage"):
        return None
    section: Mapping[str, Any] | None = (getattr(target, "config", None) or {}).get(SECTION)
    return section


def _say_nothing_attached(target: Any, where: str) -> None:
    if where == ALONE or _world_size(target, where) == 1:
        logger.info("attach: nothing to do, one process has nobody to send to")
        return
    logger.warning(
        'attach: nothing is attached under %s, because there is no "%s" section of a DeepSpeed JSON. '
        'HINT: register_comm_hook(model, "dmgc"), or attach(model, ds_wsi.compression.comm.CommPolicy(hook="dmgc")).',
        *(where, SECTION),
    )


def _world_size(target: Any, where: str) -> int:
    """Ranks that gradients are averaged over."""
    if where == "ddp":
        return dist.get_world_size(target.process_group)
    if where.startswith("zero"):
        return int(target.dp_world_size)
    return dist.get_world_size()


def _where(target: Any) -> str:
    if isinstance(target, DistributedDataParallel):
        return "ddp"
    if isinstance(target, FSDPModule):
        return "fsdp2"
    stage = getattr(target, "zero_optimization_stage", None)
    if stage is not None:
        return f"zero{int(stage())}"
    n_ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks == 1 and isinstance(target, nn.Module):
        return ALONE
    remedy = (
        "DistributedDataParallel(model), deepspeed.initialize or accelerator.prepare wrap it"
        if isinstance(target, nn.Module)
        else "give the model that deepspeed.initialize or accelerator.prepare returned"
    )
    raise ValueError(
        f"a hook's target must be a DeepSpeedEngine, DDP or an FSDP2 module, got {type(target).__name__} on "
        f"{n_ranks} processes. HINT: {remedy}"
    )


def _module(target: Any) -> nn.Module:
    module: nn.Module = target if _where(target) == "fsdp2" else target.module
    return module


def _device(target: Any) -> torch.device:
    return next(_module(target).parameters()).device


def _body(hook: str | Hook, state: Any, where: str, target: Any) -> tuple[Hook, Any]:
    """The callable and its state."""
    if callable(hook):
        return hook, state
    _require_hook(hook)
    if hook == "allreduce":
        return allreduce, Dense()
    if isinstance(state, TopK | Cast):
        state = Compressor(state)
    state = HOOKS[hook]() if state is None else state
    if not isinstance(state, Compressor):
        raise ValueError(f"the state of {hook} must be its policy or a Compressor, got {type(state).__name__}")
    kinds = {"fp16": Cast, "bf16": Cast, "topk": TopK, "dmgc": DMGC}
    if not isinstance(state.policy, kinds[hook]):
        raise ValueError(f"the policy of {hook} must be a {kinds[hook].__name__}, got {state.policy}")
    _require_pull(state, where)
    return compressed_mean, state


def _require_hook(hook: str) -> None:
    if hook not in HOOKS:
        raise ValueError(f"a hook must be one of {', '.join(HOOKS)}, or a callable, got {hook!r}. HINT: topk")


def _pulls_weights(state: Any, where: str, target: Any) -> bool:
    """Whether weights come back from their owners, not means of gradients."""
    policy = state.policy if isinstance(state, Compressor) else None
    if not isinstance(policy, DMGC) or policy.topology != "sharded" or where not in ("zero1", "zero2"):
        return False
    if policy.pull == "auto":
        from ds_wsi.engines.comm_hooks.zero_weights import unfit

        reason = unfit(target.optimizer)
        if reason:
            logger.info("dmgc pulls means of gradients: a pull of weights must have %s", reason)
        return not reason
    return policy.pull == "weights"


def _require_pull(state: Compressor, where: str) -> None:
    policy = state.policy
    if not isinstance(policy, DMGC) or policy.pull != "weights":
        return
    if policy.topology == "sharded" and where in ("zero1", "zero2"):
        return
    raise ValueError(
        f"a pull of weights must be under ZeRO 1 or 2 with topology sharded, whose ranks own parts of the optimizer, "
        f"got {policy.topology} under {where}. HINT: pull means or auto; or push and pull_weights of "
        "ds_wsi.compression in a loop of your own"
    )


def _powersgd_state(model: Any, approx_rank: int, dense_steps: int) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    group = model.process_group if isinstance(model, DistributedDataParallel) else None
    # Not from the first step on: DDP then rebuilds its buckets, by which torch keys its errors.
    return PowerSGDState(group, matrix_approximation_rank=approx_rank, start_powerSGD_iter=max(2, dense_steps))


def _powersgd(target: Any, where: str, state: Any) -> CommHandle:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook

    if where != "ddp":
        raise ValueError(
            f"powersgd must run under DDP, whose buckets torch's implementation takes, got {where}. "
            "HINT: topk or dmgc goes everywhere"
        )
    state = _powersgd_state(target, 4, 10) if state is None else state
    in_turn = dist.get_backend(target.process_group) == "gloo"

    def reduce(bucket: dist.GradBucket) -> Future[Tensor]:
        future = powerSGD_hook(state, bucket)
        if in_turn:
            # Its later collectives start in callbacks: of several buckets each rank would start them in its own order.
            future.wait()
        return future

    undo = hook_ddp(target, reduce)
    return CommHandle("powersgd", target, where, state, None, undo)
