"""DMGC's two ways under ZeRO 1 and 2: gradients to their owners, compressed changes of the weights back.

The parameters of the module are theta_hat, the same on all ranks; the owner of a partition has its theta as the
optimizer's float32 partition ([Note: push and pull] in compressor.py). What is evaluated, exported and saved with the
module is theta_hat, the weights that gradients were computed at. At 100 % both are the same.

[Note: no gather] DeepSpeed's step ends with an all-gather of the flat groups, then calls `_update_model_bit16_weights`.
It goes over `optimizer.bit16_groups_flat`, which is an empty list meanwhile; the list comes back, and the pull is made,
at that call. A version that went over something else would find the list empty and fail, not train on other weights.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_wsi.compression import Bucket, pull_weights
from ds_wsi.engines.comm_hooks.patches import Patches
from ds_wsi.engines.comm_hooks.reducer import Reducer
from ds_wsi.runtime.seams import lacking


class _Layout:
    """Where each parameter of one flat group lies, and each rank's partition."""

    def __init__(self, optimizer: Any, number: int, names: dict[int, str]) -> None:
        flat, self.group = optimizer.bit16_groups_flat[number], optimizer.real_dp_process_group[number]
        parameters = optimizer.round_robin_bit16_groups[number]
        self.offsets = {id(p): at for p, at in zip(parameters, optimizer.round_robin_bit16_offsets[number])}
        size = int(optimizer.partition_size[number])
        self.bounds = [rank * size for rank in range(dist.get_world_size(self.group) + 1)]
        self.rank = dist.get_rank(self.group)
        self.names: list[str] = []
        self.numels: list[int] = []
        end = 0
        for parameter in sorted(parameters, key=lambda p: self.offsets[id(p)]):
            self._add(f"padding {number}.{end}", self.offsets[id(parameter)] - end)
            self._add(names[id(parameter)], parameter.numel())
            end = self.offsets[id(parameter)] + parameter.numel()
        self._add(f"padding {number}.{end}", flat.numel() - end)

    def _add(self, name: str, numel: int) -> None:
        if numel:
            self.names.append(name)
            self.numels.append(numel)


class Replicas:
    """The weights of a ZeRO 1 or 2 optimizer as replicas that owners update.

    Raises:
        ValueError: weights that are not float32, or an optimizer that does not keep them as known.
    """

    def __init__(self, optimizer: Any, names: dict[int, str], reducer: Reducer) -> None:
        self._optimizer, self._names, self._reducer = optimizer, names, reducer
        reason = unfit(optimizer)
        if reason:
            raise ValueError(f"DMGC's pull must have {reason}. HINT: pull means, or ZeRO 1 or 2 with autocast")
        self._layouts = [_Layout(optimizer, number, names) for number in range(len(optimizer.bit16_groups_flat))]
        self._flats: list[Tensor] | None = None
        self._kept: list[Tensor] = []

    def push(self, tensor: Tensor, groups: Sequence[int], parameters: Sequence[Any]) -> Tensor:
        """The means of this rank's parts of a bucket, in their place; elsewhere zeros, which no one reads."""
        starts = list(accumulate((p.numel() for p in parameters), initial=0))
        mean = torch.zeros_like(tensor)
        for number in sorted(set(groups)):
            layout = self._layouts[number]
            chosen = [index for index, group in enumerate(groups) if group == number]
            # As they lie in the flat group, for its owners' bounds to rise.
            chosen.sort(key=lambda index: layout.offsets[id(parameters[index])])
            numels = [parameters[index].numel() for index in chosen]
            flat = torch.cat([tensor[starts[index] : starts[index + 1]] for index in chosen])
            at = [layout.offsets[id(parameters[index])] for index in chosen]
            bounds = [sum(min(max(b - first, 0), n) for first, n in zip(at, numels)) for b in layout.bounds]
            names = [self._names[id(parameters[index])] for index in chosen]
            shard = self._reducer.owned(Bucket(flat, names, numels, layout.group), bounds)
            whole = torch.zeros_like(flat)
            whole[shard.start : shard.stop] = shard.values.to(flat.dtype)
            for index, part in zip(chosen, whole.split(numels)):
                mean[starts[index] : starts[index + 1]] = part
        return mean

    def attach(self, patches: Patches) -> None:
        """Put the pull in the place of the all-gather ([Note: no gather])."""

        def step(optimizer: Any, *args: Any, **keywords: Any) -> Any:
            self._set_aside()
            try:
                return native_step(*args, **keywords)
            finally:
                self._bring_back()

        def update(optimizer: Any, group_index: int) -> Any:
            if self._flats is not None:
                self._bring_back()
                self._pull()
            return native_update(group_index)

        native_step = patches.method(self._optimizer, "step", step)
        native_update = patches.method(self._optimizer, "_update_model_bit16_weights", update)

    def _own(self, flat: Tensor, layout: _Layout) -> Tensor:
        return flat[layout.bounds[layout.rank] : layout.bounds[layout.rank + 1]]

    def _set_aside(self) -> None:
        self._flats = self._optimizer.bit16_groups_flat
        # The step writes theta over the owner's own part of theta_hat.
        self._kept = [self._own(flat, layout).clone() for flat, layout in zip(self._flats, self._layouts)]
        self._optimizer.bit16_groups_flat = []

    def _bring_back(self) -> None:
        if self._flats is not None:
            self._optimizer.bit16_groups_flat, self._flats = self._flats, None

    @torch.no_grad()
    def _pull(self) -> None:
        for number, layout in enumerate(self._layouts):
            flat = self._optimizer.bit16_groups_flat[number]
            theta = self._optimizer.single_partition_of_fp32_groups[number].detach().to(flat.device)
            self._own(flat, layout).copy_(self._kept[number])
            pull_weights(
                self._reducer.state, theta, Bucket(flat, layout.names, layout.numels, layout.group), layout.bounds
            )
        self._kept = []


def unfit(optimizer: Any) -> str | None:
    """What a ZeRO 1 or 2 optimizer lacks for the pull, or None."""
    from deepspeed import comm

    missing = lacking(optimizer, "zero12", "pull")
    if missing is not None:
        return f"the optimizer of DeepSpeed 0.19.8, got one without {missing}"
    if any(flat.dtype != torch.float32 for flat in optimizer.bit16_groups_flat):
        return f"float32 weights, got {optimizer.bit16_groups_flat[0].dtype}"
    if not comm.has_all_gather_into_tensor():
        return "torch's all_gather_into_tensor, got an older torch"
    if any(getattr(p, "use_muon", False) for group in optimizer.bit16_groups for p in group):
        return "an optimizer that works entry by entry, got Muon"
    return None
