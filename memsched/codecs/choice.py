"""Which codec every array gets: the fewest bytes whose predicted error keeps within a budget.

An encoding moves the output by its relative error times the array's sensitivity, and errors of
different arrays add up as squares: predicted = sqrt(sum((sensitivity * error) ** 2)).

That is a knapsack with one option for each array. The options of an array that a mixture of two
others beats are set aside; steps along what is left (a convex hull) are taken in the order of bytes
saved for a square of error, and at the end whatever still fits is used up. The first step that does
not fit gives the linear program's optimum, which no choice is below: the result is at most this one
step above it.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

from memsched.errors import ProgramError

RAW = "raw"


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A codec by name, the bytes it makes of an array, and how far it moves the array."""

    codec: str
    nbytes: int
    error: float  # |decoded - array| / |array|


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """An array: its raw bytes, and the output's relative error for a relative error of it."""

    name: str
    nbytes: int
    sensitivity: float
    candidates: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """What an array gets, and why."""

    name: str
    raw_bytes: int
    sensitivity: float
    codec: str
    nbytes: int
    error: float
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """The codecs of all arrays. No choice within the budget takes fewer than `bound_bytes`."""

    arrays: tuple[Chosen, ...]
    bound_bytes: int

    @property
    def nbytes(self) -> int:
        """What all arrays take."""
        return sum(one.nbytes for one in self.arrays)

    @property
    def predicted_error(self) -> float:
        """Of the output, relative."""
        return math.sqrt(math.fsum(_square(one.sensitivity, one.error) for one in self.arrays))


@dataclasses.dataclass(frozen=True, slots=True)
class _Option:
    """A codec as a point: bytes, and the square of the error that it adds to the output."""

    square: float
    nbytes: int
    codec: str
    error: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """From one point of an array's hull to the next."""

    subject: int
    saved_bytes: int
    added: float
    target: _Option

    @property
    def worth(self) -> float:
        return self.saved_bytes / self.added


def choose(subjects: Sequence[Subject], *, error_budget: float, smallest_saving: float) -> Choice:
    """One codec for each array.

    Args:
        error_budget: the predicted error is at most this.
        smallest_saving: what saves a smaller share of an array's bytes is not used.

    Raises:
        ProgramError: a number that is out of range, or two arrays of one name.
    """
    _check(subjects, error_budget, smallest_saving)
    options = [_options(subject, smallest_saving) for subject in subjects]
    hulls = [_hull(points) for points in options]
    steps = sorted(
        itertools.chain.from_iterable(map(_steps, range(len(hulls)), hulls)),
        key=lambda step: (-step.worth, step.subject),
    )
    taken = [hull[0] for hull in hulls]
    # What floating-point sums may be off by is not spent.
    limit = error_budget**2 * (1 - 1e-12)
    left, bound_bytes = _take(steps, taken, limit)
    left = _use_up(options, taken, left)
    chosen = tuple(
        _chosen(subject, option, left, smallest_saving)
        for subject, option in zip(subjects, taken, strict=True)
    )
    return Choice(chosen, bound_bytes)


def _check(subjects: Sequence[Subject], error_budget: float, smallest_saving: float) -> None:
    if not 0 <= error_budget < math.inf:
        raise ProgramError(f"error budget {error_budget} is not a finite number, 0 or more")
    if not 0 <= smallest_saving < 1:
        raise ProgramError(f"smallest saving {smallest_saving} is not a share from 0 to below 1")
    counted = collections.Counter(subject.name for subject in subjects)
    for name, count in counted.items():
        if count > 1:
            raise ProgramError(f"{name!r} is to get {count} codecs; name every array once")
    for subject in subjects:
        numbers = (subject.sensitivity, *(one.error for one in subject.candidates))
        if not all(0 <= number < math.inf for number in numbers):
            raise ProgramError(
                f"{subject.name!r}: sensitivity and errors must be finite, 0 or more; found "
                f"{', '.join(f'{number:g}' for number in numbers)}"
            )


def _square(sensitivity: float, error: float) -> float:
    return (sensitivity * error) ** 2


def saves(subject: Subject, candidate: Candidate, smallest_saving: float) -> bool:
    """Whether a candidate saves this share of an array's bytes."""
    saved_bytes = subject.nbytes - candidate.nbytes
    return saved_bytes > 0 and saved_bytes >= smallest_saving * subject.nbytes


def _options(subject: Subject, smallest_saving: float) -> list[_Option]:
    """Raw, and every candidate that saves enough; by error, then by bytes."""
    points = [_Option(0.0, subject.nbytes, RAW, 0.0)]
    points += [
        _Option(_square(subject.sensitivity, one.error), one.nbytes, one.codec, one.error)
        for one in subject.candidates
        if saves(subject, one, smallest_saving)
    ]
    return sorted(points, key=lambda point: (point.square, point.nbytes, point.error))


def _hull(points: list[_Option]) -> list[_Option]:
    """The lower convex hull: ever more error for ever fewer bytes, at an ever worse price."""
    hull: list[_Option] = []
    for point in points:
        if hull and point.nbytes >= hull[-1].nbytes:
            continue
        while len(hull) > 1 and not _worse(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _worse(first: _Option, middle: _Option, last: _Option) -> bool:
    """Whether the second of two steps saves fewer bytes for its error than the first one."""
    before = (first.nbytes - middle.nbytes) * (last.square - middle.square)
    after = (middle.nbytes - last.nbytes) * (middle.square - first.square)
    return after < before


def _steps(subject: int, hull: list[_Option]) -> list[_Step]:
    return [
        _Step(subject, one.nbytes - other.nbytes, other.square - one.square, other)
        for one, other in itertools.pairwise(hull)
    ]


def _take(steps: list[_Step], taken: list[_Option], left: float) -> tuple[float, int]:
    """Takes what fits, best first; changes `taken`. Returns what is left and the lower bound."""
    nbytes, bound = sum(option.nbytes for option in taken), None
    stopped: set[int] = set()
    for step in steps:
        if step.subject in stopped:
            continue
        if step.added <= left:
            taken[step.subject] = step.target
            left -= step.added
            nbytes -= step.saved_bytes
        else:
            if bound is None:
                bound = nbytes - step.worth * left
            stopped.add(step.subject)
    return left, nbytes if bound is None else math.ceil(bound * (1 - 1e-11))


def _use_up(options: list[list[_Option]], taken: list[_Option], left: float) -> float:
    """Smaller options that still fit, the largest saving first, until there is none."""
    while True:
        better = []
        for subject, points in enumerate(options):
            now = taken[subject]
            fits = [p for p in points if p.nbytes < now.nbytes and p.square - now.square <= left]
            if fits:
                best = min(fits, key=lambda point: (point.nbytes, point.square))
                better.append((best.nbytes - now.nbytes, subject, best))
        if not better:
            return left
        for _, subject, best in sorted(better, key=lambda found: found[:2]):
            added = best.square - taken[subject].square
            if added <= left:
                taken[subject] = best
                left -= added


def _chosen(subject: Subject, option: _Option, left: float, smallest_saving: float) -> Chosen:
    reason = _reason(subject, option, left, smallest_saving)
    return Chosen(
        subject.name,
        subject.nbytes,
        subject.sensitivity,
        option.codec,
        option.nbytes,
        option.error,
        reason,
    )


def _reason(subject: Subject, option: _Option, left: float, smallest_saving: float) -> str:
    usable = [one for one in subject.candidates if saves(subject, one, smallest_saving)]
    smaller = [one for one in usable if one.nbytes < option.nbytes]
    refused = ""
    if smaller:
        next_one = min(smaller, key=lambda one: (one.error, one.nbytes))
        needed = subject.sensitivity * next_one.error
        have = math.sqrt(left + option.square)
        refused = f"{next_one.codec} needs {needed:.2g} of the budget, {have:.2g} are left"
    if option.codec != RAW:
        text = f"{option.codec}: saves {_percent(subject, option.nbytes)} %, "
        text += f"error {option.error:.2g} x {subject.sensitivity:.2g}"
        return f"{text}; {refused}" if refused else text
    if usable:
        return f"raw: budget spent; {refused}"
    if not subject.candidates:
        return "raw: there is no codec for it"
    best = min(subject.candidates, key=lambda one: one.nbytes)
    return f"raw: {best.codec} saves less than {100 * smallest_saving:g} %"


def _percent(subject: Subject, nbytes: int) -> int:
    return round(100 * (1 - nbytes / subject.nbytes))
