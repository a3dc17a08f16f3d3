"""One range of main memory that holds arrays at planned places."""

import mmap

import numpy as np

from memsched.errors import PlanError, StoreError
from memsched.stores.blocks import Bytes
from memsched.stores.buffers import PAGE_BYTES, pages


class Arena:
    """`nbytes` of address space. Memory is taken page by page, when it is first touched.

    It begins at a page boundary, at that of a huge page if it is as large as one; huge pages are
    asked for. Every slot begins at a multiple of `alignment`.

    Raises:
        StoreError: the system has no address space left.
    """

    def __init__(self, nbytes: int, alignment: int = 64) -> None:
        self.nbytes = nbytes
        self.alignment = alignment
        try:
            self._memory, self._start = pages(nbytes)
        except OSError as error:
            raise StoreError(
                f"no address space for an arena of {nbytes:,} B: {error.strerror}; "
                "lower the memory budget or raise the limit of the process (ulimit -v)"
            ) from None
        whole = np.frombuffer(self._memory, np.uint8)
        self._bytes = whole[self._start : self._start + nbytes]

    def view(self, offset: int, nbytes: int) -> Bytes:
        """The memory of one slot. It may be kept, but its content is the plan's business.

        Raises:
            PlanError: the slot does not lie in the arena, or not at a multiple of the alignment.
        """
        self._check(offset, nbytes)
        return self._bytes[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Give the pages that lie wholly in a range back; they read as zeros afterwards.

        Raises:
            PlanError: as `view`.
        """
        self._check(offset, nbytes)
        low = -(-(self._start + offset) // PAGE_BYTES) * PAGE_BYTES
        high = (self._start + offset + nbytes) // PAGE_BYTES * PAGE_BYTES
        if low < high:
            self._memory.madvise(mmap.MADV_DONTNEED, low, high - low)

    def close(self) -> None:
        """Give the memory back, as soon as the last view of it is gone."""
        self._bytes = self._bytes[:0].copy()
        try:
            self._memory.close()
        except BufferError:
            # The views that are left hold it; the last one takes it along.
            del self._memory

    def _check(self, offset: int, nbytes: int) -> None:
        inside = offset >= 0 and nbytes >= 0 and offset + nbytes <= self._bytes.size
        if not inside or offset % self.alignment:
            raise PlanError(
                f"slot of {nbytes:,} B at offset {offset:,} of an arena of {self._bytes.size:,} B: "
                f"it must lie inside, at a multiple of {self.alignment} B"
            )
