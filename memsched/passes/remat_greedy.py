"""An order for any program: what is cheap to make again, large and not wanted soon is let go.

Source: M. Kirisame and others, Dynamic tensor rematerialization, 2020. There the past says how soon
an array will be wanted; here the future is known.
"""

import bisect
import dataclasses
from collections.abc import Mapping

from memsched.passes.needs import Needs
from memsched.passes.remat_order import Order, repeatable, stays

# Repeated runs are no bargain any more where there are this many times the steps.
MOST_TIMES = 8


@dataclasses.dataclass(slots=True)
class _Walk:
    """What lies on the device on the way through a program.

    `maker` is the step that can make an array again, `locked` counts who needs it right now.
    `patience` is how much it matters that an array is not wanted soon.
    """

    needs: Needs
    room_bytes: int
    patience: float
    sizes: Mapping[str, int]
    maker: Mapping[str, int]
    sources: frozenset[str]
    held: set[str] = dataclasses.field(default_factory=set)
    locked: dict[str, int] = dataclasses.field(default_factory=dict)
    order: list[int] = dataclasses.field(default_factory=list)
    now: int = 0

    @property
    def used(self) -> int:
        return sum(self.sizes[name] for name in self.held)


def greedy_order(needs: Needs, room_bytes: int, patience: float) -> Order | None:
    """An order that needs about so much memory, or None if it repeats too much.

    Args:
        needs: the program and its machine.
        room_bytes: what arrays that are no weights may take.
        patience: how much it matters that an array is wanted late: 0 not at all.
    """
    walk = _start(needs, room_bytes, patience)
    for index in range(len(needs.program.steps)):
        walk.now = index
        if not _run(walk, index):
            return None
    return tuple(walk.order)


def _start(needs: Needs, room_bytes: int, patience: float) -> _Walk:
    program = needs.program
    again = repeatable(program)
    kept = set(stays(program))
    sizes = {n: needs.device_bytes[n] for n, a in program.arrays.items() if a.kind != "weight"}
    maker = {
        name: index
        for index in sorted(again)
        for name in program.steps[index].writes
        if kept.isdisjoint(program.steps[index].writes)
    }
    # What repeated runs start from is not let go.
    sources = {name for index in again for name in program.steps[index].reads if name not in maker}
    walk = _Walk(needs, room_bytes, patience, sizes, maker, frozenset(sources | kept))
    walk.held = {name for name in program.given if name in sizes}
    return walk


def _run(walk: _Walk, index: int) -> bool:
    """Runs a step, after what it reads was made again. False if that goes on for too long."""
    step = walk.needs.program.steps[index]
    if len(walk.order) > MOST_TIMES * len(walk.needs.program.steps):
        return False
    reads = [name for name in dict.fromkeys(step.inputs) if name in walk.sizes]
    for name in reads:
        walk.locked[name] = walk.locked.get(name, 0) + 1
    for name in reads:
        if name not in walk.held and not _run(walk, walk.maker[name]):
            return False
    made = [name for name in step.writes if name in walk.sizes]
    walk.held.difference_update(made)
    _make_room(walk, sum(walk.sizes[name] for name in made) + step.workspace_bytes)
    walk.order.append(index)
    walk.held.update(made)
    for name in reads:
        walk.locked[name] -= 1
    return True


def _make_room(walk: _Walk, wanted: int) -> None:
    """Frees the dead, then lets go what costs least for its bytes and the time it is not wanted."""
    for name in [name for name in walk.held if _is_dead(walk, name)]:
        walk.held.remove(name)
    used = walk.used
    while used + wanted > walk.room_bytes:
        living = [
            n for n in walk.held if n in walk.maker and not walk.locked.get(n) and walk.sizes[n]
        ]
        if not living:
            return
        victim = min(living, key=lambda name: (_price(walk, name), name))
        walk.held.remove(victim)
        used -= walk.sizes[victim]


def _is_dead(walk: _Walk, name: str) -> bool:
    """Whether nobody reads an array any more; what repeated runs start from never is."""
    if name in walk.sources or walk.locked.get(name):
        return False
    uses = walk.needs.uses[name]
    return not uses or uses[-1] < walk.now


def _price(walk: _Walk, name: str) -> float:
    """Seconds to make an array again, for each byte and step that it is not there."""
    uses = walk.needs.uses[name]
    at = bisect.bisect_left(uses, walk.now)
    # What only repeated runs read is wanted last.
    wanted = uses[at] if at < len(uses) else len(walk.needs.program.steps)
    wait = float(max(1, wanted - walk.now))
    patient: float = wait**walk.patience
    return _again_s(walk, name) / (walk.sizes[name] * patient)


def _again_s(walk: _Walk, name: str) -> float:
    """Seconds of the steps that would have to run to make an array from what is there."""
    program, seconds = walk.needs.program, 0.0
    seen: set[int] = set()
    wanted = [walk.maker[name]]
    while wanted:
        index = wanted.pop()
        if index not in seen:
            seen.add(index)
            seconds += walk.needs.step_s[index]
            reads = (n for n in program.steps[index].reads if n in walk.maker)
            wanted += [walk.maker[n] for n in reads if n not in walk.held]
    return seconds
