"""A program as few numbers: classes of weights that are alike, and of steps that are alike.

Layers are copies of each other, so a program of 25,000 arrays has some dozen classes. Whatever a
schedule keeps, the average over a class is what counts: no precision is lost where layers are
exactly alike, and where they are not the bound only gets lower.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from memsched.cost import CostModel
from memsched.machine import DEVICE, HOST, NVME, Machine, rounded
from memsched.plan import Copy, Run
from memsched.program import Program, Step


@dataclasses.dataclass(frozen=True, slots=True)
class WeightClass:
    """Weights of one size that steps read alike. Bytes and seconds are of one weight.

    `arrival_s` is its copy to the device, `staging_s` the one from "nvme" to the host (0 where
    there is none). `shares` has, by window, the steps that read one of them over all its steps.
    `names` are in the order of their first readers.
    """

    names: tuple[str, ...]
    device_bytes: int
    host_bytes: int
    arrival_s: float
    staging_s: float
    shares: Mapping[int, float]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.names)


@dataclasses.dataclass(frozen=True, slots=True)
class ValueClass:
    """Caches and features of one size, which stay unless they are spilled: out and back in."""

    count: int
    device_bytes: int
    out_s: float
    back_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """What the device holds while one of some like steps runs, weights aside.

    `touched_bytes`: what the step takes, makes and allocates. `idle_bytes`: caches and features
    that it does not touch. `seconds` are those of all these steps together.
    """

    touched_bytes: int
    idle_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Masses:
    """A program on a machine. `host_capacity_bytes` is None where the device is main memory.

    `between_bytes` is what is held between passes beside weights, `stays_bytes` the caches and
    features among it. Lanes are those of `arrival_s`, `staging_s` (None without a host), `out_s`.
    """

    weights: tuple[WeightClass, ...]
    values: tuple[ValueClass, ...]
    windows: tuple[Window, ...]
    between_bytes: int
    stays_bytes: int
    compute_s: float
    device_capacity_bytes: int
    host_capacity_bytes: int | None
    arrival_lane: str
    staging_lane: str | None
    out_lane: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Reader:
    """What is asked again and again while a program is read."""

    program: Program
    machine: Machine
    cost: CostModel
    near: str
    source: str

    def bytes_in(self, tier: str, name: str) -> int:
        nbytes = self.program.arrays[name].nbytes
        return rounded(nbytes, self.machine.tier(tier).alignment_bytes)

    def copy_s(self, name: str, start: str, end: str) -> float:
        """Seconds that a copy must take. None at all where a link leads past the host."""
        past_host = self.near == HOST and self.machine.link(NVME, DEVICE) is not None
        if past_host or self.machine.link(start, end) is None:
            return 0.0
        return self.cost.seconds(Copy(name, start, end), self.program, self.machine)

    def run_s(self, step: Step) -> float:
        return self.cost.seconds(Run(step.name), self.program, self.machine)

    def weight(self, name: str) -> tuple[int, int, float, float]:
        staging_s = self.copy_s(name, NVME, HOST) if self.near == HOST else 0.0
        arrival_s = self.copy_s(name, self.source, DEVICE)
        return self.bytes_in(DEVICE, name), self.bytes_in(self.near, name), arrival_s, staging_s

    def value(self, name: str) -> tuple[int, float, float]:
        out_s = self.copy_s(name, DEVICE, self.source)
        return self.bytes_in(DEVICE, name), out_s, self.copy_s(name, self.source, DEVICE)


def weight_numbers(
    program: Program, machine: Machine, cost: CostModel, names: Iterable[str]
) -> dict[str, tuple[int, int, float, float]]:
    """Of each weight what `WeightClass` has: bytes on the device and near it, seconds of copies."""
    reader = _reader(program, machine, cost)
    return {name: reader.weight(name) for name in names}


def _reader(program: Program, machine: Machine, cost: CostModel) -> _Reader:
    near = DEVICE if machine.device_is_host else HOST
    source = NVME if machine.device_is_host else HOST
    return _Reader(program, machine, cost, near, source)


def read_masses(program: Program, machine: Machine, cost: CostModel) -> Masses:
    """Sums a program up."""
    reader = _reader(program, machine, cost)
    near, source = reader.near, reader.source
    is_weight = set(program.of_kind("weight"))
    read = dict.fromkeys(name for step in program.steps for name in step.reads if name in is_weight)
    weights = {name: reader.weight(name) for name in read}
    stays = [name for name in program.of_kind("cache", "feature") if name in program.given]
    values = Counter(reader.value(name) for name in stays)
    given = [name for name in program.given if name not in is_weight]
    left = dict.fromkeys([*stays, *program.outputs])
    between = (sum(reader.bytes_in(DEVICE, name) for name in names) for names in (given, left))
    staying = {name: reader.bytes_in(DEVICE, name) for name in stays}
    steps = _alike(program.steps, weights, lambda step: _window(reader, step, weights, staying))
    windows = (dataclasses.replace(one, seconds=len(some) * one.seconds) for one, some in steps)
    return Masses(
        weights=_classes(weights, [some for _, some in steps]),
        values=tuple(ValueClass(count, *key) for key, count in values.items()),
        windows=tuple(windows),
        between_bytes=max(between),
        stays_bytes=sum(staying.values()),
        compute_s=sum(map(reader.run_s, program.steps)),
        device_capacity_bytes=machine.tier(DEVICE).capacity_bytes,
        host_capacity_bytes=None if near == DEVICE else machine.tier(HOST).capacity_bytes,
        arrival_lane=f"{source}->{DEVICE}",
        staging_lane=None if near == DEVICE else f"{NVME}->{HOST}",
        out_lane=f"{DEVICE}->{source}",
    )


def _window(
    reader: _Reader, step: Step, weights: Mapping[str, object], staying: Mapping[str, int]
) -> Window:
    """What one step holds beside weights. A feature that stays is idle for most steps."""
    touched = {name for name in step.inputs + step.writes if name not in weights}
    nbytes = sum(reader.bytes_in(DEVICE, name) for name in touched) + step.workspace_bytes
    busy_bytes = sum(staying[name] for name in touched if name in staying)
    return Window(nbytes, sum(staying.values()) - busy_bytes, reader.run_s(step))


def _alike(
    steps: Sequence[Step],
    weights: Mapping[str, tuple[int, int, float, float]],
    window: Callable[[Step], Window],
) -> list[tuple[Window, list[Step]]]:
    """Steps with the same window that read the same numbers of the same sizes; one's window."""
    groups: dict[object, tuple[Window, list[Step]]] = {}
    for step in steps:
        own = window(step)
        sizes = Counter(weights[name] for name in dict.fromkeys(step.reads) if name in weights)
        key = own, frozenset(sizes.items())
        groups.setdefault(key, (own, []))[1].append(step)
    return list(groups.values())


def _classes(
    weights: Mapping[str, tuple[int, int, float, float]], groups: Sequence[Sequence[Step]]
) -> tuple[WeightClass, ...]:
    """Weights of equal size that take equal shares of all windows."""
    shares: dict[str, dict[int, float]] = {name: {} for name in weights}
    for index, steps in enumerate(groups):
        for step in steps:
            for name in dict.fromkeys(step.reads):
                if name in weights:
                    own = shares[name]
                    own[index] = own.get(index, 0.0) + 1 / len(steps)
    classes: dict[object, list[str]] = {}
    for name, own in shares.items():
        classes.setdefault((weights[name], tuple(own.items())), []).append(name)
    return tuple(
        WeightClass(tuple(names), *weights[names[0]], shares[names[0]])
        for names in classes.values()
    )
