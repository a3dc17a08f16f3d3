"""Which pages of an array are in memory: of it alone, whatever else the process does."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

TABLE = Path("/proc/self/pagemap")
ENTRY_BYTES = 8
PRESENT_OR_SWAPPED = 62  # the two highest bits of an entry

known = pytest.mark.skipif(not TABLE.exists(), reason="the system does not tell its page table")


def resident_bytes(address: int, nbytes: int) -> int:
    """Bytes of the pages of a range that the system holds; it begins and ends at pages."""
    assert address % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0
    table = os.open(TABLE, os.O_RDONLY)
    try:
        wanted = nbytes // mmap.PAGESIZE * ENTRY_BYTES
        read = os.pread(table, wanted, address // mmap.PAGESIZE * ENTRY_BYTES)
    finally:
        os.close(table)
    assert len(read) == wanted
    held = np.frombuffer(read, np.uint64) >> np.uint64(PRESENT_OR_SWAPPED) != 0
    return int(held.sum()) * mmap.PAGESIZE
