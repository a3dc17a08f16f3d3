"""Offsets for weights that come and go in any order, the same in every round.

First fit: the largest first, each at the lowest offset where nothing lies during its stay. A stay
may lead over the end of the round into the next one.
"""

import dataclasses
from collections.abc import Iterable, Sequence

# Some 10 ms.
MOST_TRIES = 500


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
        taken = [
            (offsets[other], offsets[other] + stays[other].nbytes)
            for other in placed
            if _meet(stay, stays[other])
        ]
        offsets[index] = _lowest(stay.nbytes, taken)
        placed.append(index)
    return tuple(offsets)


def fitting_offsets(stays: Sequence[CyclicStay], capacity_bytes: int) -> tuple[int, ...] | None:
    """Offsets of a few stays within a capacity; None if there are none, or none is found in time.

    First fit in some order finds them: that of their offsets in a packing that fits moves each of
    them down, if at all. So all orders are tried, up to where one of those left has no room; and up
    to `MOST_TRIES` of their beginnings.
    """
    count = len(stays)
    meets = [[_meet(one, other) for other in stays] for one in stays]
    tries: list[tuple[tuple[int, int], ...]] = [()]
    seen: set[frozenset[tuple[int, int]]] = set()
    for _ in range(MOST_TRIES):
        if not tries:
            break
        placed = tries.pop()
        if len(placed) == count:
            return tuple(offset for _, offset in sorted(placed))
        left = set(range(count)).difference(index for index, _ in placed)
        more = []
        for index in sorted(left, key=lambda i: stays[i].nbytes):
            taken = [(at, at + stays[i].nbytes) for i, at in placed if meets[index][i]]
            more.append((*placed, (index, _lowest(stays[index].nbytes, taken))))
        if any(at + stays[index].nbytes > capacity_bytes for *_, (index, at) in more):
            continue
        tries += [one for one in more if frozenset(one) not in seen]
        seen.update(map(frozenset, more))
    return None


def _lowest(nbytes: int, taken: Iterable[tuple[int, int]]) -> int:
    """The lowest place for some bytes between ranges that are taken."""
    at = 0
    for first, end in sorted(taken):
        if first - at >= nbytes:
            break
        at = max(at, end)
    return at


def _meet(one: CyclicStay, other: CyclicStay) -> bool:
    """Whether two stays have a moment in common."""
    return any(max(a, c) < min(b, d) for a, b in _pieces(one) for c, d in _pieces(other))


def _pieces(stay: CyclicStay) -> tuple[tuple[int, int], ...]:
    """The moments of a stay within one round, half open."""
    if stay.comes < stay.goes:
        return ((stay.comes, stay.goes),)
    return ((stay.comes, 1 << 62), (-1, stay.goes))
