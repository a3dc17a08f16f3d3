"""The smallest budgets with which phases can be planned."""

import dataclasses
from collections.abc import Mapping

from memsched.cost import CostModel, Remembered
from memsched.errors import DoesNotFitError
from memsched.machine import Machine
from memsched.passes.budgets import smallest_bytes
from memsched.passes.compile import compile_phases
from memsched.passes.grouping import group_weights
from memsched.passes.lower.values import value_budgets
from memsched.passes.needs import read_needs
from memsched.program import Program

MOST_TRIES = 16
# Where the least by count has no plan after all, this much more is tried.
MORE = 1.02


@dataclasses.dataclass(frozen=True, slots=True)
class Smallest:
    """The least of each tier: enough for every phase by count. `checked` proves it.

    `plan_seconds` is as for `compile_phases`.
    """

    nbytes: Mapping[str, int]
    programs: Mapping[str, Program]
    machine: Machine
    cost: CostModel
    plan_seconds: float | None

    def checked(self) -> dict[str, int]:
        """The least, more where there is no plan with it: with tiers that have less raised to this,
        and no other, there is one.

        Raises:
            DoesNotFitError: none was found.
        """
        least = dict(self.nbytes)
        given = {tier.name: tier.capacity_bytes for tier in self.machine.tiers}
        for _ in range(MOST_TRIES):
            raised = {name: max(nbytes, given[name]) for name, nbytes in least.items()}
            machine = self.machine.with_capacities(raised)
            try:
                compile_phases(self.programs, machine, self.cost, plan_seconds=self.plan_seconds)
            except DoesNotFitError as error:
                for name, nbytes in (error.smallest or raised).items():
                    least[name] = max(nbytes, int(raised[name] * MORE))
            else:
                return least
        raise DoesNotFitError("no budget was found that is enough; raise all of them", least)


def smallest_budgets(
    programs: Mapping[str, Program],
    machine: Machine,
    cost: CostModel,
    plan_seconds: float | None = None,
) -> Smallest:
    """What each tier needs at least for all of some phases.

    Raises:
        ProgramError: an array is larger than a tier takes.
    """
    grouped = group_weights(programs, machine)
    cost_of_groups = grouped.cost(cost)
    least: dict[str, int] = {}
    for program in grouped.programs.values():
        needs = read_needs(program, machine, Remembered(cost_of_groups))
        for name, nbytes in smallest_bytes(needs, value_budgets(needs)).items():
            least[name] = max(nbytes, least.get(name, 0))
    ordered = {tier.name: least[tier.name] for tier in machine.tiers}
    return Smallest(ordered, programs, machine, cost, plan_seconds)
