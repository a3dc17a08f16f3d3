"""What a plan does, played through: a second opinion on plans that shares nothing with verify.

Values are hashes. Arenas are arrays of bytes that know whose value was written there last, so two
arrays in one place spoil each other as they would in memory. Budgets are added up from nothing at
every action.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from memsched.machine import DEVICE, NVME, Machine, Tier
from memsched.plan import Copy, Plan, Run
from memsched.program import Program, Step

Values = dict[str, str]


class CrashError(Exception):
    """Something that no runtime could do."""


def blend(*parts: str) -> str:
    """A hash of strings and their borders."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def results(step: Step, taken: list[str]) -> Values:
    """What a kernel makes of values."""
    names = step.writes + step.updates
    return {name: blend(step.kernel, str(i), *taken) for i, name in enumerate(names)}


def given(program: Program) -> Values:
    """Each array that no step makes, before the first step."""
    made = {name for step in program.steps for name in step.writes}
    return {name: blend("given", name) for name in program.arrays if name not in made}


def direct(program: Program) -> Values:
    """All values after all steps in order."""
    values = given(program)
    for step in program.steps:
        values |= results(step, [values[name] for name in step.reads + step.updates])
    return values


@dataclasses.dataclass
class Played:
    """What was seen while playing a plan through.

    `left` is what lies where at the end: (array, tier) to its value and offset. `peaks` are bytes
    in use per tier, `reach` the end of the last range used in its arena.
    """

    left: dict[tuple[str, str], tuple[str, int | None]]
    objections: list[str]
    peaks: dict[str, int]
    reach: dict[str, int]


@dataclasses.dataclass
class Memory:
    """One tier: loose values, and an arena in which values lie at offsets."""

    nbytes: Mapping[str, int]
    loose: Values = dataclasses.field(default_factory=dict)
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)
    arena: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1 << 15, np.int64))
    tokens: list[str] = dataclasses.field(default_factory=lambda: ["nothing"])

    def names(self) -> list[str]:
        return [*self.loose, *self.offsets]

    def write(self, name: str, value: str, offset: int | None) -> None:
        self.erase(name)
        if offset is None:
            self.loose[name] = value
            return
        if not 0 <= offset <= len(self.arena) - self.nbytes[name]:
            raise CrashError(f"outside: offset {offset}")
        self.offsets[name] = offset
        self.tokens.append(value)
        self.arena[offset : offset + self.nbytes[name]] = len(self.tokens) - 1

    def read(self, name: str) -> str:
        if name in self.loose:
            return self.loose[name]
        if name not in self.offsets:
            raise CrashError(f"missing: {name} is not there")
        lies = self.arena[self.offsets[name] :][: self.nbytes[name]]
        found = [self.tokens[token] for token in np.unique(lies)]
        return found[0] if len(found) == 1 else blend("spoilt", *found)

    def erase(self, name: str) -> None:
        self.loose.pop(name, None)
        self.offsets.pop(name, None)


def play(plan: Plan, program: Program, machine: Machine) -> Played:
    """Carry a plan out on hashes, to its end or to the first thing that cannot be done."""
    nbytes = {name: spec.nbytes for name, spec in program.arrays.items()}
    memories = {tier.name: Memory(nbytes) for tier in machine.tiers}
    seen = Played({}, [], dict.fromkeys(memories, 0), _reach(plan, program, machine))
    touched = {tier.name: _touched(plan, program, machine, tier.name) for tier in machine.tiers}
    takes = {tier.name: _takes(program, tier) for tier in machine.tiers}
    try:
        for workspace in _actions(plan, program, machine, memories):
            _measure(seen, machine, memories, takes, touched, workspace)
    except CrashError as crash:
        seen.objections.append(f"crash: {crash}")
    for tier, memory in memories.items():
        seen.left |= {
            (name, tier): (memory.read(name), memory.offsets.get(name)) for name in memory.names()
        }
    return seen


def _actions(
    plan: Plan, program: Program, machine: Machine, memories: Mapping[str, Memory]
) -> Iterator[int]:
    """Does one action after the other; gives the workspace in use during each."""
    start = given(program)
    for rest in plan.entry:
        value = start.get(rest.array, "not made yet")
        _memory(memories, rest.tier).write(
            _array(program, rest.array), _encoded(value, rest.codec), rest.offset
        )
    yield 0
    steps = {step.name: step for step in program.steps}
    for index, action in enumerate(plan.actions):
        if isinstance(action, Run):
            if action.step not in steps:
                raise CrashError(f"missing: step {action.step}")
            step = steps[action.step]
            device = memories[DEVICE]
            taken = [device.read(name) for name in step.reads + step.updates]
            for name, value in results(step, taken).items():
                device.write(name, value, None)
            yield step.workspace_bytes
        elif isinstance(action, Copy):
            if machine.link(action.source, action.target) is None:
                raise CrashError(f"missing: link {action.source}->{action.target}")
            value = memories[action.source].read(_array(program, action.array))
            memories[action.target].write(
                action.array, _encoded(value, action.codec), plan.slots.get(index)
            )
            yield 0
        else:
            if action.array not in _memory(memories, action.tier).names():
                raise CrashError(f"missing: {action.array} cannot be freed")
            memories[action.tier].erase(action.array)
            yield 0


def _array(program: Program, name: str) -> str:
    if name not in program.arrays:
        raise CrashError(f"missing: array {name}")
    return name


def _memory(memories: Mapping[str, Memory], tier: str) -> Memory:
    if tier not in memories:
        raise CrashError(f"missing: tier {tier}")
    return memories[tier]


def _encoded(value: str, codec: str) -> str:
    return value if codec == "raw" else blend("encoded", codec, value)


def _ranges(plan: Plan, program: Program, machine: Machine, tier: str) -> list[tuple[int, int]]:
    """Every range of a tier's arena that the plan names anywhere, rounded to its alignment."""
    named = [(rest, rest.offset) for rest in plan.entry + plan.exit if rest.tier == tier]
    named += [
        (action, plan.slots.get(index))
        for index, action in enumerate(plan.actions)
        if isinstance(action, Copy) and action.target == tier
    ]
    step = machine.tier(tier).alignment_bytes
    return [
        (offset, offset + -(-program.arrays[who.array].nbytes // step) * step)
        for who, offset in named
        if offset is not None and who.array in program.arrays
    ]


def _reach(plan: Plan, program: Program, machine: Machine) -> dict[str, int]:
    return {
        tier.name: max((end for _, end in _ranges(plan, program, machine, tier.name)), default=0)
        for tier in machine.tiers
    }


def _touched(plan: Plan, program: Program, machine: Machine, tier: str) -> int:
    """Bytes of an arena that are ever used, counted one by one."""
    used = np.zeros(1 << 15, np.bool_)
    for first, end in _ranges(plan, program, machine, tier):
        used[max(first, 0) : max(end, 0)] = True
    return int(used.sum())


def _takes(program: Program, tier: Tier) -> dict[str, int]:
    """What each array takes in a tier outside its arena; weights at home take nothing."""
    return {
        name: 0
        if spec.kind == "weight" and tier.name == NVME
        else -(-spec.nbytes // tier.alignment_bytes) * tier.alignment_bytes
        for name, spec in program.arrays.items()
    }


def _measure(
    seen: Played,
    machine: Machine,
    memories: Mapping[str, Memory],
    takes: Mapping[str, Mapping[str, int]],
    touched: Mapping[str, int],
    workspace: int,
) -> None:
    """Adds up every tier from nothing, and objects to what is over budget."""
    for tier in machine.tiers:
        memory = memories[tier.name]
        used = touched[tier.name] + (workspace if tier.name == DEVICE else 0)
        used += sum(takes[tier.name][name] for name in memory.loose)
        for name in memory.names():
            if takes[tier.name][name] and memory.nbytes[name] > tier.max_array_bytes:
                seen.objections.append(f"budget: {name} is too large for {tier.name}")
        seen.peaks[tier.name] = max(seen.peaks[tier.name], used)
        if used > tier.capacity_bytes:
            seen.objections.append(f"budget: {tier.name} {used} of {tier.capacity_bytes}")


def objections(plan: Plan, program: Program, machine: Machine) -> list[str]:
    """What is really wrong with a plan: crashes, broken budgets, other bits. Empty if nothing.

    An exit that does not tell the truth is wrong too: the next plan builds on it.
    """
    seen = play(plan, program, machine)
    found = list(seen.objections)
    for tier, end in seen.reach.items():
        if end > machine.tier(tier).capacity_bytes:
            found.append(f"budget: the arena of {tier} reaches to {end}")
    if any(text.startswith("crash") for text in found):
        return found
    right = direct(program)
    kept = [name for name, spec in program.arrays.items() if spec.kind in ("cache", "feature")]
    for name in dict.fromkeys([*program.outputs, *kept]):
        if seen.left.get((name, DEVICE), ("", None))[0] != right[name]:
            found.append(f"bits: {name} is not what the program gives")
    told = {(rest.array, rest.tier): rest for rest in plan.exit}
    for place, rest in told.items():
        value = _encoded(right.get(rest.array, "unknown"), rest.codec)
        if seen.left.get(place) != (value, rest.offset):
            found.append(f"bits: exit says that {rest.array} is in {rest.tier} at {rest.offset}")
    return found + [f"leak: {place} is not told" for place in seen.left if place not in told]
