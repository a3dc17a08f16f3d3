"""A program and a machine make a plan."""

import dataclasses
import functools
from collections.abc import Mapping

from memsched.collector import uncollected
from memsched.cost import CostModel, Remembered, Roofline
from memsched.errors import ProgramError
from memsched.machine import Machine
from memsched.passes.budgets import fastest
from memsched.passes.caching import better_cached
from memsched.passes.effort import Effort, effort_of
from memsched.passes.grouping import group_weights
from memsched.passes.judge import judge_by
from memsched.passes.needs import Needs, read_needs
from memsched.passes.phases import plan_phases
from memsched.passes.remat import rematerialised
from memsched.plan import Plan
from memsched.program import Program

LEVELS = ("minimal",)


def compile_plan(
    program: Program,
    machine: Machine,
    cost: CostModel | None = None,
    level: str = "minimal",
    *,
    repeat: bool = True,
    plan_seconds: float | None = None,
) -> Plan:
    """The fastest plan for a program that keeps within the machine's budgets.

    No plain way (`baselines`) is faster by prediction: if none of our own is, it is the plan.

    Args:
        program: what to compute.
        machine: where, and within which budgets.
        cost: how long actions take; the machine's rates by default.
        level: how far values may be changed. "minimal": not at all.
        repeat: the plan follows itself, as decode steps do. Weights then lie after it as before it,
            and what it fetches last is what it reads first. Otherwise it starts with all weights in
            "nvme".
        plan_seconds: about how long layouts may be tried, none for as long as is usual. It is
            counted in simulated actions (`effort`), so that a plan does not depend on the clock.

    Raises:
        DoesNotFitError: no plan keeps within the budgets; it names the smallest that would do.
        ProgramError: the level is unknown, or an array is larger than a tier takes.
    """
    _check_level(level)
    effort = effort_of(plan_seconds)
    grouped = group_weights({"": program}, machine)
    coarse_cost = Remembered(grouped.cost(cost or Roofline()))
    needs = read_needs(grouped.programs[""], machine, coarse_cost)
    plan = rematerialised(needs, functools.partial(_once_each, repeat=repeat, effort=effort))
    return grouped.expanded(plan, program)


@uncollected()
def compile_phases(
    programs: Mapping[str, Program],
    machine: Machine,
    cost: CostModel | None = None,
    level: str = "minimal",
    *,
    predicted_by: CostModel | None = None,
    plan_seconds: float | None = None,
) -> Mapping[str, Plan]:
    """Plans of phases that follow each other and share weights by name.

    No plain way to run the last one alone is faster by prediction. The others keep what it keeps.
    Each plan can follow itself. Weights that several phases keep have one offset, and what an
    earlier phase keeps of a later one's weights the later one keeps, too: `bridge` moves the rest.

    Args:
        programs: what each phase computes, in order. The last one is repeated most.
        machine: where, and within which budgets.
        cost: how long actions take; the machine's rates by default.
        level: how far values may be changed. "minimal": not at all.
        predicted_by: what plans are predicted with in the end; `cost` by default. The plan of the
            last phase is compared with plain ways by it.
        plan_seconds: as for `compile_plan`, for the last phase; others take little beside it.

    Raises:
        DoesNotFitError: a phase has no plan within the budgets.
        ProgramError: the level is unknown, or an array is larger than a tier takes.
    """
    _check_level(level)
    effort = effort_of(plan_seconds)
    grouped = group_weights(programs, machine)
    cost = grouped.cost(cost or Roofline())
    needs = {
        key: read_needs(program, machine, Remembered(cost))
        for key, program in grouped.programs.items()
    }
    if programs:
        last = list(programs)[-1]
        judge = judge_by(predicted_by, grouped, programs[last], machine)
        needs[last] = dataclasses.replace(needs[last], judge=judge)
    plans = plan_phases(needs, effort)
    return {key: grouped.expanded(plan, programs[key]) for key, plan in plans.items()}


def _once_each(needs: Needs, *, repeat: bool, effort: Effort) -> Plan:
    """The fastest plan that runs each step once."""
    return better_cached(needs, fastest(needs, repeat=repeat, effort=effort), repeat=repeat)


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise ProgramError(f"level {level!r} is unknown; there are {', '.join(LEVELS)}")
