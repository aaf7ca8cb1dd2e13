"""The free blocks of some slabs."""

from bisect import bisect_left, insort

Block = tuple[int, int, int]  # slab, offset and length in bytes


class FreeList:
    """The free blocks of some slabs: the smallest that fits is taken, neighbours are joined again."""

    def __init__(self) -> None:
        self._free: list[Block] = []  # sorted

    def take(self, size: int) -> Block | None:
        """A block of `size` bytes, or None."""
        fitting = [block for block in self._free if block[2] >= size]
        if not fitting:
            return None
        slab, offset, length = min(fitting, key=lambda block: block[2])
        self._free.remove((slab, offset, length))
        if length > size:
            insort(self._free, (slab, offset + size, length - size))
        return slab, offset, size

    def give_back(self, block: Block) -> None:
        """Free a block, joined with the free ones beside it; a new slab is one too."""
        slab, offset, length = block
        index = bisect_left(self._free, block)
        if index < len(self._free) and self._free[index][:2] == (slab, offset + length):
            length += self._free.pop(index)[2]
        if index and self._free[index - 1][0] == slab and sum(self._free[index - 1][1:]) == offset:
            _, offset, before = self._free.pop(index - 1)
            length += before
        insort(self._free, (slab, offset, length))


def blocks_overlap(one: Block, other: Block) -> bool:
    """Whether two blocks share bytes."""
    return one[0] == other[0] and one[1] < sum(other[1:]) and other[1] < sum(one[1:])
