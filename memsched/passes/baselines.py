"""Plain ways to run a program in little memory, as plans and as seconds, to compare with."""

import dataclasses

from memsched.cost import CostModel, Remembered, Roofline, plan_seconds
from memsched.machine import Machine
from memsched.passes.budgets import fastest, host_room
from memsched.passes.caching import MOST_WEIGHTS, caching_plan
from memsched.passes.grouping import group_weights
from memsched.passes.keep import POLICIES
from memsched.passes.needs import Needs, read_needs
from memsched.passes.search import Found, search
from memsched.plan import Plan
from memsched.program import Program

CACHES = ("lru", "clock", "adaptive")


@dataclasses.dataclass(frozen=True, slots=True)
class Baseline:
    """Seconds of one round. `plan` is None for large programs, whose offsets are not worked out."""

    seconds: float
    plan: Plan | None


def baselines(
    program: Program, machine: Machine, cost: CostModel | None = None
) -> dict[str, Baseline]:
    """What plain ways take, by name.

    "resident": everything stays; missing if it does not fit. "tail spill": what is read first
    stays, the rest is streamed. "lru", "clock" and "adaptive": a cache that fetches when a step
    needs a weight, while nothing is computed; with "+ prefetch" it fetches during the step before.

    Raises:
        DoesNotFitError: the program does not fit in any way.
    """
    grouped = group_weights({"": program}, machine)
    coarse_cost = Remembered(grouped.cost(cost or Roofline()))
    needs = read_needs(grouped.programs[""], machine, coarse_cost)
    found = _baselines(needs)
    return {
        name: Baseline(way.seconds, way.plan and grouped.expanded(way.plan, program))
        for name, way in found.items()
    }


def _baselines(needs: Needs) -> dict[str, Baseline]:
    best = fastest(needs, repeat=True)
    if len(best.layout.device.pinned) == len(needs.weights):
        return {"resident": Baseline(best.seconds, best.plan)}
    room = needs.device_capacity_bytes - best.values.device_bytes
    host_bytes = host_room(needs, best.values)
    found = {}
    tail = search(needs, best.values, room, host_bytes, repeat=True, spreads=("tail",))
    if tail is not None:
        found["tail spill"] = Baseline(tail.seconds, tail.plan)
    for name in CACHES:
        found |= _cache(needs, best, name)
    return found


def _cache(needs: Needs, best: Found, name: str) -> dict[str, Baseline]:
    """A cache, without and with prefetch. One plan serves both: its copies do not wait."""
    packed = len(needs.weights) <= MOST_WEIGHTS
    plan = caching_plan(needs, best, POLICIES[name], repeat=True, packed=packed)
    if plan is None:
        return {}
    one_by_one = sum(
        needs.cost.seconds(action, needs.program, needs.machine) for action in plan.actions
    )
    together = plan_seconds(plan, needs.program, needs.machine, needs.cost)
    kept = plan if packed else None
    return {name: Baseline(one_by_one, kept), f"{name} + prefetch": Baseline(together, kept)}
