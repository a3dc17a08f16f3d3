"""How many weights of each class stay where, by the program that gives the bound.

The bound leaves room for one step's weights; links that work while steps compute need more. With
that room kept free, the numbers in its solution are a good start for a plan.
"""

import dataclasses

import numpy as np

from memsched.bound.masses import Masses, WeightClass
from memsched.bound.problem import Problem
from memsched.bound.whole import by_seconds, minimum, narrowed

# Integers come out as such but for this.
NEARLY = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class Placed:
    """Of each class of weights, so many stay on the device, and so many others in the host."""

    classes: tuple[WeightClass, ...]
    on_device: tuple[int, ...]
    in_host: tuple[int, ...]


def placed(
    masses: Masses, device_bytes: int, host_bytes: int, rings: float, host_rings: float
) -> Placed | None:
    """The placement of the fastest pass with room for rings; None if there is none.

    Args:
        masses: the program on its machine.
        device_bytes: what weights may take on the device.
        host_bytes: what they may take in the host tier, if there is one.
        rings: the device's ring, in multiples of the most that a step streams.
        host_rings: that of the host, in multiples of the largest weight.
    """
    largest = max((one.host_bytes for one in masses.weights), default=0)
    problems = []
    for least_bytes, problem in narrowed(masses):
        row = problem.columns.row
        kept = [one.count * one.device_bytes for one in masses.weights]
        problem.add(row(kept), device_bytes - rings * least_bytes)
        if masses.host_capacity_bytes is not None:
            near = [one.count * one.host_bytes for one in masses.weights]
            problem.add(row((), near), host_bytes - host_rings * largest)
        problems.append(problem)
    for problem in by_seconds(problems):
        found = minimum(problem, integers=True)
        if found.x is not None:
            return _read(problem, found.x)
    return None


def _read(problem: Problem, numbers: np.ndarray) -> Placed:
    weights = problem.columns.masses.weights
    whole = [int(number + NEARLY) for number in numbers[: 2 * len(weights)]]
    return Placed(weights, tuple(whole[: len(weights)]), tuple(whole[len(weights) :]))
