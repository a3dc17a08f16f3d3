"""The fullest moment of each tier, and what it is full of.

It counts as the referee does, but trusts the plan: a tier holds all ranges of its arena that the
plan ever uses, the arrays outside of it, and what the running step works in.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping

from memsched.machine import DEVICE, NVME, Machine, Tier, rounded
from memsched.plan import Copy, Free, Plan, Run
from memsched.program import Program

WORKSPACE = "workspace"
IDLE = "idle in the arena"


@dataclasses.dataclass(frozen=True, slots=True)
class Occupancy:
    """Bytes of a tier at its fullest moment, action `index` (-1: before the first).

    `parts` add up to `peak_bytes`: arrays by kind, "workspace", and what of the arena is free at
    that moment, "idle in the arena".
    """

    tier: str
    capacity_bytes: int
    peak_bytes: int
    index: int
    parts: Mapping[str, int]


@dataclasses.dataclass(slots=True)
class _Account:
    """A running count of one tier. `held` says of each array whether it lies in the arena."""

    tier: Tier
    arena_bytes: int
    held: dict[str, bool] = dataclasses.field(default_factory=dict)
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    held_bytes: int = 0
    in_arena_bytes: int = 0
    fullest: Occupancy | None = None


def occupancy(plan: Plan, program: Program, machine: Machine) -> dict[str, Occupancy]:
    """The fullest moment of every tier of the machine, in its order."""
    arenas = _arena_bytes(plan, program, machine)
    accounts = {tier.name: _Account(tier, arenas[tier.name]) for tier in machine.tiers}
    for rest in plan.entry:
        _hold(accounts[rest.tier], program, rest.array, rest.offset)
    for account in accounts.values():
        _note(account, -1, 0)
    for index, action in enumerate(plan.actions):
        match action:
            case Run(step=name):
                step = program.step(name)
                for array in step.writes:
                    _hold(accounts[DEVICE], program, array, None)
                _note(accounts[DEVICE], index, step.workspace_bytes)
            case Copy(array=array, target=tier):
                _hold(accounts[tier], program, array, plan.slots.get(index))
                _note(accounts[tier], index, 0)
            case Free(array=array, tier=tier):
                _forget(accounts[tier], program, array)
    return {
        name: account.fullest for name, account in accounts.items() if account.fullest is not None
    }


def _hold(account: _Account, program: Program, name: str, offset: int | None) -> None:
    nbytes = _counted_bytes(account.tier, program, name)
    account.held[name] = offset is not None
    account.kinds[program.arrays[name].kind] += nbytes
    account.held_bytes += nbytes
    if offset is not None:
        account.in_arena_bytes += nbytes


def _forget(account: _Account, program: Program, name: str) -> None:
    nbytes = _counted_bytes(account.tier, program, name)
    account.kinds[program.arrays[name].kind] -= nbytes
    account.held_bytes -= nbytes
    if account.held.pop(name):
        account.in_arena_bytes -= nbytes


def _counted_bytes(tier: Tier, program: Program, name: str) -> int:
    """What an array takes of a budget: weights lie on disk anyway."""
    array = program.arrays[name]
    if tier.name == NVME and array.kind == "weight":
        return 0
    return rounded(array.nbytes, tier.alignment_bytes)


def _note(account: _Account, index: int, workspace_bytes: int) -> None:
    """Remembers this moment if none was as full."""
    idle_bytes = account.arena_bytes - account.in_arena_bytes
    used = account.held_bytes + idle_bytes + workspace_bytes
    if account.fullest is None or used > account.fullest.peak_bytes:
        parts = {**account.kinds, WORKSPACE: workspace_bytes, IDLE: idle_bytes}
        filled = {part: nbytes for part, nbytes in sorted(parts.items()) if nbytes}
        account.fullest = Occupancy(
            account.tier.name, account.tier.capacity_bytes, used, index, filled
        )


def _arena_bytes(plan: Plan, program: Program, machine: Machine) -> dict[str, int]:
    """Bytes of the union of all ranges that the plan ever uses in each arena."""
    ranges: dict[str, set[tuple[int, int]]] = {tier.name: set() for tier in machine.tiers}

    def use(tier: str, array: str, offset: int | None) -> None:
        if offset is not None:
            alignment_bytes = machine.tier(tier).alignment_bytes
            end = offset + rounded(program.arrays[array].nbytes, alignment_bytes)
            ranges[tier].add((offset, end))

    for rest in plan.entry + plan.exit:
        use(rest.tier, rest.array, rest.offset)
    for index, offset in plan.slots.items():
        action = plan.actions[index]
        if isinstance(action, Copy):
            use(action.target, action.array, offset)
    return {tier: _union_bytes(found) for tier, found in ranges.items()}


def _union_bytes(ranges: set[tuple[int, int]]) -> int:
    total = covered = 0
    for start, end in sorted(ranges):
        total += max(0, end - max(start, covered))
        covered = max(covered, end)
    return total
