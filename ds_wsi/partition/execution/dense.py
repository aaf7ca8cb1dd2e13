"""Whether a tensor fills its memory, and which parts of one do: what a copy between devices does at once."""

from collections.abc import Iterator

from torch import Tensor


def dense_pairs(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of two tensors of one shape, as large as the source's memory is dense."""
    if is_dense(source) or source.dim() < 2:
        yield source, target
        return
    for one, other in zip(source, target, strict=True):
        yield from dense_pairs(one, other)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or repeats, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
