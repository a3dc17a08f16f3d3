"""Whether predictions still hold: measured over predicted, and the band where it should lie."""

import dataclasses
from collections.abc import Sequence

from memsched.cost.coefficients import stretched
from memsched.cost.learned import LearnedCost
from memsched.cost.observations import beside, run_beside, union
from memsched.cost.reading import COMPUTE, from_disk, lane_of
from memsched.cost.span import Span
from memsched.machine import Machine
from memsched.plan import Copy, Plan, Run
from memsched.program import Program

QUANTILE = 0.9
# The band is this much wider than the quantile says: one pass is no average.
MORE = 1.1


@dataclasses.dataclass(frozen=True, slots=True)
class Drift:
    """One lane of a pass: seconds measured over seconds predicted, and how far off it may be.

    `most` is a factor: the ratio should lie between its inverse and itself.
    """

    lane: str
    ratio: float
    most: float

    @property
    def out(self) -> bool:
        """Whether the machine is not the one that was calibrated any more."""
        return not 1.0 / self.most <= self.ratio <= self.most


def drifts(
    plan: Plan,
    program: Program,
    machine: Machine,
    cost: LearnedCost,
    spans: Sequence[Span],
    carried_s: float = 0.0,
) -> tuple[Drift, ...]:
    """Steps and each link of one pass, predicted for the overlap that it really had.

    Args:
        carried_s: seconds at the beginning in which transfers of the pass before went on.
    """
    actions = [plan.actions[span.index] for span in spans]
    lanes: dict[str, list[tuple[Span, Run | Copy]]] = {}
    for span, action in zip(spans, actions, strict=True):
        if isinstance(action, Run | Copy) and span.end_s > span.start_s:
            lanes.setdefault(lane_of(action), []).append((span, action))
    busy = {lane: union(span for span, _ in found) for lane, found in lanes.items()}
    computing = busy.get(COMPUTE, [])
    copies = [span for lane, some in busy.items() if lane != COMPUTE for span in some]
    copying = union([Span(0, 0.0, carried_s), *copies])
    fetched = from_disk(plan.actions)
    high = cost.at(QUANTILE)
    found = []
    for lane, some in lanes.items():
        others = copying if lane == COMPUTE else computing
        measured = predicted = margin = 0.0
        for span, action in some:
            match action:
                case Run(step=name):
                    part = run_beside(span, program.step(name), others, fetched)
                case Copy():
                    part = beside(span, others)
            factor = stretched(part, cost.slowdown(action, program, machine))
            measured += span.end_s - span.start_s
            predicted += cost.seconds(action, program, machine) * factor
            margin += high.seconds(action, program, machine) * factor
        found.append(Drift(lane, measured / predicted, MORE * margin / predicted))
    return tuple(found)
