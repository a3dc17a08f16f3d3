"""Steps in an order in which some run again, and the program in which every run is its own step.

To compute again is to run a step a second time, after its results were freed. Who is planned in
between need not know: each run becomes a step with arrays of its own, that program is planned like
any other, and in its plan the names are changed back.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from memsched.cost import CostModel
from memsched.machine import DEVICE, Machine
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import ArraySpec, Program, Step

# Numbers of steps; each appears first in the program's order.
Order = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """A program in which every run of an order is a step.

    `originals` says which array or step of the program before a new name stands for.
    """

    program: Program
    originals: Mapping[str, str]

    def cost(self, cost: CostModel, program: Program) -> CostModel:
        """A cost model of this program: a step takes as long every time."""
        return _UnrolledCost(cost, program, self.originals)

    def rolled_up(self, plan: Plan, program: Program) -> Plan:
        """A plan for this program as a plan for the `program` that it was made of.

        An array that is made again has been read for the last time before. Where it still waits
        to be freed, that happens now, because its place in the list is taken.
        """
        writer = _Writer(self.originals)
        for rest in plan.entry:
            writer.held[self._name(rest.array), rest.tier] = rest.array
        for index, action in enumerate(plan.actions):
            if index in plan.slots:
                writer.slots[len(writer.actions)] = plan.slots[index]
            if isinstance(action, Run):
                for name in self.program.step(action.step).writes:
                    writer.put(name, DEVICE)
                writer.actions.append(Run(self._name(action.step)))
            else:
                writer.write(action)
        return Plan(
            program.digest,
            plan.machine,
            tuple(self._rests(plan.entry)),
            tuple(writer.actions),
            tuple(self._rests(plan.exit)),
            writer.slots,
        )

    def _name(self, name: str) -> str:
        return self.originals.get(name, name)

    def _rests(self, rests: Iterable[Residence]) -> Iterable[Residence]:
        return (rest._replace(array=self._name(rest.array)) for rest in rests)


@dataclasses.dataclass(slots=True)
class _Writer:
    """A plan being written down under the old names. `held` says which new name lies there."""

    originals: Mapping[str, str]
    held: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    actions: list[Action] = dataclasses.field(default_factory=list)
    slots: dict[int, int] = dataclasses.field(default_factory=dict)

    def put(self, name: str, tier: str) -> None:
        """An array appears; one that stands for the same goes first."""
        original = self.originals.get(name, name)
        if self.held.get((original, tier), name) != name:
            self.actions.append(Free(original, tier))
        self.held[original, tier] = name

    def write(self, action: Copy | Free) -> None:
        """A Copy, or a Free of what has not made way already."""
        original = self.originals.get(action.array, action.array)
        if isinstance(action, Copy):
            self.put(action.array, action.target)
        elif self.held.get((original, action.tier)) != action.array:
            return
        else:
            del self.held[original, action.tier]
        self.actions.append(action._replace(array=original))


class _UnrolledCost:
    """Seconds of the actions that new names stand for."""

    def __init__(self, cost: CostModel, program: Program, originals: Mapping[str, str]) -> None:
        self._cost = cost
        self._program = program
        self._originals = originals

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action."""
        if isinstance(action, Run):
            action = Run(self._originals.get(action.step, action.step))
        else:
            name = self._originals.get(action.array, action.array)
            action = action._replace(array=name)
        return self._cost.seconds(action, self._program, machine)


def unroll(program: Program, order: Order) -> Unrolled:
    """The program that runs steps in an order, each time with results of its own."""
    arrays: dict[str, ArraySpec] = dict(program.arrays)
    originals: dict[str, str] = {}
    newest: dict[str, str] = {}
    ran: set[int] = set()
    taken = set(arrays) | {step.name for step in program.steps}
    steps: list[Step] = []
    for index in order:
        step = program.steps[index]
        reads = tuple(newest.get(name, name) for name in step.reads)
        updates = tuple(newest.get(name, name) for name in step.updates)
        made = dict.fromkeys((step.name, *step.writes))
        again = {name: _free_name(name, taken) if index in ran else name for name in made}
        originals |= {new: old for old, new in again.items() if new != old}
        newest |= {name: again[name] for name in step.writes}
        arrays |= {
            again[name]: dataclasses.replace(program.arrays[name], name=again[name])
            for name in step.writes
        }
        steps.append(
            dataclasses.replace(
                step,
                name=again[step.name],
                reads=reads,
                writes=tuple(again[name] for name in step.writes),
                updates=updates,
            )
        )
        ran.add(index)
    outputs = tuple(newest.get(name, name) for name in program.outputs)
    return Unrolled(Program(arrays, tuple(steps), outputs), originals)


def _free_name(name: str, taken: set[str]) -> str:
    """The next name like "h0 (run 2)" that nothing has."""
    number = 2
    while f"{name} (run {number})" in taken:
        number += 1
    taken.add(f"{name} (run {number})")
    return f"{name} (run {number})"


def stays(program: Program) -> tuple[str, ...]:
    """What is on the device at the end, weights aside."""
    return tuple(dict.fromkeys((*program.of_kind("cache", "feature"), *program.outputs)))


def repeatable(program: Program) -> frozenset[int]:
    """Steps that can run again and give the same.

    Nothing that such a step reads or writes is ever updated, and all that it reads is given or
    made by such a step.
    """
    changed = {name for step in program.steps for name in step.updates}
    safe = set(program.given) - changed
    found = []
    for index, step in enumerate(program.steps):
        if not step.updates and safe.issuperset(step.reads) and changed.isdisjoint(step.writes):
            safe.update(step.writes)
            found.append(index)
    return frozenset(found)
