"""Seconds of plans as they are predicted in the end, where planning sees steps otherwise.

Planning takes all steps for as slow as they are beside copies: that is simple, and right where most
of a round is copied. Where little is, plans that look alike to it are not.
"""

import dataclasses

from memsched.cost import CostModel, plan_seconds
from memsched.cost.contention import Contending
from memsched.cost.reading import Reader
from memsched.machine import Machine
from memsched.passes.grouping import Grouped
from memsched.plan import Plan
from memsched.program import Program


@dataclasses.dataclass(frozen=True, slots=True)
class Judge:
    """Predicts plans of grouped weights as what they become: plans of the whole `program`."""

    grouped: Grouped
    program: Program
    machine: Machine
    cost: CostModel

    def seconds(self, plan: Plan) -> float:
        """One round of the plan."""
        whole = self.grouped.expanded(plan, self.program)
        return plan_seconds(whole, self.program, self.machine, self.cost)

    def one_by_one_s(self, plan: Plan) -> float:
        """All its actions, one after another."""
        whole = self.grouped.expanded(plan, self.program)
        reader = Reader(self.program, self.machine, self.cost)
        return sum(task.seconds for task in reader.tasks(whole.actions))


def judge_by(
    predicted_by: CostModel | None, grouped: Grouped, program: Program, machine: Machine
) -> Judge | None:
    """Who judges plans by this cost model; None where planning sees the same seconds."""
    if predicted_by is None or not (machine.device_is_host or isinstance(predicted_by, Contending)):
        return None
    return Judge(grouped, program, machine, predicted_by)
