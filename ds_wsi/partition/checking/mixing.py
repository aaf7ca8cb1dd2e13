"""Whether a plain module's tiles depend on each other but for BatchNorm's statistics, and where they begin to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.norms.population import after_norm
from ds_wsi.partition.checking.trials import distance
from ds_wsi.partition.graph.leaves import has_own_forward, needs_batch_statistics
from ds_wsi.partition.module.observed import Calls, copied
from ds_wsi.partition.module.outputs import tensors_of
from ds_wsi.partition.module.restored import Restored

_ROUNDING = 100  # eps: the two runs have the same shapes, kernels and draws


@dataclass(frozen=True)
class Mixing:
    """Tiles that changed as others were replaced.

    Args:
        name: the innermost sub-module that mixes them.
        change: how much its output changes, as a share of the largest value.
    """

    name: str
    change: float


_Event = tuple[str, str, str, list[Tensor]]  # "enter" or "leave", a sub-module, its caller, what it takes or gives


def find_mixing(held: Restored, run: Callable[[Tensor], Any], tiles: Tensor) -> Mixing | None:
    """Replace half of the tiles, with the norms' statistics and the draws as they were: the others must stay.

    Args:
        held: the module.
        run: the module's own forward on tiles.
        tiles: [n, ...]; of one tile nothing can be said.

    Returns:
        None where the other tiles' outputs are as before.
    """
    if len(tiles) < 2:
        return None
    norms = _Pinned(held)
    before = _observe(held, norms, run, tiles)
    for bit in range((len(tiles) - 1).bit_length()):  # any two tiles differ in one
        for which in (0, 1):
            changed = with_others(tiles, which, 1 << bit)
            mixing = _first_change(before, _observe(held, norms, run, changed), len(tiles), (1 - which, 1 << bit))
            if mixing is not None:
                return mixing
    return None


class _Pinned:
    """Train-mode BatchNorms whose statistics are those of the first run in the second, call by call."""

    def __init__(self, held: Restored) -> None:
        self.norms = [part for part in held.names if needs_batch_statistics(part) and has_own_forward(part)]
        self.statistics: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {norm: [] for norm in self.norms}
        self.again = False

    def put_in(self) -> None:
        """Give the norms their forward for the next run."""
        counts = dict.fromkeys(self.norms, 0)

        def forward_of(norm: Any) -> Callable[[Tensor], Tensor]:
            def forward(z: Tensor) -> Tensor:
                if not self.again:
                    dims = [dim for dim in range(z.dim()) if dim != 1]
                    var, mean = torch.var_mean(z, dims, correction=0)
                    self.statistics[norm].append((mean, var))
                mean, var = self.statistics[norm][min(counts[norm], len(self.statistics[norm]) - 1)]
                counts[norm] += 1
                return after_norm(norm, F.batch_norm(z, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps))

            return forward

        for norm in self.norms:
            norm.__dict__["forward"] = forward_of(norm)


def with_others(tiles: Tensor, which: int, run: int = 1) -> Tensor:
    """Every second run of tiles replaced by others, and larger: tiles may be alike; what is not negative stays so."""
    changed, others = tiles.clone(), tiles.roll(1, 0)
    if tiles.is_floating_point():
        others = 1.5 * others + 0.125 * tiles.abs().max()
    places = _places(len(tiles), which, run)
    changed[places] = others[places]
    return changed


def _places(count: int, which: int, run: int) -> list[int]:
    """The tiles of every second run of this length."""
    return [index for index in range(count) if index // run % 2 == which]


def _observe(held: Restored, norms: _Pinned, run: Callable[[Tensor], Any], tiles: Tensor) -> list[_Event]:
    """What sub-modules take and give, in order, and last what the module does."""
    held.rewind()
    norms.put_in()
    seen: list[_Event] = []

    def enter(name: str, caller: str, tensors: list[Tensor]) -> None:
        seen.append(("enter", name, caller, [copied(tensor) for tensor in tensors]))

    def leave(name: str, caller: str, tensors: list[Tensor]) -> None:
        seen.append(("leave", name, caller, [copied(tensor) for tensor in tensors]))

    with Calls(held.names, held.module, enter, leave), torch.no_grad():
        out = run(tiles.clone())
    norms.again = True
    leave("", "", tensors_of(out))
    return seen


def _first_change(before: list[_Event], after: list[_Event], tiles: int, kept: tuple[int, int]) -> Mixing | None:
    total = _change(before[-1][3], after[-1][3], tiles, kept)
    if total is None:
        return None
    for one, other in zip(before, after, strict=False):
        kind, name, caller, values = one
        if one[:3] != other[:3]:  # another way through the code: it looked at other tiles
            return Mixing(caller, total)
        change = _change(values, other[3], tiles, kept)
        if change is not None:
            return Mixing(name, change) if kind == "leave" else Mixing(caller, change)
    return Mixing("", total)


def _change(before: list[Tensor], after: list[Tensor], tiles: int, kept: tuple[int, int]) -> float | None:
    """How much the tiles that stayed have changed; None where they are the same but for rounding."""
    worst = None
    for one, other in zip(before, after, strict=False):
        if one.shape != other.shape or one.dim() == 0 or one.shape[0] % tiles or not one.numel():
            continue
        one, other = (part.unflatten(0, (tiles, -1))[_places(tiles, *kept)] for part in (one, other))
        if torch.equal(one, other):
            continue
        change = distance(one, other)
        if not one.is_floating_point() or change > _ROUNDING * torch.finfo(one.dtype).eps:
            worst = change if worst is None else max(worst, change)
    return worst
