"""Many weights that are always read together are planned as one, and moved one by one.

A layer of experts has 256 small arrays that the same steps read. To choose among 24,000 of them
takes minutes and gains nothing over choosing among some hundred groups.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from memsched.cost import CostModel
from memsched.cost.features import commonest_dtype
from memsched.machine import NVME, Machine, rounded
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import ArraySpec, Program

# Weights that the same steps read are put together if they are more than these.
MOST_ALONE = 64
# They become so many groups: as many decisions as a dense layer offers.
GROUPS = 16
# Where more weights than these are read, fewer are put together, too: into groups of such a share
# of all, so that there are about so many decisions.
MANY, FEW_ALONE, MANY_GROUPS, MANY_TIER_SHARE = 4096, 4, 1536, 4
# A group takes at most this share of a tier.
TIER_SHARE = 16

Members = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Grouped:
    """Programs with groups in the place of their members.

    `members` has the members of every group, `shares` where each lies in its group and what it
    takes there.
    """

    programs: Mapping[str, Program]
    members: Members
    shares: Mapping[str, tuple[int, int]]
    whole: Program

    def cost(self, cost: CostModel) -> CostModel:
        """A cost model for these programs: a group takes what its members take."""
        return _GroupedCost(cost, self.members, self.whole) if self.members else cost

    def expanded(self, plan: Plan, program: Program) -> Plan:
        """A plan for one of these programs as a plan for the `program` that it was made of."""
        if not self.members:
            return plan
        actions: list[Action] = []
        slots: dict[int, int] = {}
        for index, action in enumerate(plan.actions):
            for part, place in self._parts(action):
                if index in plan.slots:
                    slots[len(actions)] = plan.slots[index] + place
                actions.append(part)
        return Plan(
            program.digest,
            plan.machine,
            tuple(self._residences(plan.entry)),
            tuple(actions),
            tuple(self._residences(plan.exit)),
            slots,
        )

    def _parts(self, action: Action) -> list[tuple[Action, int]]:
        """The actions of a group's members, each with its place in the group."""
        if isinstance(action, Run) or action.array not in self.members:
            return [(action, 0)]
        names = self.members[action.array]
        if isinstance(action, Free):
            return [(Free(name, action.tier), 0) for name in names]
        return [
            (Copy(name, action.source, action.target, action.codec), self.shares[name][0])
            for name in names
        ]

    def _residences(self, rests: Iterable[Residence]) -> Iterable[Residence]:
        for rest in rests:
            if rest.array not in self.members:
                yield rest
                continue
            for name in self.members[rest.array]:
                offset = None if rest.offset is None else rest.offset + self.shares[name][0]
                yield Residence(name, rest.tier, rest.codec, offset)


def group_weights(programs: Mapping[str, Program], machine: Machine) -> Grouped:
    """Puts weights together that the same steps of all programs read; the same ones everywhere."""
    weights = {
        name: spec
        for program in programs.values()
        for name, spec in program.arrays.items()
        if spec.kind == "weight"
    }
    readers: dict[str, list[tuple[str, int]]] = {}
    for key, program in programs.items():
        for index, step in enumerate(program.steps):
            for name in dict.fromkeys(step.reads):
                if name in weights:
                    readers.setdefault(name, []).append((key, index))
    alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for name, steps in readers.items():
        alike.setdefault(tuple(steps), []).append(name)
    unit = max(tier.alignment_bytes for tier in machine.tiers)
    sizes = {name: rounded(spec.nbytes, unit) for name, spec in weights.items()}
    members: dict[str, tuple[str, ...]] = {}
    many = len(readers) > MANY
    least = sum(sizes[name] for name in readers) // MANY_GROUPS if many else 0
    for together in alike.values():
        if len(together) > (FEW_ALONE if many else MOST_ALONE):
            members |= _cut(together, sizes, machine, least)
    shares = {}
    for names in members.values():
        place = 0
        for name in names:
            shares[name] = place, sizes[name]
            place += sizes[name]
    found = {key: _coarse(program, members, shares) for key, program in programs.items()}
    return Grouped(found, members, shares, Program(weights, (), ()))


def _cut(
    names: Iterable[str], sizes: Mapping[str, int], machine: Machine, least: int
) -> dict[str, tuple[str, ...]]:
    """Neighbours in groups of about equal bytes."""
    order = list(names)
    most = max(least, sum(sizes[name] for name in order) // GROUPS)
    share = MANY_TIER_SHARE if least else TIER_SHARE
    for tier in machine.tiers:
        if tier.name != NVME:
            most = min(most, tier.max_array_bytes, tier.capacity_bytes // share)
    groups: list[list[str]] = []
    room = 0
    for name in order:
        if not groups or sizes[name] > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= sizes[name]
    return {f"{group[0]} and {len(group) - 1} more": tuple(group) for group in groups if group[1:]}


def _coarse(program: Program, members: Members, shares: Mapping[str, tuple[int, int]]) -> Program:
    """A program that reads groups."""
    if not members:
        return program
    group_of = {name: group for group, names in members.items() for name in names}
    arrays: dict[str, ArraySpec] = {}
    for name, spec in program.arrays.items():
        group = group_of.get(name)
        if group is None:
            arrays[name] = spec
        elif group not in arrays:
            nbytes = sum(shares[member][1] for member in members[group])
            # It tells a cost model what is computed with the group.
            dtype = commonest_dtype(program.arrays[member] for member in members[group])
            count = nbytes // np.dtype(dtype).itemsize
            arrays[group] = ArraySpec(group, (count,), dtype, "weight")
    steps = tuple(
        dataclasses.replace(
            step, reads=tuple(dict.fromkeys(group_of.get(name, name) for name in step.reads))
        )
        for step in program.steps
    )
    return Program(arrays, steps, program.outputs)


class _GroupedCost:
    """Seconds of a group are those of its members, one after another; added up once."""

    def __init__(self, cost: CostModel, members: Members, whole: Program) -> None:
        self._cost = cost
        self._members = members
        self._whole = whole
        self._known: dict[Action, float] = {}

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action; of groups on one machine, as those of `Remembered`."""
        if isinstance(action, Run) or action.array not in self._members:
            return self._cost.seconds(action, program, machine)
        known = self._known.get(action)
        if known is None:
            known = self._known[action] = sum(
                self._cost.seconds(action._replace(array=name), self._whole, machine)
                for name in self._members[action.array]
            )
        return known
