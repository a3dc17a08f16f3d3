"""Offsets for weights that come and go in any order, the same in every round.

First fit: the largest first, each at the lowest offset where nothing lies during its stay. A stay
may lead over the end of the round into the next one.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class CyclicStay:
    """Bytes that are taken from moment `comes` until `goes`; over the round's end if not later."""

    nbytes: int
    comes: int
    goes: int


def cyclic_offsets(stays: Sequence[CyclicStay]) -> tuple[int, ...]:
    """An offset for each stay, such that no two share bytes at one moment."""
    offsets = [0] * len(stays)
    placed: list[int] = []
    for index in sorted(range(len(stays)), key=lambda i: (-stays[i].nbytes, stays[i].comes, i)):
        stay = stays[index]
        taken = sorted(
            (offsets[other], offsets[other] + stays[other].nbytes)
            for other in placed
            if _meet(stay, stays[other])
        )
        at = 0
        for first, end in taken:
            if first - at >= stay.nbytes:
                break
            at = max(at, end)
        offsets[index] = at
        placed.append(index)
    return tuple(offsets)


def _meet(one: CyclicStay, other: CyclicStay) -> bool:
    """Whether two stays have a moment in common."""
    return any(max(a, c) < min(b, d) for a, b in _pieces(one) for c, d in _pieces(other))


def _pieces(stay: CyclicStay) -> tuple[tuple[int, int], ...]:
    """The moments of a stay within one round, half open."""
    if stay.comes < stay.goes:
        return ((stay.comes, stay.goes),)
    return ((stay.comes, 1 << 62), (-1, stay.goes))
