"""Whether predictions still hold: measured over predicted, and the band where it should lie."""

import dataclasses
from collections.abc import Sequence

from memsched.cost.coefficients import stretched
from memsched.cost.learned import LearnedCost
from memsched.cost.observations import Observation, RunObservation, observe
from memsched.cost.reading import COMPUTE
from memsched.cost.span import Span
from memsched.machine import Machine
from memsched.plan import Plan
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

    def __str__(self) -> str:
        """One line for people."""
        end = f"at most {self.most:.2f}" if self.ratio > 1 else f"at least {1 / self.most:.2f}"
        return f"{self.lane} took {self.ratio:.2f} times what was predicted, and {end} was expected"


def drifts(
    plan: Plan,
    program: Program,
    machine: Machine,
    cost: LearnedCost,
    spans: Sequence[Span],
    carried_s: float = 0.0,
) -> tuple[Drift, ...]:
    """Steps and each measured link of one pass, predicted for the overlap that it really had.

    What says nothing to `observe` says nothing here.

    Args:
        carried_s: seconds at the beginning in which transfers of the pass before went on.
    """
    high = cost.at(QUANTILE)
    lanes: dict[str, list[tuple[float, float, float]]] = {}
    every = max(1, len(spans))
    for one in observe(plan, program, machine, spans, carried_s=carried_s, most_seconds=every):
        lane = COMPUTE if isinstance(one, RunObservation) else one.link
        predicted, margin = _predicted_s(one, cost), _predicted_s(one, high)
        if predicted is not None and margin is not None:
            lanes.setdefault(lane, []).append((_measured_s(one), predicted, margin))
    sums = {
        lane: [sum(column) for column in zip(*some, strict=True)] for lane, some in lanes.items()
    }
    return tuple(
        Drift(lane, measured / predicted, MORE * margin / predicted)
        for lane, (measured, predicted, margin) in sums.items()
    )


def _measured_s(one: Observation) -> float:
    return sum(one.seconds) if isinstance(one, RunObservation) else one.seconds


def _predicted_s(one: Observation, cost: LearnedCost) -> float | None:
    """For all durations of an observation together; None of a link that nobody measured."""
    if isinstance(one, RunObservation):
        slowdown = cost.run_slowdown(one.features)
        alone_s: float | None = len(one.seconds) * cost.run_s(one.features)
    else:
        slowdown = cost.copy_slowdown(one.link)
        alone_s = cost.copies_s(one.link, one.copies, one.blocks, one.nbytes)
    return None if alone_s is None else alone_s * stretched(one.beside, slowdown)
