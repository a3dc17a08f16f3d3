"""Fetches of a few weights in any order, round after round: each as soon as there is room for it.

A ring is first in, first out, in the order of use. Here a weight may come before one that is read
earlier: it fills room, or time of a link, that others leave.
"""

import dataclasses
from collections.abc import Sequence

from memsched.machine import DEVICE
from memsched.passes.lower.layout import Layout
from memsched.passes.lower.moves import Move, Moves
from memsched.passes.lower.ring import resting
from memsched.passes.lower.visits import Visit
from memsched.passes.needs import Needs
from memsched.passes.slots import CyclicStay, fitting_offsets
from memsched.plan import Copy, Free, Residence

# Rounds until all are alike; an order that takes longer is given up.
MOST_ROUNDS = 8
# The simulator compares its third round with the second one.
TIMED_ROUNDS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Queue:
    """Visits in the order of their fetches, and the step after which each comes.

    Steps below zero belong to the round before.
    """

    visits: tuple[Visit, ...]
    comes: tuple[int, ...]


def queued(
    visits: tuple[Visit, ...], nbytes: Sequence[int], steps: int, room_bytes: int
) -> Queue | int:
    """The queue of some visits in this order, or how many of it make a step wait for ever.

    Args:
        visits: what is fetched in a round.
        nbytes: their sizes.
        steps: how many steps a round has.
        room_bytes: what they may take together.
    """
    here: dict[str, tuple[int, int]] = {}
    before: tuple[int, ...] = ()
    comes: list[int] = []
    free = room_bytes
    turn = index = 0
    for now in range(MOST_ROUNDS * steps):
        for name in [name for name, (last, _) in here.items() if last < now]:
            free += here.pop(name)[1]
        while nbytes[index] <= free and visits[index].array not in here:
            visit = visits[index]
            here[visit.array] = visit.last + turn * steps, nbytes[index]
            free -= nbytes[index]
            comes.append(now - 1 - turn * steps)
            index += 1
            if index == len(visits):
                if before == (found := tuple(comes)):
                    return Queue(visits, found)
                before, comes = found, []
                turn, index = turn + 1, 0
        if turn * steps + min(visit.first for visit in visits[index:]) <= now:
            return len(visits) if turn else index + 1
    return len(visits)


def queue_seconds(needs: Needs, queue: Queue) -> float:
    """A settled round, if nothing but weights moves and nothing slows anything else down."""
    steps = len(needs.step_s)
    coming: list[list[int]] = [[] for _ in range(steps)]
    reading: list[list[int]] = [[] for _ in range(steps)]
    for index, visit in sorted(enumerate(queue.visits), key=lambda one: queue.comes[one[0]] < 0):
        coming[(queue.comes[index] + 1) % steps].append(index)
        reading[visit.first].append(index)
    arrival_s = [needs.arrival_s[visit.array] for visit in queue.visits]
    ready = [0.0] * len(arrival_s)
    link = now = before = 0.0
    for turn in range(TIMED_ROUNDS):
        before = now
        for step, step_s in enumerate(needs.step_s):
            for index in coming[step]:
                if turn or queue.comes[index] >= 0:
                    link = ready[index] = max(link, now) + arrival_s[index]
            now = max([now, *(ready[index] for index in reading[step])]) + step_s
    return now - before


def queue_moves(needs: Needs, layout: Layout, queue: Queue) -> Moves | None:
    """The moves of a round, or None if there are no offsets for them in the ring.

    What is done with goes when something comes next, which waits for its room anyway.
    """
    steps = len(needs.step_s)
    gaps = sorted({come % steps for come in queue.comes})
    goes = [next((gap for gap in gaps if gap >= visit.last), steps - 1) for visit in queue.visits]
    offsets = _offsets(needs, layout, queue, goes)
    if offsets is None:
        return None
    before: list[list[Move]] = [[] for _ in range(steps + 1)]
    for visit, gone in zip(queue.visits, goes, strict=True):
        before[gone + 1].append(Move(Free(visit.array, DEVICE)))
    entry: list[Residence] = []
    for index in sorted(range(len(goes)), key=lambda one: (queue.comes[one] < 0, one)):
        name, come, offset = queue.visits[index].array, queue.comes[index], offsets[index]
        before[come % steps + 1].append(Move(Copy(name, needs.source, DEVICE), offset))
        if come < 0:
            entry.append(Residence(name, DEVICE, offset=offset))
    entry += resting(needs, layout)
    return Moves(tuple(entry), tuple(map(tuple, before)), tuple(entry))


def _offsets(
    needs: Needs, layout: Layout, queue: Queue, goes: Sequence[int]
) -> tuple[int | None, ...] | None:
    """Where each visit lies, the same in every round; None where the tier places arrays itself."""
    if not needs.machine.device_is_host:
        return (None,) * len(goes)
    steps, ring = len(needs.step_s), layout.device
    stays = [
        CyclicStay(needs.device_bytes[visit.array], 2 * (come % steps) + 1, 2 * gone)
        for visit, come, gone in zip(queue.visits, queue.comes, goes, strict=True)
    ]
    offsets = fitting_offsets(stays, ring.ring_bytes)
    return None if offsets is None else tuple(ring.ring_offset + offset for offset in offsets)
