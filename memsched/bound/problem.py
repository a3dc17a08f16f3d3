"""The constraints of the bound as rows of a linear program."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from memsched.bound.flights import Flight, lanes
from memsched.bound.masses import Masses, WeightClass
from memsched.machine import DEVICE, HOST

COMPUTE = "compute"

Row = npt.NDArray[np.float64]
Numbers = Sequence[int | float]


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """Variables: x and y of each class of weights, u of each class of values, the share of each
    flight, and the seconds T.

    Bytes and seconds are divided by a unit each, so that tiny programs are solved as exactly as
    large ones.
    """

    masses: Masses
    byte_unit: float
    second_unit: float
    flights: tuple[Flight, ...] = ()

    @property
    def width(self) -> int:
        """How many there are."""
        return 2 * len(self.masses.weights) + len(self.masses.values) + len(self.flights) + 1

    def row(
        self,
        kept: Numbers = (),
        near: Numbers = (),
        spilled: Numbers = (),
        flying: Mapping[int, int | float] | None = None,
        seconds: float = 0.0,
    ) -> Row:
        """Coefficients of x, y, u, flights by number, and T; those of y are 0 without a host."""
        count = len(self.masses.weights)
        row = np.zeros(self.width)
        row[: len(kept)] = kept
        row[count : count + len(near)] = near
        row[2 * count : 2 * count + len(spilled)] = spilled
        for number, one in (flying or {}).items():
            row[2 * count + len(self.masses.values) + number] = one
        row[-1] = seconds
        return row

    def flight_bytes(self, window: int, lane: str | None) -> dict[int, int]:
        """What flights of a lane beside a window take in the tier they come to."""
        masses, found = self.masses, {}
        for number, flight in enumerate(self.flights):
            if flight.window == window and flight.lane == lane:
                weight = masses.weights[flight.weight]
                arriving = lane == masses.arrival_lane
                found[number] = weight.device_bytes if arriving else weight.host_bytes
        return found

    def flight_seconds(self, lane: str, weight: int | None = None) -> dict[int, float]:
        """How long steps run beside each flight of a lane, or of one class of weights."""
        return {
            number: self.masses.windows[flight.window].seconds
            for number, flight in enumerate(self.flights)
            if flight.lane == lane and weight in (None, flight.weight)
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """The part of a constraint that is the time of a lane: `row @ x - limit` seconds."""

    lane: str
    row: Row
    limit: float


@dataclasses.dataclass(slots=True)
class Problem:
    """Constraints `rows @ x <= limits`, with the tiers of each limit and the lanes of each row."""

    columns: Columns
    rows: list[Row] = dataclasses.field(default_factory=list)
    limits: list[float] = dataclasses.field(default_factory=list)
    tiers: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    parts: list[tuple[Part, ...]] = dataclasses.field(default_factory=list)

    def hold(self, row: Row, room_bytes: int | float, *tiers: str) -> None:
        """Bytes within a room. Nothing runs with less than none: then it is taken to be enough."""
        room = max(0.0, room_bytes) / self.columns.byte_unit
        self._add(row / self.columns.byte_unit, room, tiers if room_bytes > 0 else (), ())

    def add(self, row: Row, limit_bytes: int | float) -> None:
        """Any other limit in bytes."""
        self._add(row / self.columns.byte_unit, limit_bytes / self.columns.byte_unit, (), ())

    def share(self, row: Row) -> None:
        """Shares that are 1 together, at most."""
        self._add(row, 1.0, (), ())

    def seconds(self, row: Row, *parts: Part) -> None:
        """Parts that are together no more than `row` takes off: 0, or T where that is -1."""
        for part in parts:
            row = row + part.row / self.columns.second_unit
        limit = sum(part.limit for part in parts) / self.columns.second_unit
        self._add(row, limit, (), parts)

    def with_passing(self, passing: int | None) -> "Problem":
        """The same, and room in both tiers for the largest weight that passes through the host.

        Args:
            passing: its bytes, None if unknown.
        """
        rows, limits = [*self.rows], [*self.limits]
        found = Problem(self.columns, rows, limits, [*self.tiers], [*self.parts])
        _hold_passing(found, passing)
        return found

    def _add(self, row: Row, limit: float, tiers: tuple[str, ...], parts: tuple[Part, ...]) -> None:
        self.rows.append(row)
        self.limits.append(limit)
        self.tiers.append(tiers)
        self.parts.append(parts)


def problem_of(masses: Masses, flights: tuple[Flight, ...] = ()) -> Problem:
    """All constraints but bounds and `Problem.with_passing`.

    Args:
        masses: the program on its machine.
        flights: what may be copied beside steps. With none, copies take no room.
    """
    copies_s = [one.count * (one.arrival_s + one.staging_s) for one in masses.weights]
    unit_s = masses.compute_s + sum(copies_s) or 1.0
    unit_bytes = float(sum(one.count * one.device_bytes for one in masses.weights) or 1)
    problem = Problem(Columns(masses, unit_bytes, unit_s, flights))
    _hold_lanes(problem)
    _hold_shares(problem)
    _hold_windows(problem)
    _hold_flights(problem)
    _hold_between(problem)
    return problem


def bounds_of(columns: Columns) -> list[tuple[float, float | None]]:
    """All are shares from 0 to 1, and T is no less than the compute."""
    masses = columns.masses
    bounds: list[tuple[float, float | None]] = [(0.0, 1.0)] * (columns.width - 1)
    if masses.host_capacity_bytes is None:
        first = len(masses.weights)
        bounds[first : 2 * first] = [(0.0, 0.0)] * first
    return [*bounds, (masses.compute_s / columns.second_unit, None)]


def least_bytes(one: WeightClass) -> int:
    """What a weight takes at least, in the device or the host."""
    return min(one.device_bytes, one.host_bytes)


def only(index: int, count: int) -> list[float]:
    """1 for one of so many, 0 for all others."""
    return [float(other == index) for other in range(count)]


def _hold_lanes(problem: Problem) -> None:
    """A pass is as long as all steps, and what a lane copies while none of them runs."""
    columns, masses = problem.columns, problem.columns.masses
    time = columns.row(seconds=-1.0)
    back = [one.count * one.back_s for one in masses.values]
    for lane, copies in lanes(masses).items():
        saved = [-one for one in copies]
        if lane == masses.arrival_lane:
            row = columns.row(saved, (), back)
        else:
            row = columns.row(saved, saved)
        problem.seconds(time, Part(lane, row, -float(sum(copies))), *_steps(columns, lane))
    out = columns.row((), (), [one.count * one.out_s for one in masses.values])
    problem.seconds(time, Part(masses.out_lane, out, 0.0))


def _steps(columns: Columns, lane: str) -> Iterator[Part]:
    """The time for which steps run and a lane does not copy."""
    flying = columns.flight_seconds(lane)
    if flying:
        windows = {flight.window for flight in columns.flights}
        whole_s = sum(columns.masses.windows[window].seconds for window in windows)
        beside = columns.row(flying={number: -one for number, one in flying.items()})
        yield Part(COMPUTE, beside, -float(whole_s))


def _hold_shares(problem: Problem) -> None:
    """No weight is kept twice."""
    columns, count = problem.columns, len(problem.columns.masses.weights)
    for index in range(count):
        problem.share(columns.row(only(index, count), only(index, count)))


def _hold_windows(problem: Problem) -> None:
    """While a step runs: on the device, and in both tiers together."""
    masses, columns = problem.columns.masses, problem.columns
    stays = [-one.count * one.device_bytes for one in masses.values]
    for index, window in enumerate(masses.windows):
        apart = [one.count * (1 - one.shares.get(index, 0.0)) for one in masses.weights]
        read = sum(
            one.count * one.shares.get(index, 0.0) * one.device_bytes for one in masses.weights
        )
        room = masses.device_capacity_bytes - window.touched_bytes - window.idle_bytes - read
        kept = [share * one.device_bytes for share, one in zip(apart, masses.weights, strict=True)]
        # Without idle values there is nothing to gain from spilling.
        spilled = stays if window.idle_bytes else ()
        arriving = columns.flight_bytes(index, masses.arrival_lane)
        problem.hold(columns.row(kept, (), spilled, arriving), room, DEVICE)
        if masses.host_capacity_bytes is not None:
            either = [
                share * least_bytes(one) for share, one in zip(apart, masses.weights, strict=True)
            ]
            room += masses.host_capacity_bytes
            flying = arriving | columns.flight_bytes(index, masses.staging_lane)
            problem.hold(columns.row(either, either, spilled, flying), room, DEVICE, HOST)


def _hold_flights(problem: Problem) -> None:
    """Beside a step a lane copies one thing at a time, and each no longer than it takes."""
    columns, masses = problem.columns, problem.columns.masses
    together: dict[tuple[str, int], dict[int, float]] = {}
    for number, flight in enumerate(columns.flights):
        together.setdefault((flight.lane, flight.window), {})[number] = 1.0
    for numbers in together.values():
        problem.share(columns.row(flying=numbers))
    for lane, copies in lanes(masses).items() if columns.flights else ():
        for index, whole_s in enumerate(copies):
            saved = [whole_s * one for one in only(index, len(copies))]
            row = columns.row(saved, saved if lane == masses.staging_lane else ())
            beside = columns.row(flying=columns.flight_seconds(lane, index))
            problem.seconds(
                columns.row(), Part(COMPUTE, beside, 0.0), Part(lane, row, float(whole_s))
            )


def _hold_between(problem: Problem) -> None:
    """Between two passes."""
    masses, columns = problem.columns.masses, problem.columns
    room = masses.device_capacity_bytes - masses.between_bytes
    kept = [one.count * one.device_bytes for one in masses.weights]
    problem.hold(columns.row(kept), room, DEVICE)
    if masses.host_capacity_bytes is not None:
        either = [one.count * least_bytes(one) for one in masses.weights]
        room += masses.host_capacity_bytes
        problem.hold(columns.row(either, either), room, DEVICE, HOST)


def _hold_passing(problem: Problem, passing: int | None) -> None:
    """While the largest passing weight goes from the host to the device it takes room in both."""
    masses, columns = problem.columns.masses, problem.columns
    if masses.host_capacity_bytes is None:
        return
    either = [one.count * least_bytes(one) for one in masses.weights]
    stays = [-one.count * one.device_bytes for one in masses.values]
    passing_bytes = [
        one.host_bytes + one.device_bytes for one in masses.weights if one.host_bytes == passing
    ]
    room = masses.device_capacity_bytes + masses.host_capacity_bytes
    room -= masses.stays_bytes + min(passing_bytes, default=0)
    problem.hold(columns.row(either, either, stays), room, DEVICE, HOST)
