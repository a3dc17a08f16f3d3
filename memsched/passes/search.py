"""Which layout makes the fastest plan: ring sizes and pinned sets, tried on the simulator."""

import dataclasses

from memsched.cost import plan_seconds
from memsched.passes.effort import Effort
from memsched.passes.lower.assemble import assemble
from memsched.passes.lower.fifo import WRAPS
from memsched.passes.lower.layout import Layout, Pool
from memsched.passes.lower.ring import stream
from memsched.passes.lower.values import Values
from memsched.passes.needs import Needs
from memsched.passes.place import Spread
from memsched.passes.recipes import Recipe, Room, coarse, stacked
from memsched.plan import Plan

CLOSE_ENOUGH = 1.002
SAME = 1 + 1e-9  # of seconds, beside rounding
USUAL = Effort()


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A layout, the actions of everything else, the plan of both, the seconds of one round.

    `recipe` says how the layout was made, if it was by one.
    """

    seconds: float
    layout: Layout
    values: Values
    plan: Plan
    recipe: Recipe | None = None


def resident_layout(needs: Needs, host_bytes: int) -> Layout:
    """Everything stays on the device."""
    host = None if needs.machine.device_is_host else Pool({}, 0, host_bytes)
    return Layout(stacked(needs.weights, needs.device_bytes, 0), host)


def smallest_layout(needs: Needs, host_bytes: int) -> Layout:
    """Nothing stays, and the rings are as small as they can be."""
    ring = Pool({}, 0, needs.largest_step_bytes)
    host = None if needs.machine.device_is_host else Pool({}, 0, host_bytes)
    return Layout(ring, host, wrap="step", gap=0)


def evaluate(needs: Needs, layout: Layout, values: Values, *, repeat: bool) -> Found | None:
    """The plan of a layout, or None if a ring is too small for it."""
    moves = stream(needs, layout, repeat=repeat)
    if moves is None:
        return None
    plan = assemble(needs, moves, values)
    seconds = plan_seconds(plan, needs.program, needs.machine, needs.cost)
    return Found(seconds, layout, values, plan)


def evaluate_wrapped(
    needs: Needs, layout: Layout, values: Values, *, repeat: bool, recipe: Recipe | None = None
) -> Found | None:
    """The plan of a layout with the first way to turn its ring over that works, or None."""
    for wrap in WRAPS:
        found = evaluate(needs, dataclasses.replace(layout, wrap=wrap), values, repeat=repeat)
        if found is not None:
            return dataclasses.replace(found, recipe=recipe)
    return None


def tail_spill(needs: Needs, values: Values, room: Room, effort: Effort) -> Found | None:
    """The plain way: what is read first stays, the rest is streamed through the best ring found.

    The arguments are those of `search`.
    """
    layout = smallest_layout(needs, room.host_bytes)
    smallest = evaluate(needs, layout, values, repeat=room.repeat)
    return _tried(needs, values, room, ("tail",), smallest, effort.tail)


def search(
    needs: Needs, plain: Found | None, values: Values, room: Room, effort: Effort
) -> Found | None:
    """The fastest plan whose weights keep to their room, or None if there is none.

    Args:
        needs: the program and its machine.
        plain: what `tail_spill` found; the result is no slower.
        values: the actions of everything else.
        room: what weights may take, and whether the plan follows itself.
        effort: how much is tried.
    """
    return _tried(needs, values, room, ("time", "bytes"), plain, effort.search)


def _tried(
    needs: Needs,
    values: Values,
    room: Room,
    spreads: tuple[Spread, ...],
    start: Found | None,
    most_actions: int,
) -> Found | None:
    """The fastest of a plan and those of layouts, until so many actions have been simulated.

    Of two that are equally fast, the one that moves less: links and steps share memory and cores,
    so what is not moved leaves more to computing than any cost model says.
    """
    best, spent = start, 0
    for recipe, layout in coarse(needs, room, spreads):
        if best is not None and not _may_be_better(needs, layout, best):
            continue
        found = evaluate_wrapped(needs, layout, values, repeat=room.repeat, recipe=recipe)
        if found is None:
            continue
        spent += len(found.plan.actions)
        if best is None or _is_better(needs, found, best):
            best = found
        if spent > most_actions:
            break
    return best


def _may_be_better(needs: Needs, layout: Layout, best: Found) -> bool:
    least_s = least_seconds(needs, layout)
    if CLOSE_ENOUGH * least_s < best.seconds:
        return True
    return least_s <= best.seconds * SAME and _moved_s(needs, layout) < _moved_s(needs, best.layout)


def _is_better(needs: Needs, found: Found, best: Found) -> bool:
    if found.seconds < best.seconds / SAME:
        return True
    if found.seconds > best.seconds * SAME:
        return False
    return _moved_s(needs, found.layout) < _moved_s(needs, best.layout)


def least_seconds(needs: Needs, layout: Layout) -> float:
    """No round of a layout is shorter than its compute, nor than the copies of a link."""
    return max(sum(needs.step_s), *_copying_s(needs, layout))


def _moved_s(needs: Needs, layout: Layout) -> float:
    return sum(_copying_s(needs, layout))


def _copying_s(needs: Needs, layout: Layout) -> tuple[float, float]:
    """Seconds for which a round keeps the link to the device busy, and the one to the host."""
    passing = [name for name in needs.weights if name not in layout.device.pinned]
    arriving_s = sum((needs.arrival_s[name] for name in passing), 0.0)
    if layout.host is None:
        return arriving_s, 0.0
    staged = (name for name in passing if name not in layout.host.pinned)
    return arriving_s, sum((needs.staging_s[name] for name in staged), 0.0)
