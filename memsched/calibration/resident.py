"""How far the resident memory of this process grew, from the kernel's own marks."""

import gc
from pathlib import Path

from memsched.stores.heap import give_back

# What reading takes beside a plan, and what the heap keeps of a step: peaks of held-out programs
# were at most so much above their plans. Python, JAX and compiled programs were there before.
PROCESS_BYTES = 34_000_000
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def start_peak() -> int | None:
    """Resets the high-water mark; what is resident now, None where the kernel keeps no mark."""
    gc.collect()
    give_back()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _bytes("VmRSS")


def peak_since(before: int | None) -> int | None:
    """The most that was resident since, above what was resident then."""
    peak = _bytes("VmHWM")
    return None if before is None or peak is None else peak - before


def _bytes(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
