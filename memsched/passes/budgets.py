"""How a tier is divided between weights and everything else, and the least that would do."""

from collections.abc import Iterable, Mapping

from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, HOST, NVME
from memsched.passes.effort import Effort
from memsched.passes.lower.values import (
    ValueBudgets,
    Values,
    largest_value_bytes,
    value_actions,
    value_budgets,
)
from memsched.passes.needs import Needs
from memsched.passes.orders import reordered
from memsched.passes.recipes import read_room
from memsched.passes.refine import MOST_WEIGHTS, refined
from memsched.passes.search import (
    USUAL,
    Found,
    evaluate,
    evaluate_wrapped,
    least_seconds,
    resident_layout,
    search,
    tail_spill,
)
from memsched.passes.starts import starts
from memsched.passes.tune import tuned

# Where everything else must be spilled to make room, the ring is tried at these multiples of the
# largest step's weights.
RING_SHARES = (1.0, 1.5, 2.0, 3.0)
UNLIMITED = 1 << 62


def fastest(needs: Needs, *, repeat: bool, others_bytes: int = 0, effort: Effort = USUAL) -> Found:
    """The fastest plan by the simulator.

    Args:
        needs: the program and its machine.
        repeat: whether the plan follows itself.
        others_bytes: weights of other programs that are worth keeping, where everything fits.
        effort: how much is tried.

    Raises:
        DoesNotFitError: there is none within the budgets.
    """
    budgets = value_budgets(needs)
    capacity = needs.device_capacity_bytes
    check_fits(needs, budgets)
    if needs.weights_bytes + budgets.tight <= capacity:
        room = capacity - needs.weights_bytes
        values = _values(needs, budgets, max(room - others_bytes, min(budgets.relaxed, room)))
        layout = resident_layout(needs, host_room(needs, values))
        found = evaluate(needs, layout, values, repeat=repeat)
        if found is not None:
            return found
    best: Found | None = None
    rooms, plain_ones = [], []
    for budget in _divisions(needs, budgets):
        try:
            values = _values(needs, budgets, budget)
        except DoesNotFitError:
            # Less is spilled by the division before. The first one is the last resort.
            if best is None:
                raise
            continue
        weights_bytes = capacity - values.device_bytes
        host_bytes = host_room(needs, values)
        weights_room = read_room(needs, weights_bytes, host_bytes, repeat=repeat)
        plain = tail_spill(needs, values, weights_room, effort)
        found = search(needs, plain, values, weights_room, effort)
        if found is not None:
            found = refined(needs, found, weights_bytes, repeat=repeat)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
        rooms.append((values, weights_room))
        plain_ones.append(plain)
    if best is None:
        raise _refusal(needs, smallest_bytes(needs, budgets))
    best = _improved(needs, best, repeat=repeat, effort=effort)
    best = reordered(needs, best, rooms, effort.orders)
    return best if needs.judge is None else _or_plain(needs, best, plain_ones)


def _or_plain(needs: Needs, best: Found, plain_ones: Iterable[Found | None]) -> Found:
    """The plain way in its place, if it is faster by who predicts plans in the end."""
    alike = (one for one in plain_ones if one is not None and one.values is best.values)
    plain = next(alike, None)
    if plain is None or needs.seconds(plain.plan) >= needs.seconds(best.plan):
        return best
    return plain


def _improved(needs: Needs, best: Found, *, repeat: bool, effort: Effort) -> Found:
    """A plan with rings that suit it better, or one that integer programming leads to."""
    room = needs.device_capacity_bytes - best.values.device_bytes
    host_bytes = host_room(needs, best.values)
    best = tuned(needs, best, room, host_bytes, repeat=repeat, most_actions=effort.tune)
    if not repeat or len(needs.weights) <= MOST_WEIGHTS:
        return best
    for layout in starts(needs, room, host_bytes, effort.starts):
        if least_seconds(needs, layout) < best.seconds:
            found = evaluate_wrapped(needs, layout, best.values, repeat=True)
            best = found if found is not None and found.seconds < best.seconds else best
    return best


def check_fits(needs: Needs, budgets: ValueBudgets) -> None:
    """Refuses what cannot work.

    Raises:
        DoesNotFitError: a tier is too small for any plan.
    """
    least = {DEVICE: needs.largest_step_bytes + budgets.spilled}
    if not needs.machine.device_is_host:
        least[HOST] = _largest_weight(needs)
    if any(needs.machine.tier(name).capacity_bytes < nbytes for name, nbytes in least.items()):
        raise _refusal(needs, smallest_bytes(needs, budgets))


def smallest_bytes(needs: Needs, budgets: ValueBudgets) -> dict[str, int]:
    """The least that each tier needs: nothing stays, and all that can be spilled is."""
    room = largest_value_bytes(needs)
    values = value_actions(needs, budgets.spilled, room, UNLIMITED)
    smallest = {DEVICE: needs.largest_step_bytes + budgets.spilled, NVME: values.nvme_bytes}
    if not needs.machine.device_is_host:
        smallest[HOST] = _largest_weight(needs) + values.host_bytes
    return smallest


def host_room(needs: Needs, values: Values) -> int:
    """What weights may take in the host tier."""
    if needs.machine.device_is_host:
        return 0
    return needs.machine.tier(HOST).capacity_bytes - values.host_bytes


def _divisions(needs: Needs, budgets: ValueBudgets) -> tuple[int, ...]:
    """Device bytes for everything but weights that are worth trying."""
    most = needs.device_capacity_bytes - needs.largest_step_bytes
    plain = [budget for budget in (budgets.relaxed, budgets.tight) if budget <= most]
    if plain:
        return tuple(dict.fromkeys(plain))
    shares = (
        int(needs.device_capacity_bytes - share * needs.largest_step_bytes) for share in RING_SHARES
    )
    return tuple(dict.fromkeys(share for share in shares if share >= budgets.spilled))


def _values(needs: Needs, budgets: ValueBudgets, budget_bytes: int) -> Values:
    """The actions of everything but weights, the host's room for one weight being kept free."""
    machine = needs.machine
    host = 0 if machine.device_is_host else machine.tier(HOST).capacity_bytes
    room = max(0, host - _largest_weight(needs))
    try:
        return value_actions(needs, budget_bytes, room, machine.tier(NVME).capacity_bytes)
    except DoesNotFitError as error:
        raise _refusal(needs, smallest_bytes(needs, budgets)) from error


def _largest_weight(needs: Needs) -> int:
    return max((needs.host_bytes[name] for name in needs.weights), default=0)


def _refusal(needs: Needs, smallest: Mapping[str, int]) -> DoesNotFitError:
    """Names the tiers that are too small, and what would be enough for each."""
    capacities = {tier.name: tier.capacity_bytes for tier in needs.machine.tiers}
    short = {name: least for name, least in smallest.items() if capacities[name] < least}
    wanted = " and ".join(
        f"{least:,} B in tier {name!r}, which has {capacities[name]:,} B"
        for name, least in short.items()
    )
    step = max(
        needs.program.steps,
        key=lambda step: (
            step.workspace_bytes
            + sum(needs.device_bytes[name] for name in step.inputs + step.writes)
        ),
    )
    return DoesNotFitError(
        f"the program needs at least {wanted}; most of it is for step {step.name!r}: "
        "raise the budget, or split the step",
        short,
    )
