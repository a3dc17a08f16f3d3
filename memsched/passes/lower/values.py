"""Actions for everything but weights: freed when room is needed, spilled when it must be.

What dies is freed only when the next step needs its room: that leaves steps next to each other,
which the runtime compiles as one, and makes no Free wait for the step just issued. Where even the
living do not fit, the one read furthest in the future leaves the device (L. A. Belady, A study of
replacement algorithms for a virtual-storage computer, 1966). A copy outside stays valid until the
array is updated, so an array that is only read is written once.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable

from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, HOST, NVME
from memsched.passes.needs import Needs
from memsched.plan import Action, Copy, Free
from memsched.program import Step


@dataclasses.dataclass(frozen=True, slots=True)
class Values:
    """Actions before each step, and after the last one. Peaks are bytes, workspace included."""

    before: tuple[tuple[Action, ...], ...]
    device_bytes: int
    host_bytes: int
    nvme_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class ValueBudgets:
    """Device bytes that everything but weights takes, by how soon memory comes back.

    `spilled`: only what the running step touches stays. `tight`: freed right after the last reader.
    `relaxed`: one step later. `resident`: nothing is freed before the end.
    """

    spilled: int
    tight: int
    relaxed: int
    resident: int


@dataclasses.dataclass(slots=True)
class _Tiers:
    """What lies where while the actions are written."""

    needs: Needs
    budget: int
    host_room: int
    nvme_room: int
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    used: int = 0
    dead: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    away: dict[str, str] = dataclasses.field(default_factory=dict)
    host_used: int = 0
    nvme_used: int = 0
    peaks: dict[str, int] = dataclasses.field(default_factory=dict)
    actions: list[Action] = dataclasses.field(default_factory=list)

    def hold(self, name: str) -> None:
        self.held[name] = self.needs.device_bytes[name]
        self.used += self.held[name]

    def drop(self, name: str) -> None:
        self.actions.append(Free(name, DEVICE))
        self.used -= self.held.pop(name)

    def touch(self, tier: str, nbytes: int) -> None:
        self.peaks[tier] = max(self.peaks.get(tier, 0), nbytes)


def value_budgets(needs: Needs) -> ValueBudgets:
    """How much device memory everything but weights takes, for each way to give memory back."""
    program, size = needs.program, needs.device_bytes
    total = sum(size[name] for name in _values(needs, program.given))
    most = dict.fromkeys(("spilled", "tight", "relaxed", "resident"), total)
    held, dying = total - sum(size[name] for name in _unread(needs)), 0
    for index, step in enumerate(program.steps):
        made = sum(size[name] for name in step.writes)
        total += made
        held += made
        touched = sum(size[name] for name in _touched(needs, step))
        now = {"spilled": touched, "tight": held, "relaxed": held + dying, "resident": total}
        for key, nbytes in now.items():
            most[key] = max(most[key], nbytes + step.workspace_bytes)
        dying = sum(size[name] for name in _dying(needs, step, index))
        held -= dying
    at_exit = sum(size[name] for name in _stays(needs))
    return ValueBudgets(**{key: max(nbytes, at_exit) for key, nbytes in most.items()})


def value_actions(needs: Needs, budget_bytes: int, host_bytes: int, nvme_bytes: int) -> Values:
    """Writes the actions that keep everything but weights within a part of the device.

    Args:
        needs: the program and its machine.
        budget_bytes: what these arrays and the workspace may take on the device.
        host_bytes: what they may take in the host tier, if there is one.
        nvme_bytes: what they may take in files.

    Raises:
        DoesNotFitError: what must leave the device has no room elsewhere.
    """
    tiers = _Tiers(needs, budget_bytes, host_bytes, nvme_bytes)
    for name in _values(needs, needs.program.given):
        tiers.hold(name)
    tiers.touch(DEVICE, tiers.used)
    tiers.dead += [(-2, name) for name in _unread(needs)]
    before = []
    for index, step in enumerate(needs.program.steps):
        _prepare(tiers, index, step)
        before.append(tuple(tiers.actions))
        tiers.actions.clear()
        for name in step.writes:
            tiers.hold(name)
        tiers.touch(DEVICE, tiers.used + step.workspace_bytes)
        for name in _dying(needs, step, index):
            tiers.dead.append((index, name))
    _finish(tiers)
    before.append(tuple(tiers.actions))
    if tiers.peaks[DEVICE] > budget_bytes:
        raise _too_small(tiers, tiers.peaks[DEVICE])
    peaks = (tiers.peaks.get(tier, 0) for tier in (DEVICE, HOST, NVME))
    return Values(tuple(before), *peaks)


def _prepare(tiers: _Tiers, index: int, step: Step) -> None:
    """Makes room for a step, and brings back what it reads."""
    needs = tiers.needs
    inputs = list(_values(needs, dict.fromkeys(step.inputs)))
    absent = [name for name in inputs if name not in tiers.held]
    wanted = sum(needs.device_bytes[name] for name in (*absent, *step.writes))
    _make_room(tiers, index, wanted + step.workspace_bytes, set(inputs))
    for name in absent:
        _fetch(tiers, name)
    for name in inputs:
        # A copy of what changes now, or is read for the last time, is of no more use.
        if name in tiers.away and (name in step.updates or name in _dying(needs, step, index)):
            _forget(tiers, name)


def _finish(tiers: _Tiers) -> None:
    """Frees what is left, and brings back what must be on the device at the end."""
    for _, name in tiers.dead:
        tiers.drop(name)
    for name in [name for name in tiers.away if name not in tiers.held]:
        _fetch(tiers, name)
    for name in list(tiers.away):
        _forget(tiers, name)


def _make_room(tiers: _Tiers, index: int, wanted: int, keep: set[str]) -> None:
    """Frees the dead, the longest dead first, then spills the living."""
    if tiers.used + wanted > tiers.budget:
        # All that no running step reads goes at once: fewer places where steps are torn apart.
        old = [entry for entry in tiers.dead if entry[0] < index - 1]
        tiers.dead = [entry for entry in tiers.dead if entry[0] >= index - 1]
        for _, name in old:
            tiers.drop(name)
    while tiers.used + wanted > tiers.budget and tiers.dead:
        tiers.drop(tiers.dead.pop(0)[1])
    while tiers.used + wanted > tiers.budget:
        living = [name for name in tiers.held if name not in keep]
        if not living:
            raise _too_small(tiers, tiers.used + wanted)
        victim = max(living, key=lambda name: (_next_use(tiers.needs, name, index), name))
        if victim not in tiers.away:
            _spill(tiers, victim)
        tiers.drop(victim)


def _spill(tiers: _Tiers, name: str) -> None:
    """Copies an array out, to the host if it has room, else through it to files."""
    needs = tiers.needs
    nbytes = needs.host_bytes[name]
    in_file = needs.nvme_bytes[name]
    staged = needs.source == HOST
    if staged:
        # The room of one array is kept free: what goes to a file passes through it.
        if tiers.host_used + nbytes + largest_value_bytes(needs) <= tiers.host_room:
            tiers.actions.append(Copy(name, DEVICE, HOST))
            tiers.away[name] = HOST
            tiers.host_used += nbytes
            tiers.touch(HOST, tiers.host_used)
            return
        _check_room(name, HOST, tiers.host_used + nbytes, tiers.host_room)
        tiers.touch(HOST, tiers.host_used + largest_value_bytes(needs))
    tiers.nvme_used += in_file
    _check_room(name, NVME, tiers.nvme_used, tiers.nvme_room)
    tiers.touch(NVME, tiers.nvme_used)
    path = [DEVICE, HOST, NVME] if staged else [DEVICE, NVME]
    _pass_on(tiers, name, path)
    tiers.away[name] = NVME


def _fetch(tiers: _Tiers, name: str) -> None:
    """Brings an array back. Its copy outside stays."""
    home = tiers.away[name]
    through_host = home == NVME and tiers.needs.source == HOST
    if through_host:
        # More may lie there by now than when it went to its file.
        tiers.touch(HOST, tiers.host_used + tiers.needs.host_bytes[name])
    _pass_on(tiers, name, [NVME, HOST, DEVICE] if through_host else [home, DEVICE])
    tiers.hold(name)
    tiers.touch(DEVICE, tiers.used)


def _pass_on(tiers: _Tiers, name: str, path: list[str]) -> None:
    """Copies an array along a path. What lies between the ends is freed again."""
    for source, target in itertools.pairwise(path):
        tiers.actions.append(Copy(name, source, target))
    tiers.actions += [Free(name, tier) for tier in path[1:-1]]


def _forget(tiers: _Tiers, name: str) -> None:
    """Frees the copy outside the device."""
    home = tiers.away.pop(name)
    tiers.actions.append(Free(name, home))
    if home == HOST:
        tiers.host_used -= tiers.needs.host_bytes[name]
    else:
        tiers.nvme_used -= tiers.needs.nvme_bytes[name]


def _check_room(name: str, tier: str, wanted: int, room: int) -> None:
    if wanted > room:
        raise DoesNotFitError(
            f"array {name!r} leaves the device, but tier {tier!r} has {room:,} B for {wanted:,} B "
            f"of such arrays: raise its budget by {wanted - room:,} B, or the device's",
            {tier: wanted},
        )


def _too_small(tiers: _Tiers, found: int) -> DoesNotFitError:
    missing = found - tiers.budget
    smallest = tiers.needs.device_capacity_bytes + missing
    return DoesNotFitError(
        f"arrays that are no weights need {found:,} B on the device and have {tiers.budget:,} B: "
        f"give it {smallest:,} B",
        {DEVICE: smallest},
    )


def _values(needs: Needs, names: Iterable[str]) -> tuple[str, ...]:
    arrays = needs.program.arrays
    return tuple([name for name in names if arrays[name].kind != "weight"])


def _touched(needs: Needs, step: Step) -> tuple[str, ...]:
    return _values(needs, dict.fromkeys(step.inputs + step.writes))


def _stays(needs: Needs) -> tuple[str, ...]:
    """What is on the device at the end."""
    kept = (*needs.program.of_kind("cache", "feature"), *needs.program.outputs)
    return _values(needs, dict.fromkeys(kept))


def _unread(needs: Needs) -> tuple[str, ...]:
    """What is given, read by nobody and wanted by nobody."""
    stays = set(_stays(needs))
    given = _values(needs, needs.program.given)
    return tuple(name for name in given if not needs.uses[name] and name not in stays)


def _dying(needs: Needs, step: Step, index: int) -> tuple[str, ...]:
    """What nobody reads after a step."""
    return tuple(
        name
        for name in _touched(needs, step)
        if (not needs.uses[name] or needs.uses[name][-1] <= index)
        and needs.program.arrays[name].kind not in ("cache", "feature")
        and name not in needs.program.outputs
    )


def _next_use(needs: Needs, name: str, index: int) -> int:
    """The next step that reads an array; a step that never comes if there is none."""
    uses = needs.uses[name]
    at = bisect.bisect_left(uses, index)
    return uses[at] if at < len(uses) else len(needs.program.steps)


def largest_value_bytes(needs: Needs) -> int:
    """What the largest array that is no weight takes in the host."""
    names = _values(needs, needs.program.arrays)
    return max((needs.host_bytes[name] for name in names), default=0)
