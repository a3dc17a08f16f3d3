"""Other budgets between two passes: what stays where it is, and what is said if they cannot work.

Weights lie in files for ever, so a plan for other budgets may begin with any of them in memory. It
begins with those that already lie where it wants them; the others leave before it is in force.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

from memsched.cost import CostModel
from memsched.errors import DoesNotFitError
from memsched.machine import NVME, Machine, rounded
from memsched.passes.compile import compile_phases
from memsched.plan import Residence
from memsched.program import ArraySpec, Program
from qwen3vl_jax.planned.budgets import smallest_budgets

TRIES = 7  # to a hundredth of the difference

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Watcher(Protocol):
    """Asked by a runner between passes; it may give the runner other budgets."""

    def before_pass(self, phase: str, peak_bytes: Mapping[str, int]) -> None:
        """A pass of this phase, which takes so much of each tier, begins next."""

    def refused(self, error: DoesNotFitError) -> bool:
        """A new phase has no plan. Returns whether there are larger budgets now."""


def alone(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """Lets one thread at a time into such methods of a runner: budgets change between passes."""

    @functools.wraps(method)
    def entered(*args: Given.args, **options: Given.kwargs) -> Result:
        runner: Any = args[0]
        with runner.passing:
            return method(*args, **options)

    return entered


def staying(
    held: Sequence[Residence],
    entries: Sequence[Sequence[Residence]],
    arrays: Mapping[str, ArraySpec],
    emptied: str | None,
) -> tuple[Residence, ...]:
    """Weights that can stay where they lie: most bytes that one of the new plans begins with.

    Args:
        held: where weights lie now.
        entries: what each new plan begins with.
        emptied: a tier in which nothing can stay.
    """
    free = {rest for rest in held if rest.tier != emptied}
    found = (tuple(rest for rest in entry if rest in free) for entry in entries)
    return max(found, key=lambda rests: sum(arrays[r.array].nbytes for r in rests), default=())


def staying_beside(
    held: Sequence[Residence],
    arrays: Mapping[str, ArraySpec],
    machine: Machine,
    used_bytes: Mapping[str, int],
) -> tuple[Residence, ...]:
    """Weights that can stay where they lie while others use so many bytes of their tiers."""
    left_bytes = {tier.name: tier.capacity_bytes - used_bytes[tier.name] for tier in machine.tiers}
    stay = []
    for rest in held:
        taken_bytes = rounded(arrays[rest.array].nbytes, machine.tier(rest.tier).alignment_bytes)
        if taken_bytes <= left_bytes[rest.tier]:
            left_bytes[rest.tier] -= taken_bytes
            stay.append(rest)
    return tuple(stay)


def refusal(
    programs: Mapping[str, Program],
    machine: Machine,
    cost: CostModel,
    before: Machine,
    plan_seconds: float,
) -> DoesNotFitError:
    """Why budgets cannot work, with the least that would.

    Args:
        machine: with the budgets that were asked for.
        before: with those in force, which work.
        plan_seconds: as for `compile_phases`. What is tried here, too, is planned as runs plan: the
            memory that more thorough planning takes is not there.
    """
    least = smallest_budgets(programs, machine, cost, plan_seconds).checked()
    small = _above(least, machine)
    if NVME in small:
        # The space on disk stays as it is, so more of the others is needed.
        small = _above(_bisected(programs, machine, cost, before, plan_seconds), machine)
    asked = " and ".join(f"{machine.tier(name).capacity_bytes:,} B of {name}" for name in small)
    enough = " and ".join(f"{nbytes:,} B" for nbytes in small.values())
    kept = " and ".join(f"{before.tier(name).capacity_bytes:,} B" for name in small)
    return DoesNotFitError(
        f"{asked} memory cannot work: what is under way takes at least {enough}; {kept} stays in "
        "force",
        small,
    )


def _above(least: Mapping[str, int], machine: Machine) -> dict[str, int]:
    return {
        name: nbytes for name, nbytes in least.items() if nbytes > machine.tier(name).capacity_bytes
    }


def _bisected(
    programs: Mapping[str, Program],
    machine: Machine,
    cost: CostModel,
    before: Machine,
    plan_seconds: float,
) -> dict[str, int]:
    """Budgets that work, as near to those asked for as some tries come, from those in force."""
    low = {tier.name: tier.capacity_bytes for tier in machine.tiers}
    high = {tier.name: tier.capacity_bytes for tier in before.tiers}
    for _ in range(TRIES):
        middle = {name: (low[name] + high[name]) // 2 for name in low}
        try:
            compile_phases(
                programs, machine.with_capacities(middle), cost, plan_seconds=plan_seconds
            )
        except DoesNotFitError:
            low = middle
        else:
            high = middle
    return high
