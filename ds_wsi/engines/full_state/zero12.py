"""The optimizer's state under ZeRO 1 and 2, whole and by parameter: each rank has a stretch of every flat group.

DeepSpeed has accessors by parameter too; they sum over the ranks, where -0 and 0 are 0, one parameter a message.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_wsi.engines.full_state.entries import MASTER, NUMBERS, as_number, flat_states, number_of
from ds_wsi.runtime.tensor_file import TensorFile

_CHUNK = 2**22  # entries of a rank that are gathered at a time


class _Group:
    """A flat group: where its parameters lie, and the stretch that this rank steps."""

    def __init__(self, zero: Any, number: int, names: dict[int, str]) -> None:
        self.own: Tensor = zero.single_partition_of_fp32_groups[number]
        self.group = zero.real_dp_process_group[number]
        self.replica: Tensor = zero.bit16_groups_flat[number]
        parameters = zero.round_robin_bit16_groups[number]
        # Before there were offsets, parameters lay one after the other.
        one_by_one = [*accumulate((parameter.numel() for parameter in parameters), initial=0)][:-1]
        offsets = getattr(zero, "round_robin_bit16_offsets", {number: one_by_one})[number]
        self.parameters = [
            (names[id(parameter)], parameter, int(at)) for parameter, at in zip(parameters, offsets, strict=True)
        ]
        self.first = dist.get_rank(self.group) * self.own.numel()

    def gather(self, own: Tensor, keep: bool) -> dict[str, Tensor]:
        """A state's tensors by parameter, on the host of who keeps them."""
        world, device = dist.get_world_size(self.group), self.replica.device
        flat = torch.empty(world, own.numel(), dtype=own.dtype) if keep else None
        for start in range(0, own.numel(), _CHUNK):
            mine = own.detach()[start : start + _CHUNK].to(device).contiguous()
            all_ranks = torch.empty(world * mine.numel(), dtype=mine.dtype, device=device)
            dist.all_gather_into_tensor(all_ranks, mine, group=self.group)
            if flat is not None:
                flat[:, start : start + _CHUNK].copy_(all_ranks.view(world, -1))
        if flat is None:
            return {}
        return {name: flat.view(-1)[at : at + p.numel()].view(p.shape) for name, p, at in self.parameters}

    def fill(self, target: Tensor, whole: Tensor, at: int) -> None:
        """Copy what this rank steps of a parameter that begins at `at`."""
        low, high = max(at, self.first), min(at + whole.numel(), self.first + target.numel())
        if low < high:
            target[low - self.first : high - self.first].copy_(whole.reshape(-1)[low - at : high - at])

    def differs(self) -> bool:
        """Whether the model computes with other weights than the owners step, on any rank. Collective."""
        stretch = self.replica.detach()[self.first : self.first + self.own.numel()]
        other = not torch.equal(stretch.to(self.own.device, self.own.dtype), self.own.detach())
        told = torch.tensor([float(other)], device=self.replica.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.group)
        return bool(told.item())


def take_zero12(module: nn.Module, zero: Any, inner: Any, keep: bool) -> dict[str, Tensor]:
    """See `take_state`. Collective: all-gathers of every state."""
    states: dict[str, Tensor] = {}
    for group in _groups(module, zero):
        for kind, value in sorted(inner.state.get(group.own, {}).items()):
            if value is None:
                continue
            number = number_of(value, group.own)
            if number is not None:
                states |= {f"{NUMBERS}/{kind}/{name}": as_number(number) for name, _, _ in group.parameters}
            else:
                states |= {f"{kind}/{name}": one for name, one in group.gather(value, keep).items()}
        if group.differs():
            states |= {f"{MASTER}/{name}": one for name, one in group.gather(group.own, keep).items()}
    return states if keep else {}


def put_zero12(module: nn.Module, zero: Any, inner: Any, states: TensorFile, by_name: dict[str, list[str]]) -> None:
    """See `put_state`; the module has its weights. No collectives."""
    for number, group in enumerate(_groups(module, zero)):
        shard, names = group.own, [name for name, _, _ in group.parameters]
        inner.state.pop(shard, None)
        made = flat_states(inner, inner.param_groups[number], shard, names, states, by_name)
        for name, parameter, at in group.parameters:
            kept = by_name.get(name, [])
            for kind in (kind for kind in kept if kind in made):
                group.fill(made[kind], states.read_like(f"{kind}/{name}", parameter), at)
            master = states.read_like(f"{MASTER}/{name}", parameter) if MASTER in kept else parameter.detach()
            group.fill(shard.data, master, at)
        if made:
            inner.state[shard] = made
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False  # its accessors look at the states that were made here


def _groups(module: nn.Module, zero: Any) -> list[_Group]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [_Group(zero, number, names) for number in range(len(zero.bit16_groups_flat))]
