"""Random valid plans, drawn without any of the planner: pinned, early, spilled and made again.

They are not good plans. They are there so that verify and the runtime meet every turn that a plan
can take.
"""

import dataclasses
import functools

import numpy as np

from memsched.machine import DEVICE, NVME, Machine, rounded
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import Program, Step


@dataclasses.dataclass
class Draft:
    """A plan being drawn. `held` is what lies where, with offsets; `busy` must not be evicted."""

    program: Program
    machine: Machine
    rng: np.random.Generator
    entry: tuple[Residence, ...] = ()
    actions: list[Action] = dataclasses.field(default_factory=list)
    slots: dict[int, int] = dataclasses.field(default_factory=dict)
    held: dict[tuple[str, str], int | None] = dataclasses.field(default_factory=dict)
    busy: set[str] = dataclasses.field(default_factory=set)

    @functools.cached_property
    def nbytes(self) -> dict[str, int]:
        """What each array takes in an arena."""
        return {name: rounded(spec.nbytes, 64) for name, spec in self.program.arrays.items()}

    @property
    def tiers(self) -> list[str]:
        return [tier.name for tier in self.machine.tiers]

    def is_weight(self, name: str) -> bool:
        return self.program.arrays[name].kind == "weight"

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)


def random_plan(rng: np.random.Generator, program: Program, machine: Machine) -> Plan:
    """A valid plan for a machine with enough room; the arenas stay about as small as the weights.

    Whether it fits is not looked at: give the machine what the plan takes.
    """
    return _written(_drawn(rng, program, machine))


def random_round(rng: np.random.Generator, program: Program, machine: Machine) -> Plan:
    """The same, but weights lie after it as they lay before it: it can follow itself."""
    draft = _drawn(rng, program, machine)
    _settle(draft)
    return _written(draft)


def _drawn(rng: np.random.Generator, program: Program, machine: Machine) -> Draft:
    draft = Draft(program, machine, rng)
    _enter(draft)
    makers = _makers(program)
    for index, step in enumerate(program.steps):
        later = {name for other in program.steps[index:] for name in other.inputs}
        _stir(draft, later, makers)
        _do(draft, step, makers)
        for name in dict.fromkeys(step.inputs + step.results):
            needed = any(name in other.inputs for other in program.steps[index + 1 :])
            if not needed and not _stays(program, name) and not _source(program, name):
                _drop(draft, name)
    _finish(draft, makers)
    return draft


def _stays(program: Program, name: str) -> bool:
    kinds = ("weight", "cache", "feature")
    return program.arrays[name].kind in kinds or name in program.outputs


def _source(program: Program, name: str) -> bool:
    """Given and never changed: kept to the end, so that steps can run again."""
    return name in program.given and all(name not in step.updates for step in program.steps)


def _makers(program: Program) -> dict[str, Step]:
    """Arrays that can be made again whenever wanted, and the steps that make them."""
    changed = {name for step in program.steps for name in step.updates}
    safe = set(program.given) - changed
    makers: dict[str, Step] = {}
    for step in program.steps:
        if not step.updates and safe.issuperset(step.reads) and changed.isdisjoint(step.writes):
            safe.update(step.writes)
            makers |= dict.fromkeys(step.writes, step)
    return makers


def _enter(draft: Draft) -> None:
    """Weights rest in nvme and some also elsewhere; all else is given on the device."""
    for name in draft.program.given:
        draft.held[name, NVME if draft.is_weight(name) else DEVICE] = None
    for name in draft.program.of_kind("weight"):
        for tier in draft.tiers[:-1]:
            if draft.chance(0.25):
                draft.held[name, tier] = _room(draft, name, tier)
    draft.entry = _rests(draft)


def _rests(draft: Draft) -> tuple[Residence, ...]:
    return tuple(
        Residence(name, tier, offset=offset) for (name, tier), offset in draft.held.items()
    )


def _room(draft: Draft, name: str, tier: str) -> int | None:
    """A random free range of the arena, above all where something lay before."""
    if not draft.is_weight(name) or tier != draft.tiers[-2]:
        return None
    nbytes = draft.nbytes
    limit = sum(nbytes[who] for who in draft.program.of_kind("weight"))

    def choices() -> list[int]:
        taken = [
            (at, at + nbytes[who])
            for (who, where), at in draft.held.items()
            if where == tier and at is not None
        ]
        edges = {0} | {edge for pair in taken for edge in pair}
        return sorted(
            at
            for at in edges
            if all(at + nbytes[name] <= first or end <= at for first, end in taken)
        )

    good = [at for at in choices() if at + nbytes[name] <= limit // 2]
    if not good:
        for who in [who for who, where in draft.held if where == tier and draft.is_weight(who)]:
            if who not in draft.busy and draft.entry:
                _free(draft, who, tier)
        good = choices()[:1]
    return int(draft.rng.choice(good))


def _free(draft: Draft, name: str, tier: str) -> None:
    if not (draft.is_weight(name) and tier == NVME):
        draft.actions.append(Free(name, tier))
        del draft.held[name, tier]


def _drop(draft: Draft, name: str) -> None:
    for who, tier in list(draft.held):
        if who == name:
            _free(draft, name, tier)


def _copy(draft: Draft, name: str, source: str, target: str) -> None:
    offset = _room(draft, name, target)
    if offset is not None:
        draft.slots[len(draft.actions)] = offset
    draft.actions.append(Copy(name, source, target))
    draft.held[name, target] = offset


def _bring(draft: Draft, name: str, makers: dict[str, Step]) -> None:
    """To the device, tier by tier from the nearest copy; what is nowhere is made again."""
    where = [tier for tier in draft.tiers if (name, tier) in draft.held]
    if not where:
        _do(draft, makers[name], makers)
        return
    for step in range(draft.tiers.index(where[0]), 0, -1):
        source, target = draft.tiers[step], draft.tiers[step - 1]
        _copy(draft, name, source, target)
        if draft.chance(0.5):
            _free(draft, name, source)


def _do(draft: Draft, step: Step, makers: dict[str, Step]) -> None:
    """Runs a step, with everything it takes brought before and stale copies freed after."""
    outer = set(draft.busy)
    draft.busy |= set(step.inputs)
    for name in step.inputs:
        if (name, DEVICE) not in draft.held:
            _bring(draft, name, makers)
    for name in step.writes:
        if (name, DEVICE) in draft.held:
            _free(draft, name, DEVICE)
    draft.actions.append(Run(step.name))
    draft.held |= {(name, DEVICE): None for name in step.writes}
    for name in step.updates:
        for tier in draft.tiers[1:]:
            if (name, tier) in draft.held:
                _free(draft, name, tier)
    draft.busy = outer


def _stir(draft: Draft, later: set[str], makers: dict[str, Step]) -> None:
    """A few random moves that change no result."""
    for _ in range(int(draft.rng.integers(0, 4))):
        name, tier = list(draft.held)[int(draft.rng.integers(len(draft.held)))]
        other = draft.tiers[
            (draft.tiers.index(tier) + int(draft.rng.choice([-1, 1]))) % len(draft.tiers)
        ]
        if draft.chance(0.6):
            if draft.machine.link(tier, other) and (name, other) not in draft.held:
                _copy(draft, name, tier, other)
        elif sum(who == name for who, _ in draft.held) > 1 or (name in makers and name in later):
            _free(draft, name, tier)


def _finish(draft: Draft, makers: dict[str, Step]) -> None:
    """Outputs to the device, everything that is done with freed."""
    stays = [name for name in draft.program.arrays if _stays(draft.program, name)]
    for name in stays:
        if not draft.is_weight(name) and (name, DEVICE) not in draft.held:
            _bring(draft, name, makers)
    for name, tier in list(draft.held):
        if name not in stays or (not draft.is_weight(name) and tier != DEVICE):
            _free(draft, name, tier)


def _settle(draft: Draft) -> None:
    """Every weight to where it was first, and nowhere else."""
    first = {(one.array, one.tier): one.offset for one in draft.entry if draft.is_weight(one.array)}
    for (name, tier), offset in list(draft.held.items()):
        if draft.is_weight(name) and ((name, tier) not in first or first[name, tier] != offset):
            _free(draft, name, tier)
    near, far = draft.tiers[-2:]
    above = sum(draft.nbytes.values())
    for name, tier in [where for where in first if where not in draft.held]:
        source = near if tier == DEVICE and near != DEVICE else far
        passes = source == near and (name, near) not in draft.held
        if passes:
            draft.slots[len(draft.actions)] = above
            draft.actions.append(Copy(name, far, near))
        if tier == near:
            draft.slots[len(draft.actions)] = first[name, tier] or 0
        draft.actions.append(Copy(name, source, tier))
        draft.held[name, tier] = first[name, tier]
        if passes:
            draft.actions.append(Free(name, near))


def _written(draft: Draft) -> Plan:
    return Plan(
        draft.program.digest,
        draft.machine.digest,
        draft.entry,
        tuple(draft.actions),
        _rests(draft),
        draft.slots,
    )
