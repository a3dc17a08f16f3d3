"""From one state of all tiers to another, moving only the difference."""

import bisect
from collections.abc import Iterator, Mapping, Sequence

from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, HOST, NVME, Machine, Tier, rounded
from memsched.passes.lower.fifo import ring_slots
from memsched.passes.lower.moves import Move
from memsched.plan import Copy, Free, Plan, Residence
from memsched.program import ArraySpec, Program


def bridge(
    before: Sequence[Residence],
    after: Sequence[Residence],
    arrays: Mapping[str, ArraySpec],
    machine: Machine,
    order: Sequence[str],
) -> tuple[Program, Plan]:
    """A plan without steps that leads from one state of the weights to another.

    First it frees what is not wanted where it lies, then it copies what is missing. What rests in
    "nvme" only is not listed; nothing before means that everything is loaded.

    Args:
        before: where weights rest. Other kinds of arrays, and homes in "nvme", are passed over.
        after: where they shall rest.
        arrays: what is known of them.
        machine: tiers and links.
        order: the order in which they are wanted. Names that are not in it come last.

    Raises:
        DoesNotFitError: a weight has to pass through the host, and there is no room for it.
    """
    old, new = _held(before, arrays), _held(after, arrays)
    staying = [rest for key, rest in old.items() if new.get(key) == rest]
    rank = {name: index for index, name in enumerate(order)}
    missing = sorted(
        (rest for key, rest in new.items() if old.get(key) != rest),
        key=lambda rest: (rank.get(rest.array, len(rank)), rest.array),
    )
    moves = [Move(Free(rest.array, rest.tier)) for key, rest in old.items() if new.get(key) != rest]
    moves += _copies(staying, missing, new, arrays, machine)
    names = dict.fromkeys(rest.array for rest in (*old.values(), *new.values()))
    program = Program({name: arrays[name] for name in names}, (), ())
    home = tuple(Residence(name, NVME) for name in names)
    plan = Plan(
        program.digest,
        machine.digest,
        (*home, *old.values()),
        tuple(move.action for move in moves),
        (*home, *new.values()),
        {index: move.slot for index, move in enumerate(moves) if move.slot is not None},
    )
    return program, plan


def stays_idle(
    before: Sequence[Residence],
    plan: Plan,
    program: Program,
    peaks: Mapping[str, int],
    arrays: Mapping[str, ArraySpec],
    machine: Machine,
) -> tuple[Residence, ...]:
    """Weights of other programs that can stay where they are while a plan runs.

    Args:
        before: where weights rest now.
        plan: what runs next.
        program: its program.
        peaks: bytes that the plan takes in each tier, by `verify`.
        arrays: what is known of all weights.
        machine: tiers and their budgets.
    """
    idle: list[Residence] = []
    for tier in machine.tiers:
        touched = _touched(plan, program, tier)
        room = tier.capacity_bytes - peaks.get(tier.name, 0)
        foreign = (
            rest
            for rest in _held(before, arrays).values()
            if rest.tier == tier.name and rest.array not in program.arrays
        )
        for rest in sorted(foreign, key=lambda rest: (rest.offset or 0, rest.array)):
            nbytes = rounded(arrays[rest.array].nbytes, tier.alignment_bytes)
            if nbytes <= room and not _overlaps(touched, rest.offset, nbytes):
                idle.append(rest)
                room -= nbytes
    return tuple(idle)


def _held(
    rests: Sequence[Residence], arrays: Mapping[str, ArraySpec]
) -> dict[tuple[str, str], Residence]:
    """Weights outside "nvme", by name and tier."""
    return {
        (rest.array, rest.tier): rest
        for rest in rests
        if rest.tier != NVME and arrays[rest.array].kind == "weight"
    }


def _copies(
    staying: Sequence[Residence],
    missing: Sequence[Residence],
    new: Mapping[tuple[str, str], Residence],
    arrays: Mapping[str, ArraySpec],
    machine: Machine,
) -> Iterator[Move]:
    """Copies of what is missing. What only passes through the host comes first."""
    if machine.device_is_host:
        for rest in missing:
            yield Move(Copy(rest.array, NVME, DEVICE), rest.offset)
        return
    staged = [r.array for r in missing if r.tier == DEVICE and (r.array, HOST) not in new]
    in_the_way = _in_the_way(staged, staying, arrays, machine)
    yield from (Move(Free(rest.array, HOST)) for rest in in_the_way)
    kept = [rest for rest in staying if rest not in in_the_way]
    yield from _staged(staged, kept, arrays, machine)
    in_host = {rest.array for rest in kept if rest.tier == HOST}
    for rest in (*missing, *in_the_way):
        if rest.tier == HOST:
            yield Move(Copy(rest.array, NVME, HOST), rest.offset)
    for rest in missing:
        if rest.tier == DEVICE and (rest.array in in_host or (rest.array, HOST) in new):
            yield Move(Copy(rest.array, HOST, DEVICE))


def _in_the_way(
    names: Sequence[str],
    staying: Sequence[Residence],
    arrays: Mapping[str, ArraySpec],
    machine: Machine,
) -> tuple[Residence, ...]:
    """Neighbours in the host's arena, of the fewest bytes, without which any of `names` can pass.

    They are loaded again afterwards. None where a gap is large enough, or cannot be made.
    """
    tier = machine.tier(HOST)
    needed = max((_host_bytes(arrays[name], tier) for name in names), default=0)
    start, end = _largest_gap(staying, arrays, machine)
    if needed <= end - start:
        return ()
    rests = sorted((r for r in staying if r.tier == HOST), key=lambda rest: rest.offset or 0)
    starts = [rest.offset or 0 for rest in rests] + [tier.capacity_bytes]
    ends = [0] + [(rest.offset or 0) + _host_bytes(arrays[rest.array], tier) for rest in rests]
    best: tuple[int, int, int] | None = None
    last = 0
    for first in range(len(rests)):
        while last < len(rests) and starts[last] - ends[first] < needed:
            last += 1
        if starts[last] - ends[first] >= needed:
            moved = sum(
                end - start
                for start, end in zip(starts[first:last], ends[first + 1 :], strict=False)
            )
            if best is None or moved < best[0]:
                best = moved, first, last
    return () if best is None else tuple(rests[best[1] : best[2]])


def _host_bytes(array: ArraySpec, tier: Tier) -> int:
    return rounded(array.nbytes, tier.alignment_bytes)


def _staged(
    names: Sequence[str],
    staying: Sequence[Residence],
    arrays: Mapping[str, ArraySpec],
    machine: Machine,
) -> Iterator[Move]:
    """Brings weights through the largest gap in the host's arena, one after another."""
    tier = machine.tier(HOST)
    sizes = [rounded(arrays[name].nbytes, tier.alignment_bytes) for name in names]
    start, end = _largest_gap(staying, arrays, machine)
    if max(sizes, default=0) > end - start:
        raise DoesNotFitError(
            f"{max(sizes):,} B must pass through tier {HOST!r}, whose largest gap has "
            f"{end - start:,} B: raise its budget by {max(sizes) - end + start:,} B",
            {HOST: tier.capacity_bytes + max(sizes) - end + start},
        )
    slots = ring_slots(sizes, range(len(sizes)), end - start, wrap="array", rounds=1)
    freed = 0
    for name, slot in zip(names, slots, strict=True):
        while freed < slot.floor:
            yield Move(Free(names[freed], HOST))
            freed += 1
        yield Move(Copy(name, NVME, HOST), start + slot.offset)
        yield Move(Copy(name, HOST, DEVICE))
    for name in names[freed:]:
        yield Move(Free(name, HOST))


def _largest_gap(
    staying: Sequence[Residence], arrays: Mapping[str, ArraySpec], machine: Machine
) -> tuple[int, int]:
    """The largest free range of the host's arena, from a multiple of the alignment."""
    tier = machine.tier(HOST)
    taken = sorted(
        (
            rest.offset or 0,
            (rest.offset or 0) + rounded(arrays[rest.array].nbytes, tier.alignment_bytes),
        )
        for rest in staying
        if rest.tier == HOST
    )
    best, reached = (0, 0), 0
    for first, end in [*taken, (tier.capacity_bytes, tier.capacity_bytes)]:
        if first - reached > best[1] - best[0]:
            best = (reached, first)
        reached = max(reached, end)
    return best


def _touched(plan: Plan, program: Program, tier: Tier) -> list[tuple[int, int]]:
    """Ranges of a tier's arena that a plan uses, sorted and merged."""
    found = {(r.array, r.offset) for r in plan.entry if r.tier == tier.name}
    for index, offset in plan.slots.items():
        action = plan.actions[index]
        if isinstance(action, Copy) and action.target == tier.name:
            found.add((action.array, offset))
    ranges = sorted(
        (offset, offset + rounded(program.arrays[name].nbytes, tier.alignment_bytes))
        for name, offset in found
        if offset is not None
    )
    merged: list[tuple[int, int]] = []
    for first, end in ranges:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged


def _overlaps(merged: Sequence[tuple[int, int]], offset: int | None, nbytes: int) -> bool:
    """Whether a range of an arena shares bytes with one of some sorted, merged ranges."""
    if offset is None or not nbytes:
        return False
    at = bisect.bisect_left(merged, (offset + nbytes, 0))
    return at > 0 and merged[at - 1][1] > offset
