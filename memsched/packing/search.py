"""Many beam searches, each with other settings, at ever lower capacities, until one is enough."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import numpy as np

from memsched.packing.beam import Settings, beam_search
from memsched.packing.first_fit import ORDERS, first_fit, hardest_first
from memsched.packing.items import Item, largest_live_sum
from memsched.packing.parts import Part, split
from memsched.packing.sections import Problem, problem_of, section_ranges

# Above these a beam search is slow and takes much memory. First fit is near the bound there.
_MOST_ITEMS = 2000
_MOST_FIXED = 32
# Numbers gathered in one step of a beam search: it works in some 100 MB.
_MOST_NUMBERS = 1 << 23
# Which searches succeed differs from problem to problem and is not to be seen before: they are
# drawn. Sharp scores pack to the last byte; few choices keep look-alikes out of the beam.
_CHOICES = (4, 6, 8, 10, 12, 16, 24, 1 << 30)
_SHARPNESS = (30.0, 600.0)
# Where between the goal and the best known peak a search aims. At the goal itself it fails fast.
_AIMS = (0.0, 0.25, 0.5, 0.75, 1.0)

Prepare = Callable[[Part, int], Problem]


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """A part with the best offsets so far, their `peak`, and a `floor` that none can be below.

    Offsets and floor count from the part's base, `peak` from the ground.
    """

    part: Part
    offsets: tuple[int, ...]
    peak: int
    floor: int
    runs: int = 0

    @property
    def bound(self) -> int:
        """No packing of the part ends lower than here, from the ground."""
        return self.part.base + self.floor


def minimise(
    items: Sequence[Item], *, enough: int, seconds: float, rounds: int | None, seed: int
) -> list[int]:
    """Offsets whose peak is as low as can be found, or is `enough`, or at most.

    Stops after `seconds`, or after `rounds` searches: only then the result is the same each time.
    """
    deadline_s = time.monotonic() + seconds
    items = _in_sections(items)
    offsets, parts = split(items)
    jobs = [_begin(items, part) for part in parts]
    random = np.random.default_rng(seed)

    @functools.cache
    def prepare(part: Part, order: int) -> Problem:
        own = [items[index] for index in part.indices]
        return problem_of([own[index] for index in hardest_first(own, order)])

    left = rounds
    while jobs and left != 0 and time.monotonic() < deadline_s:
        goal = max(enough, *(job.bound for job in jobs))
        worst = max(range(len(jobs)), key=lambda index: jobs[index].peak)
        if jobs[worst].peak <= goal:
            break
        jobs[worst] = _improve(items, jobs[worst], goal, prepare, random, deadline_s)
        left = None if left is None else left - 1
    for job in jobs:
        offsets |= {
            index: job.part.base + offset
            for index, offset in zip(job.part.indices, job.offsets, strict=True)
        }
    return [offsets[index] for index in range(len(items))]


def _in_sections(items: Sequence[Item]) -> list[Item]:
    """The items with sections for times: lengths of life are then comparable."""
    first, last = section_ranges(items)
    return [
        dataclasses.replace(item, lower=lower, upper=upper)
        for item, lower, upper in zip(items, first, last, strict=True)
    ]


def _begin(items: Sequence[Item], part: Part) -> _Job:
    own = [items[index] for index in part.indices]
    offsets = first_fit(own, hardest_first(own, 0))
    return _Job(part, tuple(offsets), part.base + _top(own, offsets), largest_live_sum(own))


def _top(items: Sequence[Item], offsets: Sequence[int]) -> int:
    return max(offset + item.size for item, offset in zip(items, offsets, strict=True))


def _improve(
    items: Sequence[Item],
    job: _Job,
    goal: int,
    prepare: Prepare,
    random: np.random.Generator,
    deadline_s: float,
) -> _Job:
    """One more search in a part: for `goal`, or for something between it and the peak."""
    own = [items[index] for index in job.part.indices]
    job = dataclasses.replace(job, runs=job.runs + 1)
    fixed = sum(item.offset is not None for item in own)
    if job.runs < ORDERS or len(own) > _MOST_ITEMS or fixed > _MOST_FIXED:
        return _better(own, job, first_fit(own, _order(own, job.runs, random)))
    aim = goal + int((job.peak - 1 - goal) * random.choice(_AIMS))
    order = int(random.integers(ORDERS))
    problem = prepare(job.part, order)
    capacity = (aim - job.part.base) // problem.unit
    trial = beam_search(problem, capacity, _settings(job, problem, random), deadline_s)
    if trial.exhausted:
        return dataclasses.replace(job, floor=max(job.floor, (capacity + 1) * problem.unit))
    if trial.offsets is None:
        return job
    found = [0] * len(own)
    for index, offset in zip(hardest_first(own, order), trial.offsets, strict=True):
        found[index] = int(offset) * problem.unit
    return _better(own, job, found)


def _better(own: Sequence[Item], job: _Job, offsets: Sequence[int]) -> _Job:
    peak = job.part.base + _top(own, offsets)
    if peak >= job.peak:
        return job
    return dataclasses.replace(job, offsets=tuple(offsets), peak=peak)


def _order(items: Sequence[Item], run: int, random: np.random.Generator) -> list[int]:
    """The hardest first by each opinion in turn, then such orders with some items exchanged."""
    order = np.array(hardest_first(items, run % ORDERS))
    if run >= ORDERS:
        order = order[np.argsort(np.arange(len(order)) * random.uniform(0.8, 1.25, len(order)))]
    return [int(index) for index in order]


def _settings(job: _Job, problem: Problem, random: np.random.Generator) -> Settings:
    """Drawn at random; the beam may be wider the longer nothing else helped."""
    choices = int(random.choice(_CHOICES))
    sharpness = float(np.exp(random.uniform(*np.log(_SHARPNESS))))
    width = int(2 ** random.uniform(2, np.log2(16 + 2 * job.runs)))
    states = _MOST_NUMBERS // len(problem.spans.members)
    width = max(2, min(width, states // min(choices + 1, len(problem.size))))
    return Settings(width, choices, sharpness)
