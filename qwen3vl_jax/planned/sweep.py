"""The same request on machines that differ in one thing, or other requests on one machine.

sweep = parse_sweep("device-memory=1GB..24GB", points=9)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from memsched.cost import CostModel, Roofline
from memsched.errors import DoesNotFitError, ProgramError
from memsched.machine import DEVICE, HOST, NVME, Machine
from memsched.sizes import parse_size
from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.planned.forecast import Forecast, forecast
from qwen3vl_jax.planned.forecast_data import first_token_seconds, tokens_per_s
from qwen3vl_jax.planned.forms import Setting, Tracers
from qwen3vl_jax.planned.request import MOST_ROWS, Request

TIERS = {"device-memory": DEVICE, "host-memory": HOST}
# What is swept, and its unit.
UNITS = {"device-memory": "B", "host-memory": "B", "disk-rate": "B/s", "batch": "", "context": ""}
# How far counts go; models that take a longer context than this are not known.
MOST_COUNT = {"batch": MOST_ROWS, "context": 1 << 30}
MOST_POINTS = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Sweep:
    """Values of one quantity, rising."""

    axis: str
    values: tuple[int, ...]

    @property
    def unit(self) -> str:
        """ "B", "B/s", or "" for a count."""
        return UNITS[self.axis]


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """What one value makes of the request; without figures if it is refused.

    `limited_by` is the lane that sets the bound of a token. `needed_bytes` is what the device holds
    at most, `read_bytes` what a pass of decoding reads from disk, `arriving_bytes` what it copies
    to the device. `smallest_bytes` would just do, by tier.
    """

    value: int
    tokens_per_s: float | None = None
    first_token_s: float | None = None
    limited_by: str = ""
    needed_bytes: int = 0
    read_bytes: int = 0
    arriving_bytes: int = 0
    smallest_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    refused: str = ""

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.tokens_per_s is not None


def parse_sweep(text: str, points: int) -> Sweep:
    """ "axis=low..high" as so many values, each the same factor above the last.

    Raises:
        UsageError: no such axis, or no such range.
    """
    axis, _, span = text.partition("=")
    low_text, dots, high_text = span.partition("..")
    if axis not in UNITS or not dots:
        raise UsageError(
            f"--sweep {text[:60]}: something like device-memory=1GB..24GB is wanted; "
            f"there are {', '.join(UNITS)}"
        )
    if not 2 <= points <= MOST_POINTS:
        raise UsageError(f"--points must be from 2 to {MOST_POINTS}, found {points}")
    if UNITS[axis]:
        per_second = UNITS[axis].removeprefix("B")
        low, high = (parse_size(part.removesuffix(per_second)) for part in (low_text, high_text))
    else:
        low, high = (_count(axis, part) for part in (low_text, high_text))
    if not 0 < low < high:
        raise UsageError(f"--sweep {text[:60]}: the range must rise from more than 0")
    return Sweep(axis, tuple(dict.fromkeys(int(v + 0.5) for v in np.geomspace(low, high, points))))


def _count(axis: str, text: str) -> int:
    most = MOST_COUNT[axis]
    if not text.isdecimal() or len(text) > len(str(most)) or int(text) > most:
        raise UsageError(
            f"--sweep {axis}: {text[:60]!r} is no count of at most {most:,}; write {axis}=1..64"
        )
    return int(text)


def run_sweep(
    sweep: Sweep,
    config: Config,
    request: Request,
    machine: Machine,
    dtype: np.dtype,
    say: Callable[[str], None],
    cost: CostModel | None = None,
    encodings: Encodings = NOTHING_ENCODED,
    plan_seconds: float | None = None,
) -> tuple[Point, ...]:
    """Plans every point; what cannot be done is a point, too.

    Args:
        say: gets a line before every point.
        cost: how long actions take; by default what the machine's rates say.
        encodings: of weights that rest encoded.
        plan_seconds: as for `memsched.compile_phases`, for each point.

    Raises:
        UsageError: the machine has not what is swept.
    """
    if sweep.axis in TIERS and not machine.has_tier(TIERS[sweep.axis]):
        raise UsageError(
            f"machine {machine.name!r} has no tier {TIERS[sweep.axis]!r}; sweep another"
        )
    cost = cost or Roofline()
    setting = Setting(config, machine, dtype, cost, encodings)

    @functools.lru_cache(maxsize=1)  # no point needs what another one's request was traced to
    def tracers(asked: Request) -> Tracers:
        return setting.tracers()

    def plan(value: int) -> Point:
        say(f"planning {sweep.axis} {value:,} {sweep.unit}".rstrip())
        try:
            asked = _request(sweep, config, request, value)
            found = forecast(
                config,
                _machine(sweep, machine, value),
                asked,
                dtype=dtype,
                tracers=tracers(asked),
                cost=cost,
                encodings=encodings,
                plan_seconds=plan_seconds,
            )
        except (DoesNotFitError, ProgramError, UsageError) as error:
            return refused(value, error)
        return figures(value, found)

    points = [plan(value) for value in sweep.values]
    exact = _just_enough(sweep, points)
    if exact is not None:
        points.append(plan(exact))
    return tuple(sorted(points, key=lambda point: point.value))


def _just_enough(sweep: Sweep, points: list[Point]) -> int | None:
    """The device memory with which all that a token reads stays: it is worth a point of its own."""
    if sweep.axis != "device-memory":
        return None
    whole = [point for point in points if point.fits and not point.arriving_bytes]
    known = {point.value for point in points}
    if not whole or whole[0] is points[0] or whole[0].needed_bytes in known:
        return None
    return whole[0].needed_bytes


def refused(value: int, error: DoesNotFitError | ProgramError | UsageError) -> Point:
    """A point that cannot be, and why; with the least that would do if budgets are too small."""
    smallest = error.smallest if isinstance(error, DoesNotFitError) else {}
    return Point(value, smallest_bytes=smallest, refused=str(error))


def figures(value: int, found: Forecast) -> Point:
    """What a forecast makes of a point."""
    decode = found.summaries["decode"]
    moved = decode.link_bytes.items()
    return Point(
        value,
        tokens_per_s(found),
        first_token_seconds(found),
        decode.bound.lane,
        max(one.summary.occupancy[DEVICE].peak_bytes for one in found.passes),
        sum(nbytes for link, nbytes in moved if link.startswith(f"{NVME}->")),
        sum(nbytes for link, nbytes in moved if link.endswith(f"->{DEVICE}")),
        dict(found.smallest_bytes),
    )


def _machine(sweep: Sweep, machine: Machine, value: int) -> Machine:
    if sweep.axis in TIERS:
        return machine.with_capacities({TIERS[sweep.axis]: value})
    if sweep.axis != "disk-rate":
        return machine
    reading = next(link.bytes_per_s for link in machine.links if link.source == NVME)
    links = tuple(
        # Writing keeps its share of the rate of reading.
        dataclasses.replace(link, bytes_per_s=link.bytes_per_s * value / reading)
        if NVME in (link.source, link.target)
        else link
        for link in machine.links
    )
    return dataclasses.replace(machine, links=links)


def _request(sweep: Sweep, config: Config, request: Request, value: int) -> Request:
    if sweep.axis == "batch":
        return dataclasses.replace(request, batch=value)
    if sweep.axis != "context":
        return request
    others = request.prompt_length(config) - request.prompt_tokens + request.new_tokens
    if value <= others:
        raise UsageError(f"a context of {value:,} tokens is no more than answer and pictures take")
    return dataclasses.replace(request, prompt_tokens=value - others, max_context=value)


def points_dict(sweep: Sweep, points: tuple[Point, ...]) -> list[dict[str, Any]]:
    """As data, for JSON."""
    return [{"fits": point.fits, **dataclasses.asdict(point)} for point in points]
