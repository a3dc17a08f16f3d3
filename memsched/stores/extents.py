"""Which parts of a file of fixed size are free."""

from memsched.stores.buffers import PAGE_BYTES

Extent = tuple[int, int]


class Extents:
    """The free extents (offset, bytes) of the whole pages of a range, in order of offset.

    Whatever asks for less than what is free gets it, in several extents if need be: nothing is
    ever lost to fragmentation.
    """

    def __init__(self, nbytes: int) -> None:
        whole = nbytes // PAGE_BYTES * PAGE_BYTES
        self._free: list[Extent] = [(0, whole)] if whole else []

    @property
    def free_bytes(self) -> int:
        """How much is left."""
        return sum(nbytes for _, nbytes in self._free)

    def take(self, nbytes: int) -> tuple[Extent, ...] | None:
        """Extents of `nbytes`, a multiple of the page size, in all; None if less is free."""
        if nbytes > self.free_bytes:
            return None
        taken: list[Extent] = []
        while nbytes:
            offset, size = self._free.pop(0)
            part = min(size, nbytes)
            taken.append((offset, part))
            nbytes -= part
            if part < size:
                self._free.insert(0, (offset + part, size - part))
        return tuple(taken)

    def give_back(self, extents: tuple[Extent, ...]) -> None:
        """Make extents free again; neighbours become one."""
        merged: list[Extent] = []
        for offset, nbytes in sorted([*self._free, *extents]):
            if merged and sum(merged[-1]) == offset:
                offset, nbytes = merged[-1][0], merged[-1][1] + nbytes
                merged.pop()
            merged.append((offset, nbytes))
        self._free = merged


def paged(nbytes: int) -> int:
    """What an array takes in the file: whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
