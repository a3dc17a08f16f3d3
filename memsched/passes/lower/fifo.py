"""Slots of a ring: what comes first leaves first, and every round uses the same offsets."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

# "array": the ring turns over when the next array does not fit before its end. "step": when all
# arrays of the next step do not; nothing smaller than the largest step then ever gets stuck.
Wrap = Literal["array", "step"]
WRAPS: tuple[Wrap, ...] = ("array", "step")


class Slot(NamedTuple):
    """Where a visit lies in the ring. All visits before number `floor` must have left by then.

    Numbers below zero count back into the round before.
    """

    offset: int
    floor: int


def ring_slots(
    sizes: Sequence[int], steps: Sequence[int], ring_bytes: int, *, wrap: Wrap, rounds: int
) -> tuple[Slot, ...]:
    """Gives every visit a range of the ring, one after another, from 0 again in each round.

    Args:
        sizes: bytes of each visit.
        steps: the step that first reads it.
        ring_bytes: size of the ring; no visit may be larger.
        wrap: when the ring turns over.
        rounds: how many rounds to go through. The last one counts; from the third on all are alike.
    """
    together = _together(sizes, steps, wrap)
    count = len(sizes)
    ends: list[tuple[int, int]] = []
    slots: list[Slot] = []
    oldest = at = 0
    for turn in range(rounds):
        slots = []
        for index, nbytes in enumerate(sizes):
            turned = at + together[index] > ring_bytes or (index == 0 and turn > 0)
            if turned:
                oldest = _pass_tail(ends, oldest, at)
                at = 0
            while oldest < len(ends) and ends[oldest][0] < at + nbytes and ends[oldest][1] > at:
                oldest += 1
            ends.append((at, at + nbytes))
            slots.append(Slot(at, oldest - turn * count))
            at += nbytes
    return tuple(slots)


def byte_slots(sizes: Sequence[int], ring_bytes: int, *, rounds: int) -> tuple[Slot, ...]:
    """The same where a tier places arrays itself: only bytes count, offsets are 0."""
    count = len(sizes)
    live = oldest = 0
    slots: list[Slot] = []
    for turn in range(rounds):
        slots = []
        for index, nbytes in enumerate(sizes):
            while live + nbytes > ring_bytes and oldest < turn * count + index:
                live -= sizes[oldest % count]
                oldest += 1
            live += nbytes
            slots.append(Slot(0, oldest - turn * count))
    return tuple(slots)


def _together(sizes: Sequence[int], steps: Sequence[int], wrap: Wrap) -> list[int]:
    """Bytes that must fit in front of the ring's end for each visit, itself included."""
    if wrap == "array":
        return list(sizes)
    total: dict[int, int] = {}
    for nbytes, step in zip(sizes, steps, strict=True):
        total[step] = total.get(step, 0) + nbytes
    started: set[int] = set()
    found = []
    for nbytes, step in zip(sizes, steps, strict=True):
        found.append(nbytes if step in started else total[step])
        started.add(step)
    return found


def _pass_tail(ends: list[tuple[int, int]], oldest: int, at: int) -> int:
    """What still lies behind `at` is older than what lies at the ring's start: it leaves first."""
    while oldest < len(ends) and ends[oldest][0] >= at:
        oldest += 1
    return oldest
