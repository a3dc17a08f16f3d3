"""Plain ways to run a program in little memory, as plans and as seconds, to compare with."""

import dataclasses
import functools
from collections.abc import Callable

from memsched.cost import CostModel, Remembered, Roofline
from memsched.machine import Machine
from memsched.passes.budgets import fastest, host_room
from memsched.passes.caching import CACHES, MOST_WEIGHTS, caching_plan
from memsched.passes.effort import Effort, effort_of
from memsched.passes.grouping import group_weights
from memsched.passes.judge import judge_by
from memsched.passes.keep import POLICIES
from memsched.passes.needs import Needs, read_needs
from memsched.passes.orders import FEW
from memsched.passes.recipes import read_room
from memsched.passes.search import Found, tail_spill
from memsched.plan import Plan
from memsched.program import Program


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Seconds of one round, and how to make its plan."""

    seconds: float
    make: Callable[[], Plan] | None

    @functools.cached_property
    def plan(self) -> Plan | None:
        """None for large programs, whose offsets are not worked out."""
        return None if self.make is None else self.make()


def baselines(
    program: Program,
    machine: Machine,
    cost: CostModel | None = None,
    *,
    predicted_by: CostModel | None = None,
    plan_seconds: float | None = None,
) -> dict[str, Baseline]:
    """What plain ways take, by name.

    "resident": everything stays; missing if it does not fit. "tail spill": what is read first
    stays, the rest is streamed. "lru", "clock" and "adaptive": a cache that fetches when a step
    needs a weight, while nothing is computed; with "+ prefetch" it fetches during the step before.

    A plan of `compile_plan`, or for the last phase of `compile_phases`, is never slower than any of
    them, if all have as many `plan_seconds` and the same `cost` and `predicted_by`.

    Raises:
        DoesNotFitError: the program does not fit in any way.
    """
    grouped = group_weights({"": program}, machine)
    coarse_cost = Remembered(grouped.cost(cost or Roofline()))
    judge = judge_by(predicted_by, grouped, program, machine)
    needs = read_needs(grouped.programs[""], machine, coarse_cost, judge)
    found = _baselines(needs, effort_of(plan_seconds))
    return {
        name: Baseline(
            seconds, None if plan is None else functools.partial(grouped.expanded, plan, program)
        )
        for name, (seconds, plan) in found.items()
    }


def _baselines(needs: Needs, effort: Effort) -> dict[str, tuple[float, Plan | None]]:
    """Seconds and plans of ways to run grouped weights."""
    # Nobody has to judge between it and the plain way, which follows anyway. Plans of few weights
    # may differ in what else they move: plain ways move the same.
    unjudged = dataclasses.replace(needs, judge=None)
    few = len(needs.weights) <= FEW
    best = fastest(unjudged, repeat=True, effort=effort if few else effort.share(0.0))
    if len(best.layout.device.pinned) == len(needs.weights):
        return {"resident": (needs.seconds(best.plan), best.plan)}
    device_bytes = needs.device_capacity_bytes - best.values.device_bytes
    room = read_room(needs, device_bytes, host_room(needs, best.values), repeat=True)
    found: dict[str, tuple[float, Plan | None]] = {}
    tail = tail_spill(needs, best.values, room, effort)
    if tail is not None:
        found["tail spill"] = needs.seconds(tail.plan), tail.plan
    for name in CACHES:
        found |= _cache(needs, best, name)
    return found


def _cache(needs: Needs, best: Found, name: str) -> dict[str, tuple[float, Plan | None]]:
    """A cache, without and with prefetch. One plan serves both: its copies do not wait."""
    packed = len(needs.weights) <= MOST_WEIGHTS or not needs.machine.device_is_host
    made = _timed(needs, best, name, packed=packed)
    if made is not None and not packed and made[1] < needs.seconds(best.plan):
        # It would be chosen, so it must work.
        packed = True
        made = _timed(needs, best, name, packed=True)
    if made is None:
        return {}
    plan, together_s = made
    kept = plan if packed else None
    return {name: (needs.one_by_one_s(plan), kept), f"{name} + prefetch": (together_s, kept)}


def _timed(needs: Needs, best: Found, name: str, *, packed: bool) -> tuple[Plan, float] | None:
    plan = caching_plan(needs, best, POLICIES[name], repeat=True, packed=packed)
    if plan is None:
        return None
    return plan, needs.seconds(plan)
