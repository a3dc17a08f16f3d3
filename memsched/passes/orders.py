"""All sets of pinned weights and all orders of fetching the others, for programs of few weights."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from memsched.cost import plan_seconds
from memsched.passes.lower.assemble import assemble
from memsched.passes.lower.layout import Layout
from memsched.passes.lower.queues import Queue, queue_moves, queue_seconds, queued
from memsched.passes.lower.values import Values
from memsched.passes.lower.visits import Visit, visits
from memsched.passes.needs import Needs
from memsched.passes.recipes import Room, stacked
from memsched.passes.search import Found, least_seconds

# Seven weights have 5,040 orders, and 13,700 with all sets of pinned ones.
FEW = 7
# To look for offsets, where the tier does not place arrays itself, takes as long as so many orders.
PACKING_ORDERS = 50
# Less to gain is rounding.
FASTER = 1 - 1e-7


@dataclasses.dataclass(slots=True)
class _Trials:
    """The best plan so far, the seconds that the next queue must beat, and the orders left to try.

    `limit_s` is by queues alone: what else a plan moves, only the simulator knows.
    """

    best: Found
    limit_s: float
    left: int


def reordered(
    needs: Needs, found: Found, rooms: Iterable[tuple[Values, Room]], most_orders: int
) -> Found:
    """A plan at least as fast. If trying ends by itself, no other of its kind is faster.

    Of its kind are those that pin some weights and fetch the others round after round in one order,
    from where all of them rest, each as soon as there is room for it; where something else takes
    time of the link, they are compared as if it did not.

    Args:
        needs: the program and its machine.
        found: where to start.
        rooms: ways to do everything else, and what weights may take beside it.
        most_orders: trying stops after so many orders; to look for offsets counts as some, too.
    """
    if not most_orders or len(needs.weights) > FEW:
        return found
    trials = _Trials(found, found.seconds * FASTER, most_orders)
    for values, room in rooms:
        trials.limit_s = min(trials.limit_s, trials.best.seconds * FASTER)
        if not room.repeat or sum(needs.step_s) >= trials.limit_s:
            continue
        for least_s, layout in sorted(_layouts(needs, room), key=lambda one: one[0]):
            if least_s >= trials.limit_s or trials.left <= 0:
                break
            _try_orders(needs, layout, values, trials)
    return trials.best


def _layouts(needs: Needs, room: Room) -> Iterator[tuple[float, Layout]]:
    """All that leave the others room to pass, with the least seconds of each."""
    for stays in itertools.product((True, False), repeat=len(needs.weights)):
        kept = list(itertools.compress(needs.weights, stays))
        passing = [name for name in needs.weights if name not in kept]
        host_bytes = sum(needs.host_bytes[name] for name in passing)
        staged = not needs.machine.device_is_host and host_bytes > room.host_bytes
        device = stacked(kept, needs.device_bytes, room.device_bytes)
        loads = (
            sum(needs.device_bytes[name] for name in names if name not in kept)
            for names in needs.step_weights
        )
        fits = device.ring_offset <= room.device_bytes and device.ring_bytes >= max(loads)
        if not passing or staged or not fits:
            continue
        if needs.machine.device_is_host:
            layout = Layout(device)
        else:
            layout = Layout(device, stacked(passing, needs.host_bytes, room.host_bytes))
        yield least_seconds(needs, layout), layout


def _try_orders(needs: Needs, layout: Layout, values: Values, trials: _Trials) -> None:
    """All orders of one layout, that of use first."""
    steps, ring_bytes = len(needs.step_s), layout.device.ring_bytes
    passing = {name for name in needs.weights if name not in layout.device.pinned}
    in_turn = visits(needs, passing, gap=layout.gap)
    if len(in_turn) > FEW:
        return
    stuck: tuple[Visit, ...] | None = None
    for order in itertools.permutations(in_turn):
        if stuck is not None and order[: len(stuck)] == stuck:
            continue
        if trials.left <= 0:
            return
        trials.left -= 1
        nbytes = [needs.device_bytes[visit.array] for visit in order]
        queue = queued(order, nbytes, steps, ring_bytes)
        if isinstance(queue, int):
            stuck = order[:queue]
            continue
        if (seconds := queue_seconds(needs, queue)) >= trials.limit_s:
            continue
        if needs.machine.device_is_host:
            trials.left -= PACKING_ORDERS
        found = _planned(needs, layout, queue, values)
        if found is not None:
            trials.limit_s = seconds * FASTER
            if found.seconds < trials.best.seconds * FASTER:
                trials.best = found


def _planned(needs: Needs, layout: Layout, queue: Queue, values: Values) -> Found | None:
    """The plan of a queue, or None if it finds no offsets."""
    moves = queue_moves(needs, layout, queue)
    if moves is None:
        return None
    plan = assemble(needs, moves, values)
    seconds = plan_seconds(plan, needs.program, needs.machine, needs.cost)
    return Found(seconds, layout, values, plan)
