"""Weights come when a step needs them, and leave when room is needed: any program, any policy.

This is what caches do at run time, written down ahead. It suits programs that read weights in an
irregular order; for the rest it is what better plans are compared with.
"""

import dataclasses

from memsched.machine import DEVICE, HOST, NVME
from memsched.passes.keep import Policy, PolicyMaker
from memsched.passes.lower.layout import Pool
from memsched.passes.lower.moves import Move, Moves
from memsched.passes.needs import Needs
from memsched.passes.slots import CyclicStay, cyclic_offsets
from memsched.plan import Copy, Free, Residence

# Until what is held at the end of a round is what was held at its start; then it is made so.
MOST_ROUNDS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Paged:
    """One round: who is there at its start, and before each step who leaves and who comes."""

    start: tuple[str, ...]
    leave: tuple[tuple[str, ...], ...]
    come: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(slots=True)
class _Memory:
    """What is held while a round is written."""

    needs: Needs
    budget_bytes: int
    policy: Policy
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    used: int = 0

    def come(self, name: str) -> None:
        self.held[name] = self.needs.device_bytes[name]
        self.used += self.held[name]
        self.policy.came(name, self.held[name])

    def leave(self, name: str) -> None:
        self.used -= self.held.pop(name)
        self.policy.left(name)


def page(needs: Needs, budget_bytes: int, maker: PolicyMaker, *, repeat: bool) -> Paged | None:
    """One round of demand paging within a budget, or None if a step's weights exceed it."""
    if needs.largest_step_bytes > budget_bytes:
        return None
    steps = len(needs.program.steps)
    memory = _Memory(needs, budget_bytes, maker(needs.uses, steps, budget_bytes))
    start: tuple[str, ...] = ()
    for turn in range(MOST_ROUNDS if repeat else 1):
        start = tuple(sorted(memory.held))
        rows = [_before_step(memory, turn * steps, index) for index in range(steps)]
        if repeat and tuple(sorted(memory.held)) == start:
            break
    wanted = set(start) if repeat else set()
    rows.append(
        (
            tuple(name for name in memory.held if name not in wanted),
            tuple(name for name in start if name not in memory.held),
        )
    )
    leave, come = zip(*rows, strict=True)
    return Paged(start, leave, come)


def paging_moves(
    needs: Needs, paged: Paged, device_bytes: int, host: Pool | None, *, packed: bool
) -> Moves | None:
    """The moves of a round, or None if first fit finds no offsets within `device_bytes`.

    In a machine with three tiers what does not rest in the host passes through the end of its
    arena, one at a time. Moves that are not `packed` have no offsets: good for their seconds only.
    """
    stays, numbers = _stays(needs, paged)
    arena = packed and needs.machine.device_is_host
    offsets = cyclic_offsets(stays) if arena else (0,) * len(stays)
    end = max((o + s.nbytes for o, s in zip(offsets, stays, strict=True)), default=0)
    if arena and end > device_bytes:
        return None
    place = {key: offsets[index] if arena else None for key, index in numbers.items()}
    before = []
    for step, (leaving, coming) in enumerate(zip(paged.leave, paged.come, strict=True)):
        moves = [Move(Free(name, DEVICE)) for name in leaving]
        for name in coming:
            moves += _fetch(name, place[name, step], host)
        before.append(tuple(moves))
    entry = [Residence(name, DEVICE, offset=place[name, -1]) for name in paged.start]
    entry += [
        Residence(name, HOST, offset=at) for name, at in (host.pinned if host else {}).items()
    ]
    return Moves(tuple(entry), tuple(before), tuple(entry))


def _before_step(memory: _Memory, base: int, index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Who leaves and who comes before a step."""
    names = memory.needs.step_weights[index]
    leaving: list[str] = []
    coming = tuple(name for name in names if name not in memory.held)
    wanted = sum(memory.needs.device_bytes[name] for name in coming)
    if memory.used + wanted > memory.budget_bytes:
        free = memory.held.copy()
        for name in names:
            free.pop(name, None)
        while memory.used + wanted > memory.budget_bytes:
            victim = memory.policy.victim(free.keys(), base + index)
            memory.leave(victim)
            leaving.append(victim)
            del free[victim]
    for name in names:
        if name in memory.held:
            memory.policy.used(name, base + index)
        else:
            memory.come(name)
    return tuple(leaving), coming


def _stays(needs: Needs, paged: Paged) -> tuple[list[CyclicStay], dict[tuple[str, int], int]]:
    """Stays with their moments (leaving 2k, coming 2k + 1 before step k), by name and arrival.

    Who is there at the start has the number -1 as well as that of its arrival.
    """
    stays: list[CyclicStay] = []
    numbers: dict[tuple[str, int], int] = {}
    here = dict.fromkeys(paged.start, -1)
    first_gone: dict[str, int] = {}
    for step, (leaving, coming) in enumerate(zip(paged.leave, paged.come, strict=True)):
        for name in leaving:
            came = here.pop(name)
            if came < 0:
                first_gone[name] = 2 * step
            else:
                numbers[name, came] = len(stays)
                stays.append(CyclicStay(needs.device_bytes[name], 2 * came + 1, 2 * step))
        for name in coming:
            here[name] = step
    for name, came in here.items():
        # Held over the end of the round: one stay, from its arrival to when it leaves next time.
        numbers[name, came] = numbers[name, -1] = len(stays)
        comes = -1 if came < 0 else 2 * came + 1
        goes = (1 << 62) if came < 0 else first_gone[name]
        stays.append(CyclicStay(needs.device_bytes[name], comes, goes))
    return stays, numbers


def _fetch(name: str, offset: int | None, host: Pool | None) -> list[Move]:
    """Copies a weight to the device, from where it rests."""
    if host is None:
        return [Move(Copy(name, NVME, DEVICE), offset)]
    last = Move(Copy(name, HOST, DEVICE), offset)
    if name in host.pinned:
        return [last]
    return [Move(Copy(name, NVME, HOST), host.ring_offset), last, Move(Free(name, HOST))]
