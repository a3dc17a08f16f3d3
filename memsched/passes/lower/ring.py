"""Streams weights through a ring per link, first in, first out.

Each copy is issued as early as its slot allows, which may be in the round before: then the weight
is in the entry and in the exit. A Free waits for the last reader and holds up everything issued
after it. So a slot is given back one step late, when the step after its last reader has been
issued and keeps the device busy, unless the ring is too small for that.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence

from memsched.machine import DEVICE, HOST, NVME
from memsched.passes.lower.fifo import Slot, byte_slots, ring_slots
from memsched.passes.lower.gaps import gap_slots, holds_few
from memsched.passes.lower.layout import Layout, Pool
from memsched.passes.lower.moves import Move, Moves
from memsched.passes.lower.timing import LATEST, Clock, Lane, Times, arrivals, departures
from memsched.passes.lower.visits import Visit, visits
from memsched.passes.needs import Needs
from memsched.plan import Copy, Free, Residence

# Rounds until the ring's content no longer depends on the first one.
SETTLED = 3


@dataclasses.dataclass(frozen=True, slots=True)
class _Stream:
    """Visits of one tier, coming over one link.

    `numbers` are their places in the order of all visits; `offsets` are None without an arena.
    """

    source: str
    target: str
    arrays: tuple[str, ...]
    numbers: tuple[int, ...]
    offsets: tuple[int | None, ...]
    times: Times


# A move with its place: after which step, and there in the order of a number, then of a rank.
_Event = tuple[int, int, int, Move]
_ORDER, _MOVE = operator.itemgetter(0, 1), operator.itemgetter(2)


def stream(needs: Needs, layout: Layout, *, repeat: bool) -> Moves | None:
    """The moves of all weights, or None if a ring of the layout is too small for a step.

    Args:
        needs: the program and its machine.
        layout: who rests where, and the rings.
        repeat: the plan follows itself, so the rings run on from round to round and the pinned are
            there before the first one. Otherwise everything comes from "nvme", the pinned to stay
            from their first to their last use, and nothing is left behind.
    """
    steps = len(needs.program.steps)
    clock = Clock(steps, -steps if repeat else -1, repeat)
    order = _order(needs, layout, repeat=repeat)
    staged: list[_Stream] = []
    start = [clock.earliest] * len(order)
    if layout.host is not None:
        found = _staging(needs, layout, layout.host, order, clock)
        if found is None:
            return None
        staged, start = found
    passing = _arriving(needs, layout, order, clock, start)
    return None if passing is None else _fold(needs, layout, [*passing, *staged], clock)


def _order(needs: Needs, layout: Layout, *, repeat: bool) -> tuple[Visit, ...]:
    """All visits to the device. What is pinned comes once, or is there already."""
    pinned = layout.device.pinned
    passing = {name for name in needs.weights if name not in pinned}
    found = visits(needs, passing, gap=layout.gap)
    if repeat:
        return found
    held = visits(needs, set(needs.weights) - passing, gap=len(needs.program.steps))
    return tuple(sorted((*found, *held), key=lambda visit: visit.first))


def _arriving(
    needs: Needs, layout: Layout, order: tuple[Visit, ...], clock: Clock, start: Sequence[int]
) -> list[_Stream] | None:
    """What comes to the device: through its ring, or to stay."""
    pool, arena = layout.device, needs.machine.device_is_host
    numbers = [index for index, visit in enumerate(order) if visit.array not in pool.pinned]
    ring = [order[index] for index in numbers]
    slots = _lane(needs.device_bytes, layout, pool, ring, clock, arena=arena)
    if slots is None:
        return None
    lane, offsets = slots
    gone = list(itertools.accumulate((visit.last for visit in ring), max))
    first = [visit.first for visit in ring]
    comes = arrivals(clock, lane, first, gone, [start[index] for index in numbers], late=1)
    if comes is None:
        return None
    due = [min(visit.last + 1, clock.steps - 1) for visit in ring]
    times = _renumbered(departures(clock, lane, comes, due), numbers, len(order))
    names = tuple(visit.array for visit in ring)
    streams = [_Stream(needs.source, DEVICE, names, tuple(numbers), offsets, times)]
    staying = [index for index, visit in enumerate(order) if visit.array in pool.pinned]
    known = dict(zip(numbers, comes, strict=True))
    held = _staying(needs.source, DEVICE, pool, order, staying, clock, known, start)
    return [*streams, held if arena else dataclasses.replace(held, offsets=(None,) * len(staying))]


def _staging(
    needs: Needs, layout: Layout, pool: Pool, order: tuple[Visit, ...], clock: Clock
) -> tuple[list[_Stream], list[int]] | None:
    """What comes to the host, and the step after which each visit can go on to the device.

    A slot in the host is free once its array is on the device. The step that reads the array has
    to wait for that, so to wait just before that step costs nothing.
    """
    numbers = [index for index, visit in enumerate(order) if visit.array not in pool.pinned]
    ring = [order[index] for index in numbers]
    slots = _lane(needs.host_bytes, layout, pool, ring, clock, arena=True)
    if slots is None:
        return None
    lane, offsets = slots
    first = [visit.first for visit in ring]
    gone = [step - 1 for step in first]
    comes = arrivals(clock, lane, first, gone, [clock.earliest] * len(ring), late=0)
    if comes is None:
        return None
    times = _renumbered(departures(clock, lane, comes, gone), numbers, len(order))
    names = tuple(visit.array for visit in ring)
    streams = [_Stream(NVME, HOST, names, tuple(numbers), offsets, times)]
    known = dict(zip(numbers, comes, strict=True))
    if not clock.repeat:
        seen: dict[str, int] = {}
        for index, visit in enumerate(order):
            if visit.array in pool.pinned:
                seen.setdefault(visit.array, index)
        staying = sorted(seen.values())
        none = [clock.earliest] * len(order)
        streams.append(_staying(NVME, HOST, pool, order, staying, clock, known, none))
        known |= dict(zip(staying, streams[-1].times.comes, strict=True))
    return streams, [known.get(index, clock.earliest) for index in range(len(order))]


def _staying(
    source: str,
    target: str,
    pool: Pool,
    order: tuple[Visit, ...],
    numbers: list[int],
    clock: Clock,
    known: Mapping[int, int],
    start: Sequence[int],
) -> _Stream:
    """What comes once and stays to the end, each in its turn among what passes."""
    comes, latest, wanted = [], clock.earliest, set(numbers)
    for index in range(len(order)):
        latest = max(latest, known.get(index, latest))
        if index in wanted:
            latest = max(latest, start[index])
            comes.append(latest)
    names = tuple(order[index].array for index in numbers)
    times = Times(tuple(comes), (clock.steps - 1,) * len(comes), (LATEST,) * len(comes))
    offsets = tuple(pool.pinned[name] for name in names)
    return _Stream(source, target, names, tuple(numbers), offsets, times)


def _lane(
    sizes: Mapping[str, int],
    layout: Layout,
    pool: Pool,
    ring: Sequence[Visit],
    clock: Clock,
    *,
    arena: bool,
) -> tuple[Lane, tuple[int | None, ...]] | None:
    """Slots in a ring, and who waits for whom. None if something is larger than the ring."""
    rounds = SETTLED if clock.repeat else 1
    nbytes = [sizes[visit.array] for visit in ring]
    if max(nbytes, default=0) > pool.ring_bytes:
        return None
    slots: tuple[Slot, ...]
    if arena and layout.wrap == "array" and holds_few(nbytes, pool.ring_bytes):
        slots = gap_slots(nbytes, pool.ring_bytes, repeat=clock.repeat)
    elif arena:
        steps = [visit.first for visit in ring]
        slots = ring_slots(nbytes, steps, pool.ring_bytes, wrap=layout.wrap, rounds=rounds)
    else:
        slots = byte_slots(nbytes, pool.ring_bytes, rounds=rounds)
    latest: dict[str, int] = {}
    if clock.repeat:
        latest = {visit.array: index - len(ring) for index, visit in enumerate(ring)}
    before = []
    for index, visit in enumerate(ring):
        before.append(latest.get(visit.array))
        latest[visit.array] = index
    lane = Lane(tuple(slot.floor for slot in slots), tuple(before))
    return lane, tuple(pool.ring_offset + slot.offset if arena else None for slot in slots)


def _renumbered(times: Times, numbers: Sequence[int], count: int) -> Times:
    """The same with the numbers of all visits instead of those of one ring."""

    def renumber(number: int) -> int:
        if number == LATEST:
            return LATEST
        turn, place = divmod(number, len(numbers))
        return numbers[place] + turn * count

    return dataclasses.replace(times, gone_for=tuple(renumber(one) for one in times.gone_for))


def _events(stream: _Stream, rank: int) -> Iterator[_Event]:
    """A Copy and a Free for each visit."""
    times, source, target = stream.times, stream.source, stream.target
    rows = zip(stream.arrays, stream.offsets, stream.numbers, strict=True)
    moments = zip(times.comes, times.goes, times.gone_for, strict=True)
    for (name, offset, number), (comes, goes, gone_for) in zip(rows, moments, strict=True):
        yield comes, number, rank, Move(Copy(name, source, target), offset)
        yield goes, gone_for, 0, Move(Free(name, target))


def _fold(needs: Needs, layout: Layout, streams: list[_Stream], clock: Clock) -> Moves:
    """Sorts all moves into one round, and says what rests where at its ends."""
    before: list[list[tuple[int, int, Move]]] = [[] for _ in range(clock.steps + 1)]
    entry: list[Residence] = []
    count = 1 + max((number for stream in streams for number in stream.numbers), default=0)
    for stream in streams:
        for step, number, rank, move in _events(stream, 2 if stream.target == DEVICE else 1):
            if clock.repeat and step < 0:
                step, number = step + clock.steps, min(number + count, LATEST)
            before[step + 1].append((number, rank, move))
        for index, name in enumerate(stream.arrays):
            if clock.repeat and stream.times.comes[index] < 0 <= stream.times.goes[index]:
                entry.append(Residence(name, stream.target, offset=stream.offsets[index]))
    if clock.repeat:
        entry += resting(needs, layout)
    moves = tuple(tuple(map(_MOVE, sorted(events, key=_ORDER))) for events in before)
    return Moves(tuple(entry), moves, tuple(entry))


def resting(needs: Needs, layout: Layout) -> Iterator[Residence]:
    """The pinned weights of this program."""
    arena = needs.machine.device_is_host
    device, host = layout.device.pinned, {} if layout.host is None else layout.host.pinned
    for name in needs.all_weights:
        if name in device:
            yield Residence(name, DEVICE, offset=device[name] if arena else None)
        if name in host:
            yield Residence(name, HOST, offset=host[name])
