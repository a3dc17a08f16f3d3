"""Run alone: predicted times, and those of the runtime's own loop on a clock that only waits move.

Prints one JSON object: case -> [actions, the first that differ, how many differ].
"""

import dataclasses
import itertools
import json
import time
from typing import Any

from decoders import computer, decoder, tower

from memsched.cost import simulate
from memsched.machine import Machine
from memsched.passes.compile import compile_plan
from memsched.plan import Action, Copy, Free, Plan, Run
from memsched.program import Program
from memsched.runtime.flight import Flight
from memsched.runtime.ledger import Ledger
from memsched.runtime.loop import Loop, carry_out
from memsched.runtime.operations import CopyOp, FreeOp, RunOp
from memsched.runtime.record import Record
from memsched.runtime.schedule import schedule


class Whole:
    """Whole 1024ths of a second, by size: their sums are exact."""

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        match action:
            case Run(step=name):
                return (1 + len(name) % 3 + program.step(name).flops % 5) / 1024
            case Copy(array=array):
                return (1 + program.arrays[array].nbytes // (4 << 20)) / 1024
            case Free():
                return 0.0


@dataclasses.dataclass
class Clock:
    """The time, and when each action began and ended."""

    now: float = 0.0
    times: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    lanes: dict[Any, float] = dataclasses.field(default_factory=dict)

    def work(self, index: int, lane: Any, after: float, seconds: float) -> float:
        """An action on a lane, no earlier than now. Returns its end."""
        start = max(self.now, after, self.lanes.get(lane, 0.0))
        self.lanes[lane] = start + seconds
        self.times[index] = (start, start + seconds)
        return start + seconds

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


@dataclasses.dataclass
class Thing:
    """An array that will be there at a time."""

    clock: Clock
    end: float

    def is_ready(self) -> bool:
        return self.clock.now >= self.end

    def block_until_ready(self) -> None:
        self.clock.wait(self.end)


@dataclasses.dataclass
class Moving:
    """A transfer, as the loop sees it."""

    op: CopyOp
    clock: Clock
    times_s: list[float]

    @property
    def done(self) -> bool:
        return self.clock.now >= self.times_s[1]


class Tiers:
    """Tiers that hold nothing: they only know when something would be there."""

    def __init__(self, clock: Clock, plan: Plan, program: Program, machine: Machine) -> None:
        self.clock, self.program, self.machine = clock, program, machine
        names = [tier.name for tier in machine.tiers]
        self.values: dict[str, dict[str, Any]] = {name: {} for name in names}
        self.arriving: dict[str, dict[str, Moving]] = {name: {} for name in names}
        self.leaving: dict[tuple[str, str], float] = {}
        for rest in plan.entry:
            self.values[rest.tier][rest.array] = Thing(clock, 0.0)

    def copy(self, op: CopyOp) -> Moving:
        name, source, target = op.action.array, op.action.source, op.action.target
        before = self.arriving[source].get(name)
        after = before.times_s[1] if before else 0.0
        seconds = Whole().seconds(op.action, self.program, self.machine)
        end = self.clock.work(op.index, (source, target), after, seconds)
        found = Moving(op, self.clock, list(self.clock.times[op.index]))
        self.arriving[target][name] = found
        self.leaving[name, source] = max(end, self.leaving.get((name, source), 0.0))
        return found

    def arrive(self, tier: str, name: str) -> None:
        moving = self.arriving[tier].pop(name)
        self.clock.wait(moving.times_s[1])
        self.values[tier][name] = Thing(self.clock, moving.times_s[1])

    def leave(self, tier: str, name: str) -> None:
        self.clock.wait(self.leaving.pop((name, tier), 0.0))

    def free(self, op: FreeOp) -> None:
        tier, name = op.action.tier, op.action.array
        if name in self.arriving[tier]:
            self.arrive(tier, name)
        self.leave(tier, name)
        del self.values[tier][name]


def executed(plan: Plan, program: Program, machine: Machine) -> dict[int, tuple[float, float]]:
    """When each step and transfer was busy in the runtime's loop."""
    clock = Clock()
    time.perf_counter = lambda: clock.now
    made = schedule(plan, program, machine)
    tiers: Any = Tiers(clock, plan, program, machine)

    def kernel(op: RunOp) -> Any:
        def run(*inputs: Thing) -> tuple[Thing, ...]:
            seconds = Whole().seconds(op.action, program, machine)
            after = max((one.end for one in inputs), default=0.0)
            end = clock.work(op.index, "compute", after, seconds)
            return tuple(Thing(clock, end) for _ in op.results)

        return run

    kernels = [kernel(op) for op in made.ops if isinstance(op, RunOp)]
    record = Record(made.actions)
    ledger = Ledger(tuple(tier.name for tier in machine.tiers))
    carry_out(Loop(tiers, ledger, record, Flight(record), kernels, {}, ()), made.ops)
    return clock.times


MACHINES = {
    "2 tiers, all fits": computer(device=5_000_000_000),
    "2 tiers, half": computer(device=1_800_000_000),
    "2 tiers, a third": computer(device=1_200_000_000),
    "2 tiers, a twentieth": computer(device=250_000_000),
    "3 tiers, host holds it": computer(device=1_000_000_000, host=8_000_000_000),
    "3 tiers, little host": computer(device=1_000_000_000, host=1_500_000_000),
}


def main() -> None:
    """Compares all cases; prints for each how many actions there were and which differ."""
    found = {}
    programs = {"decoder": decoder(), "tower": tower(layers=40)}
    for (what, program), (where, machine) in itertools.product(programs.items(), MACHINES.items()):
        plan = compile_plan(program, machine, Whole())
        clock = executed(plan, program, machine)
        predicted = {
            span.index: (span.start_s, span.end_s)
            for span in simulate(plan, program, machine, Whole())
            if not isinstance(plan.actions[span.index], Free)
        }
        differing = [
            [str(plan.actions[index]), predicted[index], clock.get(index)]
            for index in predicted
            if clock.get(index) != predicted[index]
        ]
        found[f"{what}, {where}"] = [len(predicted), differing[:3], len(differing)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
