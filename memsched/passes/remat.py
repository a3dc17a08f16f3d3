"""Rematerialisation: what is not worth its room, nor the way out and back, is computed again.

For several amounts of memory an order of steps is made in which some run again: by a dynamic
programme where the program is a chain there and back, and by a greedy rule; both are polished.
Each order is planned like any program, so what is kept, moved out or computed again is decided by
the predicted time of the whole.
"""

from collections.abc import Callable, Iterator

from memsched.cost import Remembered, plan_seconds
from memsched.errors import DoesNotFitError
from memsched.passes.lower.values import value_budgets
from memsched.passes.needs import Needs, read_needs
from memsched.passes.remat_chain import as_chain
from memsched.passes.remat_greedy import greedy_order
from memsched.passes.remat_optimum import solve
from memsched.passes.remat_order import Order, repeatable, unroll
from memsched.passes.remat_polish import compute_s, fitted, peak_bytes, polished, pruned, read_runs
from memsched.plan import Copy, Plan

# Memories to try, as shares of the way from the least (all moved out) to the most (all kept).
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
PATIENCE = (1.0, 0.5)
# The table counts in rounded units, so orders for somewhat more or less memory may be the best.
GENEROUS = (1.6, 1.4, 1.25, 1.15, 1.1, 1.08, 1.06, 1.04, 1.03, 1.02, 1.01, 1.0, 0.98, 0.95)
# So many orders are polished, the fastest first.
STARTS = 3
# Less to gain than this share of the device is not worth the planning.
WORTH_TRYING = 0.02

Planner = Callable[[Needs], Plan]


def rematerialised(needs: Needs, planner: Planner) -> Plan:
    """The fastest plan by prediction, among that of the planner and those that compute again.

    Args:
        needs: the program and its machine.
        planner: makes a plan that runs each step once; it is asked for other programs, too.

    Raises:
        DoesNotFitError: no plan keeps within the budgets, whatever is computed again.
    """
    best, refusal = None, None
    try:
        best = planner(needs)
    except DoesNotFitError as error:
        if not _is_rescuable(needs):
            raise
        refusal = error
    if best is not None and not _promising(needs, best):
        return best
    best_s = float("inf") if best is None else _seconds(needs, best)
    for order in dict.fromkeys(orders(needs)):
        found = _planned(needs, order, planner, best_s)
        if found is not None:
            best, best_s = found, _seconds(needs, found)
    if best is None:
        assert refusal is not None, "either there is a plan, or a reason why not"
        raise refusal
    return best


def orders(needs: Needs) -> Iterator[Order]:
    """Orders worth planning: for what is left beside the weights, and for more than that.

    In more memory less is computed again, and the planner moves out what does not fit, or streams
    weights.
    """
    budgets = value_budgets(needs)
    beside = needs.device_capacity_bytes - needs.weights_bytes
    rooms = [int(budgets.spilled + share * (budgets.tight - budgets.spilled)) for share in SHARES]
    plain = tuple(range(len(needs.program.steps)))
    for room in dict.fromkeys([beside, *(room for room in rooms if room > beside)]):
        if budgets.spilled <= room < budgets.tight:
            order = best_order(needs, room)
            if order is not None and order != plain:
                yield order


def best_order(needs: Needs, room_bytes: int) -> Order | None:
    """The order with the least compute time found that needs no more than a memory."""
    runs = read_runs(needs.program, _sizes(needs), needs.step_s)
    made = set(_orders(needs, room_bytes))
    fitting = {order for order in made if peak_bytes(runs, order) <= room_bytes}
    if not fitting:
        fitting = {order for one in made if (order := fitted(runs, one, room_bytes)) is not None}
    fitting = {pruned(runs, order, room_bytes) for order in fitting}
    fastest = sorted(fitting, key=lambda order: (compute_s(runs, order), order))
    found = [polished(runs, order, room_bytes) for order in fastest[:STARTS]]
    return min(found, key=lambda order: (compute_s(runs, order), order), default=None)


def _orders(needs: Needs, room_bytes: int) -> Iterator[Order]:
    """Orders that need about a memory."""
    chain = as_chain(needs)
    if chain is not None:
        table = solve(chain, int(max(GENEROUS) * room_bytes))
        for generous in GENEROUS:
            order = table.order(int(generous * room_bytes))
            if order is not None:
                yield order
    for patience in PATIENCE:
        order = greedy_order(needs, room_bytes, patience)
        if order is not None:
            yield order


def _planned(needs: Needs, order: Order, planner: Planner, limit_s: float) -> Plan | None:
    """The plan of an order, or None if it takes as long as the limit or does not fit."""
    if sum(needs.step_s[index] for index in order) >= limit_s:
        return None
    unrolled = unroll(needs.program, order)
    cost = Remembered(unrolled.cost(needs.cost, needs.program))
    try:
        made = planner(read_needs(unrolled.program, needs.machine, cost))
    except DoesNotFitError:
        return None
    plan = unrolled.rolled_up(made, needs.program)
    return plan if _seconds(needs, plan) < limit_s else None


def _is_rescuable(needs: Needs) -> bool:
    """Whether each step fits by itself, and arrays that can be made again take much room."""
    least = needs.largest_step_bytes + value_budgets(needs).spilled
    return least <= needs.device_capacity_bytes and _is_much(needs, _idle_bytes(needs))


def _promising(needs: Needs, plan: Plan) -> bool:
    """Whether a plan waits for something, and arrays that can be made again take room.

    Much room, if no values are moved.
    """
    program, idle_bytes = needs.program, _idle_bytes(needs)
    if not idle_bytes:
        return False
    moved = (action.array for action in plan.actions if isinstance(action, Copy))
    values_move = any(program.arrays[name].kind != "weight" for name in moved)
    if not values_move and not _is_much(needs, idle_bytes):
        return False
    return _seconds(needs, plan) > sum(needs.step_s)


def _is_much(needs: Needs, nbytes: int) -> bool:
    return nbytes > WORTH_TRYING * needs.device_capacity_bytes


def _idle_bytes(needs: Needs) -> int:
    """The most that could be let go at once: made by steps that can run again, and waiting."""
    again, change = repeatable(needs.program), dict[int, int]()
    for index in again:
        for name in needs.program.steps[index].writes:
            uses = needs.uses[name]
            for before, after in zip((index, *uses), uses, strict=False):
                if after > before + 1:
                    change[before] = change.get(before, 0) + needs.device_bytes[name]
                    change[after] = change.get(after, 0) - needs.device_bytes[name]
    held = most = 0
    for place in sorted(change):
        held += change[place]
        most = max(most, held)
    return most


def _seconds(needs: Needs, plan: Plan) -> float:
    return plan_seconds(plan, needs.program, needs.machine, needs.cost)


def _sizes(needs: Needs) -> dict[str, int]:
    """Bytes of what is no weight."""
    arrays = needs.program.arrays.values()
    return {one.name: needs.device_bytes[one.name] for one in arrays if one.kind != "weight"}
