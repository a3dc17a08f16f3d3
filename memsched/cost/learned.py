"""A cost model that was fitted on measurements of one machine."""

import math

import numpy as np

from memsched.cost.coefficients import (
    Coefficients,
    duration_class,
    has_many_rows,
    moves,
    run_log_seconds,
    run_slowdown,
    table,
)
from memsched.cost.features import RunFeatures, copy_features, run_features
from memsched.cost.roofline import CostModel, Roofline
from memsched.errors import ProgramError
from memsched.machine import Machine
from memsched.plan import Action, Copy, Free, Run
from memsched.program import Program

MEDIAN = 0.5


class LearnedCost:
    """Seconds that half of all measurements kept below; of another quantile by `at`.

    Links that were never measured take what the machine's rates say.
    """

    def __init__(self, coefficients: Coefficients, quantile: float = MEDIAN) -> None:
        self.coefficients = coefficients
        self.quantile = quantile
        self._physical = Roofline()
        self._known: dict[tuple[RunFeatures, tuple[float, float]], float] = {}

    @property
    def description(self) -> str:
        """What predictions rest on, for reports."""
        found = self.coefficients
        share = "" if self.quantile == MEDIAN else f", {self.quantile:.0%} quantile"
        return f"learned from programs of {found.cases} different shapes on this machine{share}"

    @property
    def quantiles(self) -> tuple[float, ...]:
        """What `at` takes."""
        return (MEDIAN, *(float(name) for name in self.coefficients.margins))

    def at(self, quantile: float) -> "LearnedCost":
        """The same model for the seconds that this share of measurements kept below.

        Raises:
            ProgramError: the quantile was not fitted.
        """
        if quantile not in self.quantiles:
            known = ", ".join(map(str, self.quantiles))
            raise ProgramError(f"quantile {quantile} was not fitted; there are {known}")
        return LearnedCost(self.coefficients, quantile)

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action, nothing else being busy.

        Raises:
            ProgramError: the machine has no link for this copy.
        """
        match action:
            case Run(step=name):
                return self.run_s(run_features(program.step(name), program), machine)
            case Copy():
                return self._copy_s(action, program, machine)
            case Free():
                return 0.0

    def slowdown(self, action: Action, program: Program, machine: Machine) -> float:
        """How many times as long it takes while the other side is busy: steps, or links."""
        match action:
            case Run(step=name):
                return self.run_slowdown(run_features(program.step(name), program))
            case Copy(source=source, target=target):
                return self.copy_slowdown(f"{source}->{target}")
            case Free():
                return 1.0

    def run_s(self, features: RunFeatures, machine: Machine | None = None) -> float:
        """Seconds of a step with these features, nothing else being busy.

        Args:
            machine: where; by default the one that was measured.
        """
        scales = self._scales(machine)
        known = self._known.get((features, scales))
        if known is None:
            found = self.coefficients
            columns = table([features], found.dtypes, found.kinds)
            for name in columns:
                if name.endswith("_flops"):
                    columns[name] = columns[name] / scales[0]
                if name.endswith("_bytes"):
                    columns[name] = columns[name] / scales[1]
            log_s = float(run_log_seconds(found.run, columns, np)[0])
            margin = 0.0
            if self.quantile != MEDIAN:
                margin = found.margins[str(self.quantile)][duration_class(math.exp(log_s))]
            known = self._known[features, scales] = math.exp(log_s + margin)
        return known

    def run_slowdown(self, features: RunFeatures) -> float:
        """How many times as long such a step takes while something is copied."""
        many = int(has_many_rows(features))
        return float(run_slowdown(self.coefficients.run, many, moves(features), np))

    def copies_s(
        self, link: str, copies: int, blocks: int, nbytes: int, scale: float = 1.0
    ) -> float | None:
        """Seconds of transfers that follow one another; None for a link that nobody measured.

        Args:
            scale: how many times as fast as the measured link it is.
        """
        found = self.coefficients.links.get(link)
        if found is None:
            return None
        moving_s = nbytes / (scale * found.bytes_per_s)
        seconds = found.latency_s * copies + found.block_s * blocks + moving_s
        return seconds * (1.0 if self.quantile == MEDIAN else found.margins[str(self.quantile)])

    def copy_slowdown(self, link: str) -> float:
        """How many times as long they take while a step runs."""
        found = self.coefficients.links.get(link)
        return found.slowdown if found else 1.0

    def _copy_s(self, action: Copy, program: Program, machine: Machine) -> float:
        one, link = (
            copy_features(action, program, machine),
            machine.link(action.source, action.target),
        )
        known = self.coefficients.links.get(one.link)
        if known is None or link is None:
            return self._physical.seconds(action, program, machine)
        scale = link.bytes_per_s / known.profile_bytes_per_s
        seconds = self.copies_s(one.link, 1, one.blocks, one.nbytes, scale)
        assert seconds is not None, "the link is known"
        return seconds

    def _scales(self, machine: Machine | None) -> tuple[float, float]:
        """How many times as fast in arithmetic and in memory as the machine that was measured."""
        if machine is None:
            return 1.0, 1.0
        found, compute = self.coefficients, machine.compute
        return (
            compute.flops_per_s / found.profile_flops_per_s,
            compute.bytes_per_s / found.profile_bytes_per_s,
        )


def describe(cost: CostModel) -> str:
    """What predictions of a cost model rest on, for reports."""
    if isinstance(cost, LearnedCost):
        return cost.description
    if isinstance(cost, Roofline):
        return "the profile's rates; nothing was measured, scripts/calibrate.py does that"
    return type(cost).__name__


def at_quantile(cost: CostModel, quantile: float) -> CostModel | None:
    """The model for another quantile, or None where it knows none."""
    known = isinstance(cost, LearnedCost) and quantile in cost.quantiles
    return cost.at(quantile) if known and isinstance(cost, LearnedCost) else None
