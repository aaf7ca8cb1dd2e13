"""Where DDP and FSDP2 hand over their gradients: DDP has a public place for it, FSDP2 one that takes private names."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ds_wsi.compression import Compressor
from ds_wsi.engines.comm_hooks.reducer import Reducer
from ds_wsi.runtime.seams import check_seams, fsdp_param_groups

_SWITCH = "_ds_wsi_comm_switch"


class _Switch:
    """DDP's hook for good, because DDP takes one only: what it does may change."""

    def __init__(self) -> None:
        self.run: Callable[[dist.GradBucket], Future[Tensor]] | None = None


def _ddp_hook(state: tuple[_Switch, dist.ProcessGroup], bucket: dist.GradBucket) -> Future[Tensor]:
    switch, group = state
    # torch's own function, which does what DDP does without a hook.
    return default_hooks.allreduce_hook(group, bucket) if switch.run is None else switch.run(bucket)


def hook_ddp(model: DistributedDataParallel, run: Callable[[dist.GradBucket], Future[Tensor]]) -> Callable[[], None]:
    """Have `run` reduce DDP's buckets; returns what undoes it.

    Raises:
        ValueError: a hook that is there already, or sparse gradients.
    """
    check_seams("torch", "hook ddp")
    sparse = [name for name, module in model.module.named_modules() if getattr(module, "sparse", False)]
    if sparse:
        raise ValueError(f"gradients must be dense for a hook, got sparse ones ({sparse[0]}). HINT: sparse=False")
    switch = getattr(model, _SWITCH, None)
    if switch is None:
        if model._comm_hooks:
            raise ValueError("DDP takes one communication hook, got a second one. HINT: leave out the other")
        switch = _Switch()
        model.register_comm_hook((switch, model.process_group), _ddp_hook)
        setattr(model, _SWITCH, switch)
    switch.run = run

    def undo() -> None:
        switch.run = None

    return undo


class DdpBuckets:
    """Takes DDP's buckets to a reducer.

    A compressor gets all of a step's gradients as one bucket, in the order of the model's parameters: DDP rebuilds its
    buckets after the first step, and a resumed run starts with other buckets than the one it continues, so that what
    is selected must not depend on them. Other hooks get each bucket when DDP has it ready.
    """

    def __init__(self, model: DistributedDataParallel, reducer: Reducer) -> None:
        self._reducer, self._group = reducer, model.process_group
        self._names = {id(p): name for name, p in model.module.named_parameters()}
        self._place = {name: number for number, name in enumerate(self._names.values())}
        self._waiting: list[tuple[dist.GradBucket, Future[Tensor]]] = []

    def __call__(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Reduce a bucket now, or with the others when the last is there."""
        future: Future[Tensor] = Future()
        if not isinstance(self._reducer.state, Compressor):
            parameters = bucket.parameters()
            names, numels = [self._names[id(p)] for p in parameters], [p.numel() for p in parameters]
            future.set_result(self._reducer.mean(bucket.buffer(), names, numels, self._group))
            return future
        if bucket.index() == 0:
            self._waiting.clear()  # of a backward that failed
        self._waiting.append((bucket, future))
        if bucket.is_last():
            self._reduce_all()
        return future

    def _reduce_all(self) -> None:
        parts = [
            (self._names[id(parameter)], gradient.reshape(-1))
            for bucket, _ in self._waiting
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
        ]
        ordered = sorted(parts, key=lambda part: self._place[part[0]])
        names, numels = [name for name, _ in ordered], [gradient.numel() for _, gradient in ordered]
        flat = torch.cat([gradient for _, gradient in ordered])
        means = self._reducer.mean(flat, names, numels, self._group).split(numels)
        for (_, gradient), mean in zip(ordered, means, strict=True):
            gradient.copy_(mean)
        for bucket, future in self._waiting:
            future.set_result(bucket.buffer())
        self._waiting.clear()


class _ReduceScatter(ReduceScatter):
    """FSDP2's reduce-scatter of one group of parameters, through a reducer.

    The input holds, rank after rank, that rank's rows of every parameter, padded to as many rows for each. The hook
    gets the parameters whole, one after another and without the padding, as it does under other engines.
    """

    def __init__(self, native: Any, names: Sequence[str], parameters: Sequence[Any], reducer: Reducer) -> None:
        self._native, self._names, self._reducer = native, names, reducer
        self._sizes = [parameter._orig_size for parameter in parameters]

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._native.allocate(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise ValueError(f"FSDP2's reduction must be a mean or a sum, got {op}. HINT: no gradient divide factor")
        world, rank = group.size(), group.rank()
        numels = [size.numel() for size in self._sizes]
        rows = [math.ceil(size[0] / world) * (size.numel() // max(size[0], 1)) for size in self._sizes]
        if input_tensor.numel() != world * sum(rows):
            raise ValueError(
                f"every parameter of an FSDP module must get a gradient, got some of {', '.join(self._names)}. "
                "HINT: freeze the others before fully_shard"
            )
        by_rank = input_tensor.view(world, -1).split(rows, dim=1)
        flat = torch.cat([part.reshape(-1)[:numel] for part, numel in zip(by_rank, numels)])
        mean = self._reducer.mean(flat, self._names, numels, group)
        shards = []
        for part, size in zip(mean.split(numels), rows):
            padded = torch.zeros(world * size, dtype=mean.dtype, device=mean.device)
            padded[: part.numel()] = part
            shards.append(padded[rank * size : (rank + 1) * size])
        output_tensor.copy_(torch.cat(shards))
        if op == dist.ReduceOp.SUM:
            output_tensor.mul_(world)


def hook_fsdp(model: nn.Module, reducer: Reducer) -> Callable[[], None]:
    """Have a reducer do the reductions of all FSDP2 modules in `model`; returns what undoes it.

    Raises:
        ValueError: a mesh of more than one dimension, or parameters sharded along another dimension than the first.
    """
    check_seams("torch", "hook fsdp2")
    names = {
        (id(module), leaf): f"{prefix}.{leaf}" if prefix else leaf
        for prefix, module in model.named_modules()
        for leaf in dict(module.named_parameters(recurse=False))
    }
    natives: list[tuple[FSDPModule, Any]] = []
    reductions: list[_ReduceScatter] = []
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in fsdp_param_groups(module):
            trained = [p for p in group.fsdp_params if p.sharded_param.requires_grad]
            if any(p.fsdp_placement.dim != 0 for p in trained) or group.mesh_info.mesh.ndim != 1:
                raise ValueError(
                    "FSDP2 parameters must be sharded along their first dimension over a mesh of one, got another "
                    "placement. HINT: fully_shard(module, mesh=init_device_mesh(device, (world_size,)))"
                )
            trained_names = [names[(id(p._module_info.module), p._module_info.param_name)] for p in trained]
            natives.append((module, group._reduce_scatter_comm))
            reductions.append(_ReduceScatter(group._reduce_scatter_comm, trained_names, trained, reducer))
    # Only when all are found fit.
    for (part, _), comm in zip(natives, reductions, strict=True):
        part.set_custom_reduce_scatter(comm)

    def undo() -> None:
        for module, native in natives:
            module.set_custom_reduce_scatter(native)

    return undo
