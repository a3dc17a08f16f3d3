"""Slots of a ring that holds few arrays: each lies where what is in its way is furthest off.

A ring that turns over wastes up to its largest array, and as much again where two rounds meet. Of
two or three arrays that is a lot: a disk then waits for once in every round, as long as it takes to
read one, or more of the memory is ring.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

from memsched.passes.lower.fifo import Slot

# A ring is one of few arrays up to so many of its largest.
FEW_ARRAYS = 3
# What came so many rings' bytes before is in nobody's way.
REACH = 1
NEVER = 1 << 62


def holds_few(sizes: Sequence[int], ring_bytes: int) -> bool:
    """Whether turning over would waste much of a ring."""
    return ring_bytes <= FEW_ARRAYS * max(sizes, default=0)


# A visit shortly before or after another: where it begins and ends, and the bytes between the two.
_Near = tuple[int, int, int]


def gap_slots(sizes: Sequence[int], ring_bytes: int, *, repeat: bool) -> tuple[Slot, ...]:
    """Gives every visit a range of the ring, the same in each round.

    A link works without waiting for as long as what comes between two visits to one range takes.
    So that is as many bytes as there can be, to the visit before and, at the end of a round, to
    those of the next one.

    Args:
        sizes: bytes of each visit, multiples of the arena's alignment; so are all offsets.
        ring_bytes: size of the ring; no visit may be larger.
        repeat: the first visit follows the last one.
    """
    ring_bytes -= ring_bytes % max(
        1, math.gcd(*sizes)
    )  # a place at the end of the ring is aligned, too
    reached = [0, *itertools.accumulate(sizes)]
    starts: list[int] = []
    for index, nbytes in enumerate(sizes):
        back = ((one, reached[index] - reached[one + 1]) for one in reversed(range(index)))
        left = reached[-1] - reached[index + 1]
        forth = ((one, left + reached[one]) for one in range(index if repeat else 0))
        near = (_near(starts, sizes, visits, REACH * ring_bytes) for visits in (back, forth))
        starts.append(_best(nbytes, ring_bytes, *near))
    return tuple(
        Slot(start, _floor(starts, sizes, index, repeat=repeat))
        for index, start in enumerate(starts)
    )


def _near(
    starts: Sequence[int], sizes: Sequence[int], visits: Iterable[tuple[int, int]], most_bytes: int
) -> list[_Near]:
    """Those of some visits, the nearest first, that have no more bytes in between than these."""
    found = []
    for one, between in visits:
        if between > most_bytes:
            break
        found.append((starts[one], starts[one] + sizes[one], between))
    return found


def _best(nbytes: int, ring_bytes: int, before: Sequence[_Near], after: Sequence[_Near]) -> int:
    """The place with the most bytes to the nearer of the visits in its way; the lowest of these."""
    last = ring_bytes - nbytes
    tries = {0, last}
    for start, stop, _ in before:
        tries |= {stop, start - nbytes}
    best, most = 0, (-1, -1)
    for start in sorted(tries):
        if 0 <= start <= last:
            back = _between(start, start + nbytes, before)
            room = min(back, _between(start, start + nbytes, after)), back
            if room > most:
                best, most = start, room
    return best


def _between(start: int, stop: int, visits: Sequence[_Near]) -> int:
    """Bytes up to the next visit that is in the way of a range."""
    for first, last, between in visits:
        if first < stop and start < last:
            return between
    return NEVER


def _floor(starts: Sequence[int], sizes: Sequence[int], index: int, *, repeat: bool) -> int:
    """The number after the last visit in the way of one. In a round before it is the visit itself,
    at the latest.
    """
    start, stop, count = starts[index], starts[index] + sizes[index], len(starts)
    for other in range(index - 1, index - count - 1 if repeat else -1, -1):
        place = other % count
        if starts[place] < stop and start < starts[place] + sizes[place]:
            return other + 1
    return 0
