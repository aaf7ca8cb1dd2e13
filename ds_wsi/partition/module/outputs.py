"""What a module returns for tiles: a tensor, or tensors in a tuple, dict or ModelOutput, as one tensor to join."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Rows:
    """One tensor of an output.

    Args:
        per_tile: rows that a tile has in it.
        shape: a row's shape.
        dtype: the tensor's dtype.
    """

    per_tile: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class OutputForm:
    """How an output is made of one tensor [tiles, numbers], and the other way round.

    Args:
        tree: the output's tree; None where it is a single tensor.
        leaves: the tree's leaves: tensors, or values that are the same in every call.
        dtype: the joint tensor's dtype: it holds every part's numbers exactly.
    """

    tree: Any
    leaves: tuple[Any, ...]
    dtype: torch.dtype

    @property
    def is_plain(self) -> bool:
        """One tensor with a row for each tile: nothing to do."""
        return self.tree is None and self.leaves[0].per_tile == 1

    @property
    def words(self) -> str:
        """The output's leaves, for a sentence."""
        leaves = (
            f"{'' if leaf.per_tile == 1 else f'{leaf.per_tile} '}rows {list(leaf.shape)}"
            if isinstance(leaf, Rows)
            else repr(leaf)
            for leaf in self.leaves
        )
        return ", ".join(leaves)

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """The output's tensors, in their order, as one: [tiles, numbers]."""
        rows = [leaf for leaf in self.leaves if isinstance(leaf, Rows)]
        parts = [
            tensor.reshape(tensor.shape[0] // leaf.per_tile, leaf.per_tile * _numbers(leaf)).to(self.dtype)
            for tensor, leaf in zip(tensors, rows, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def unpack(self, packed: Tensor) -> Any:
        """The output, of the joint tensor of all tiles."""
        sizes = [leaf.per_tile * _numbers(leaf) for leaf in self.leaves if isinstance(leaf, Rows)]
        parts = iter(packed.split(sizes, dim=1))
        values = [
            next(parts).reshape(packed.shape[0] * leaf.per_tile, *leaf.shape).to(leaf.dtype)
            if isinstance(leaf, Rows)
            else leaf
            for leaf in self.leaves
        ]
        return values[0] if self.tree is None else pytree.tree_unflatten(values, self.tree)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an output, in their order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def form_of(output: Any, tiles: int, owner: str) -> OutputForm:
    """The form of what a module returned for this many tiles.

    Args:
        output: a tensor, or a tree of tensors and of None, numbers, flags and strings.
        tiles: the number of tiles that it was computed from, 2 or more where that can be had.
        owner: the module's class, for errors.

    Raises:
        ValueError: a tensor without tiles on its first axis, one that is not floating-point where there are several,
            no tensor at all, or an object that holds tensors nobody can reach.
    """
    leaves, tree = pytree.tree_flatten(output)
    form: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.layout is not torch.strided or leaf.is_nested:
                raise ValueError(
                    f"the output of {owner} must be dense tensors, got a {leaf.layout} one. HINT: to_dense()."
                )
            if leaf.dim() == 0 or leaf.shape[0] == 0 or leaf.shape[0] % tiles:
                raise ValueError(
                    f"the output of {owner} must have tiles on its first axis, got {list(leaf.shape)} for {tiles} "
                    "tiles. HINT: partition the part that returns features of tiles."
                )
            form.append(Rows(leaf.shape[0] // tiles, tuple(leaf.shape[1:]), leaf.dtype))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            form.append(leaf)
        else:
            raise ValueError(
                f"the output of {owner} must be a tensor, or a tuple, list, dict or ModelOutput of tensors, got a "
                f"{type(leaf).__name__}. HINT: partition the part that returns features of tiles."
            )
    rows = [leaf for leaf in form if isinstance(leaf, Rows)]
    if not rows:
        raise ValueError(f"the output of {owner} must hold a tensor, got {output!r}")
    single = isinstance(output, Tensor)
    if not single and not all(leaf.dtype.is_floating_point for leaf in rows):
        raise ValueError(
            f"the output of {owner} must be floating-point tensors, got {[leaf.dtype for leaf in rows]}. "
            "HINT: partition the part that returns features of tiles."
        )
    dtype = rows[0].dtype
    for leaf in rows[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return OutputForm(None if single else tree, tuple(form), dtype)


def _numbers(leaf: Rows) -> int:
    count = 1
    for size in leaf.shape:
        count *= size
    return count
