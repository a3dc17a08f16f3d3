"""Codecs and places at once: how many of each kind get which codec, so that a pass is fastest.

The linear program of `linear`, in which every kind is there once for each codec that it may have:
of a kind with n members, z of them get a codec (a whole number; all z of a kind sum to n), x of
these stay on the device and y in the host. What is encoded crosses links in fewer bytes, takes less
room where it stays, and changes what steps take; the squares of errors keep within the budget.

Of choices that are equally fast the one with the least error is taken: what gains nothing is raw.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memsched.bound.kinds import Kind, Option
from memsched.bound.masses import Masses

# Passes that differ by less are equally fast.
ALIKE = 1e-3
# Whole numbers are looked for in so many nodes; what is found by then will do.
MOST_NODES = 500
# What floating-point sums may be off by is not spent.
SPENT = 1 - 1e-9
Row = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """Of each kind, how many get each of its options; and the bound of such a pass."""

    of_kinds: tuple[tuple[int, ...], ...]
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Columns:
    """z, x and y of every option of every kind, u of every class of values, and T in a unit."""

    options: tuple[tuple[Kind, Option], ...]
    values: int
    second_unit: float

    @property
    def width(self) -> int:
        return 3 * len(self.options) + self.values + 1

    def row(
        self,
        chosen: Iterable[int | float] = (),
        kept: Iterable[int | float] = (),
        near: Iterable[int | float] = (),
        spilled: Iterable[int | float] = (),
        seconds: float = 0.0,
    ) -> Row:
        """Coefficients of z, x, y, u and T; those of T for seconds."""
        row, count = np.zeros(self.width), len(self.options)
        for place, found in enumerate((chosen, kept, near, spilled)):
            numbers = list(found)
            row[place * count : place * count + len(numbers)] = numbers
        row[-1] = seconds * self.second_unit
        return row


@dataclasses.dataclass(slots=True)
class _Problem:
    """Rows with the most that they may be, each divided by what makes it a small number."""

    columns: _Columns
    rows: list[Row] = dataclasses.field(default_factory=list)
    limits: list[float] = dataclasses.field(default_factory=list)

    def add(self, row: Row, limit: int | float, unit: float) -> None:
        self.rows.append(row / unit)
        self.limits.append(limit / unit)


def fastest_counts(masses: Masses, kinds: Sequence[Kind], *, error_budget: float) -> Counts | None:
    """The fastest pass within a budget of error; None if there is none.

    Args:
        masses: of the raw program.
        error_budget: of the output; squares of errors sum to at most its square.
    """
    second_unit = masses.compute_s + sum(
        kind.count * (kind.options[0].arrival_s + kind.options[0].staging_s) for kind in kinds
    )
    options = tuple((kind, option) for kind in kinds for option in kind.options)
    columns = _Columns(options, len(masses.values), second_unit or 1.0)
    problem = _Problem(columns)
    _busy(problem, masses)
    _hold(problem, masses)
    squares = columns.row(option.square for _, option in options)
    limit = error_budget**2 * SPENT
    problem.add(squares, limit, limit or float(squares.max()) or 1.0)
    pass_s = columns.row(seconds=1.0)
    fastest = _minimum(problem, kinds, masses, pass_s)
    if fastest is None:
        return None
    seconds = float(pass_s @ fastest)
    problem.add(pass_s, seconds * (1 + ALIKE), columns.second_unit)
    best = _minimum(problem, kinds, masses, squares / (squares.max() or 1.0))
    return Counts(_counts(kinds, fastest if best is None else best), seconds)


def _busy(problem: _Problem, masses: Masses) -> None:
    """No lane is busy for longer than T; z - x of an option come to the device in a pass."""
    columns, unit = problem.columns, problem.columns.second_unit
    options = [option for _, option in columns.options]
    arrival = [option.arrival_s for option in options]
    back = [value.count * value.back_s for value in masses.values]
    out = [value.count * value.out_s for value in masses.values]
    away = [-seconds for seconds in arrival]
    problem.add(columns.row(arrival, away, (), back, -1.0), 0.0, unit)
    problem.add(columns.row((), (), (), out, -1.0), 0.0, unit)
    staging = [option.staging_s for option in options]
    away = [-seconds for seconds in staging]
    problem.add(columns.row(staging, away, away, (), -1.0), 0.0, unit)
    compute = columns.row((option.compute_s for option in options), seconds=-1.0)
    problem.add(compute, -masses.compute_s, unit)


def _hold(problem: _Problem, masses: Masses) -> None:
    """What tiers hold while a step runs, and between passes."""
    columns, device = problem.columns, masses.device_capacity_bytes
    options = [option for _, option in columns.options]
    sizes = [float(option.device_bytes) for option in options]
    least = [float(min(option.device_bytes, option.host_bytes)) for option in options]
    stays = [-float(value.count * value.device_bytes) for value in masses.values]
    host = masses.host_capacity_bytes
    unit = float(max(1, device))
    for index, window in enumerate(masses.windows):
        shares = [kind.shares.get(index, 0.0) for kind, _ in columns.options]
        read = [share * size for share, size in zip(shares, sizes, strict=True)]
        room = device - window.touched_bytes - window.idle_bytes
        spilled = stays if window.idle_bytes else ()
        kept = [size - part for size, part in zip(sizes, read, strict=True)]
        problem.add(columns.row(read, kept, (), spilled), room, unit)
        if host is not None:
            either = [(1 - share) * size for share, size in zip(shares, least, strict=True)]
            problem.add(columns.row(read, either, either, spilled), room + host, unit)
    room = device - masses.between_bytes
    problem.add(columns.row((), sizes), room, unit)
    if host is not None:
        near = (float(option.host_bytes) for option in options)
        problem.add(columns.row((), (), near), host, unit)
        problem.add(columns.row((), least, least), room + host, unit)
    for index in range(len(options)):
        only = np.eye(len(options))[index]
        problem.add(columns.row(-only, only, only), 0.0, 1.0)


def _minimum(
    problem: _Problem, kinds: Sequence[Kind], masses: Masses, goal: Row
) -> npt.NDArray[np.float64] | None:
    """HiGHS' answer; None if there is none."""
    # SciPy's optimisers take as long to import as a small model to plan.
    from scipy.optimize import Bounds, LinearConstraint, milp

    columns = problem.columns
    count = len(columns.options)
    most = [float(kind.count) for kind, _ in columns.options]
    near = most if masses.host_capacity_bytes is not None else [0.0] * count
    upper = np.array([*most, *most, *near, *(1.0 for _ in masses.values), np.inf])
    whole = np.zeros(columns.width, int)
    whole[:count] = 1
    found: Any = milp(
        goal,
        integrality=whole,
        bounds=Bounds(np.zeros(columns.width), upper),
        constraints=[
            LinearConstraint(np.array(problem.rows), -np.inf, np.array(problem.limits)),
            LinearConstraint(_every_member(columns, kinds), *[[one.count for one in kinds]] * 2),
        ],
        options={"node_limit": MOST_NODES, "mip_rel_gap": ALIKE / 10},
    )
    return None if found.x is None else np.asarray(found.x)


def _every_member(columns: _Columns, kinds: Sequence[Kind]) -> npt.NDArray[np.float64]:
    rows = np.zeros((len(kinds), columns.width))
    place = 0
    for row, kind in zip(rows, kinds, strict=True):
        row[place : place + len(kind.options)] = 1.0
        place += len(kind.options)
    return rows


def _counts(kinds: Sequence[Kind], numbers: npt.NDArray[np.float64]) -> tuple[tuple[int, ...], ...]:
    found, place = [], 0
    for kind in kinds:
        found.append(tuple(round(n) for n in numbers[place : place + len(kind.options)]))
        place += len(kind.options)
    return tuple(found)
