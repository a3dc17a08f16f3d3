"""Is a plan right? An independent, deliberately naive reading of the three verbs.

Nothing here is shared with the passes or the runtime: this is the referee. It walks the list once
and keeps an account of what lies where. A plan that passes gives the program's bits, because each
step reads exactly the versions that it reads in program order and no two arrays share a place; and
it keeps every budget at every action.
"""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from typing import assert_never

from memsched.errors import PlanError, ProgramError
from memsched.machine import DEVICE, HOST, NVME, Machine, Tier, rounded
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import Program

CODECS = ("raw",)


@dataclasses.dataclass(slots=True)
class _Rest:
    """An array in a tier: the version that lies there, and where in the arena."""

    version: int
    offset: int | None


@dataclasses.dataclass(slots=True)
class _Place:
    """The account of one tier.

    `taken` are the ranges in use in its arena, sorted: (first byte, end, array). `arena_bytes` is
    the union of all ranges that the plan ever uses, because pages once touched stay.
    """

    tier: Tier
    arena_bytes: int
    held: dict[str, _Rest] = dataclasses.field(default_factory=dict)
    taken: list[tuple[int, int, str]] = dataclasses.field(default_factory=list)
    loose_bytes: int = 0
    peak_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Walk:
    """What is known on the way through a plan.

    `wanted[step]` is the version of each array that a step takes when all run in program order,
    `made[step]` what it leaves. `newest` is the latest version that exists so far.
    """

    program: Program
    machine: Machine
    nbytes: Mapping[str, int]
    wanted: Mapping[str, Mapping[str, int]]
    made: Mapping[str, Mapping[str, int]]
    places: Mapping[str, _Place]
    newest: dict[str, int]
    ran: set[str]


def verify(plan: Plan, program: Program, machine: Machine) -> dict[str, int]:
    """Check every rule of a plan, and add up what it takes.

    The plan may have been made for another machine, as long as this one has room for it.

    Returns:
        For each tier the most bytes in use at once, of those that count against its capacity.

    Raises:
        PlanError: the plan breaks a rule. The message names the action, the rule and the numbers.
        ProgramError: no plan could carry out this program.
    """
    _check_program(program)
    if plan.program != program.digest:
        raise PlanError(
            f"the plan was made for program {plan.program}, this is {program.digest}; plan it anew"
        )
    for index in plan.slots:
        if not 0 <= index < len(plan.actions) or not isinstance(plan.actions[index], Copy):
            raise PlanError(f"slots: {index} is not the index of a Copy; remove it")
    walk = _start(plan, program, machine)
    _enter(walk, plan.entry)
    for index, action in enumerate(plan.actions):
        try:
            _act(walk, action, plan.slots.get(index))
        except PlanError as error:
            raise PlanError(f"action {index} {action}: {error}") from None
    if missing := [step.name for step in program.steps if step.name not in walk.ran]:
        raise PlanError(f"{len(missing)} of {len(program.steps)} steps never run: {missing[:5]}")
    _leave(walk, plan.exit)
    return {name: place.peak_bytes for name, place in walk.places.items()}


def verify_hand_over(before: Plan, after: Plan, weights: Collection[str]) -> None:
    """Check that a plan can follow another: each of these weights lies where it was left.

    Raises:
        PlanError: a weight rests elsewhere, or is held on one side only.
    """
    left = {rest for rest in before.exit if rest.array in weights}
    found = {rest for rest in after.entry if rest.array in weights}
    if wrong := sorted(left ^ found, key=str):
        side = "is left behind but not expected" if wrong[0] in left else "is expected but not left"
        raise PlanError(
            f"hand-over: {wrong[0]} {side}, one of {len(wrong)} differences; bridge the two plans"
        )


def _check_program(program: Program) -> None:
    """Rules that no plan could mend."""
    names = Counter(step.name for step in program.steps)
    for step in program.steps:
        where = f"step {step.name!r}"
        if names[step.name] > 1:
            raise ProgramError(f"{where}: {names[step.name]} steps have this name; want one")
        for name in step.inputs + step.writes:
            if name not in program.arrays:
                raise ProgramError(f"{where}: {name!r} is not an array of the program")
        for name in step.results:
            if (kind := program.arrays[name].kind) in ("weight", "feature"):
                raise ProgramError(f"{where}: changes {name!r}, but a {kind} is only read")
            if (count := (step.results + step.reads).count(name)) > 1:
                raise ProgramError(f"{where}: has its result {name!r} {count} times; want it once")


def _start(plan: Plan, program: Program, machine: Machine) -> _Walk:
    """The state before the entry: all tiers empty."""
    nbytes = {name: array.nbytes for name, array in program.arrays.items()}
    version = dict.fromkeys(program.arrays, 0)
    wanted, made = {}, {}
    for step in program.steps:
        wanted[step.name] = {name: version[name] for name in step.inputs}
        for name in step.results:
            version[name] += 1
        made[step.name] = {name: version[name] for name in step.results}
    places = {tier.name: _Place(tier, _touched_bytes(plan, tier, nbytes)) for tier in machine.tiers}
    newest = dict.fromkeys(program.arrays, 0)
    return _Walk(program, machine, nbytes, wanted, made, places, newest, set())


def _touched_bytes(plan: Plan, tier: Tier, nbytes: Mapping[str, int]) -> int:
    """Bytes of the union of all ranges in a tier's arena that the plan ever uses."""
    places = [
        (rest.offset, rest.array)
        for rest in plan.entry + plan.exit
        if rest.tier == tier.name and rest.offset is not None
    ]
    for index, offset in plan.slots.items():
        action = plan.actions[index]
        if isinstance(action, Copy) and action.target == tier.name:
            places.append((offset, action.array))
    total = reached = 0
    for offset, name in sorted(set(places)):
        end = offset + rounded(nbytes.get(name, 0), tier.alignment_bytes)
        total += max(0, end - max(offset, reached))
        reached = max(reached, end)
    return total


def _enter(walk: _Walk, entry: tuple[Residence, ...]) -> None:
    """Puts everything where it rests before the plan."""
    for rest in entry:
        try:
            _check_names(walk, rest.array, rest.tier, rest.codec)
            _put(walk, rest.array, rest.tier, 0, rest.offset)
        except PlanError as error:
            raise PlanError(f"entry {rest}: {error}") from None
    _check_rests("entry", "a step makes it", entry, walk.program, walk.program.given)
    for place in walk.places.values():
        try:
            _account(place, 0)
        except PlanError as error:
            raise PlanError(f"entry: {error}") from None


def _act(walk: _Walk, action: Action, slot: int | None) -> None:
    """Carries out an action."""
    match action:
        case Run():
            _run(walk, action)
        case Copy():
            _copy(walk, action, slot)
        case Free():
            _free(walk, action)
        case _:
            assert_never(action)


def _run(walk: _Walk, action: Run) -> None:
    """The step finds what it reads, and its results appear."""
    if action.step not in walk.wanted:
        raise PlanError(f"the program has no step {action.step!r}")
    step = walk.program.step(action.step)
    if step.updates and step.name in walk.ran:
        raise PlanError(f"runs again, but a step that updates {step.updates} runs once")
    device = walk.places[DEVICE]
    for name, version in walk.wanted[step.name].items():
        _need(device, name, version)
    made = walk.made[step.name]
    for name in step.writes:
        _put(walk, name, DEVICE, made[name], None)
    for name in step.updates:
        device.held[name].version = made[name]
    for name, version in made.items():
        walk.newest[name] = max(walk.newest[name], version)
    walk.ran.add(step.name)
    _account(device, step.workspace_bytes)


def _copy(walk: _Walk, action: Copy, slot: int | None) -> None:
    """The source has the newest version; the target is another tier and has none."""
    _check_names(walk, action.array, action.target, action.codec)
    if walk.machine.link(action.source, action.target) is None:
        raise PlanError(f"there is no link {action.source}->{action.target}")
    version = walk.newest[action.array]
    _need(walk.places[action.source], action.array, version)
    _put(walk, action.array, action.target, version, slot)
    _account(walk.places[action.target], 0)


def _free(walk: _Walk, action: Free) -> None:
    """The array was there, and is not a weight in its home."""
    place = walk.places.get(action.tier)
    if place is None or action.array not in place.held:
        raise PlanError(f"{action.array!r} is not in {action.tier!r}")
    if action.tier == NVME and walk.program.arrays[action.array].kind == "weight":
        raise PlanError(f"weights rest in {NVME!r} for ever; remove this Free")
    gone = place.held.pop(action.array)
    nbytes = rounded(walk.nbytes[action.array], place.tier.alignment_bytes)
    if gone.offset is None:
        place.loose_bytes -= nbytes
    elif nbytes:
        taken = (gone.offset, gone.offset + nbytes, action.array)
        del place.taken[bisect.bisect_left(place.taken, taken)]


def _leave(walk: _Walk, left: tuple[Residence, ...]) -> None:
    """The exit is all that is held, in its newest version, and nothing that is done with."""
    program = walk.program
    for rest in left:
        try:
            _check_left(walk, rest)
        except PlanError as error:
            raise PlanError(f"exit {rest}: {error}") from None
    stays = (*program.of_kind("weight", "cache", "feature"), *program.outputs)
    _check_rests("exit", "it is no output, so free it", left, program, stays)
    listed = {(rest.array, rest.tier) for rest in left}
    for place in walk.places.values():
        for name in place.held:
            if (name, place.tier.name) not in listed:
                raise PlanError(f"exit: {name!r} is still in {place.tier.name!r}; free or list it")


def _check_left(walk: _Walk, rest: Residence) -> None:
    """An array lies where the exit says, in its newest version."""
    _check_names(walk, rest.array, rest.tier, rest.codec)
    place = walk.places[rest.tier]
    _need(place, rest.array, walk.newest[rest.array])
    if (offset := place.held[rest.array].offset) != rest.offset:
        raise PlanError(f"it lies at offset {offset}, not at {rest.offset}")


def _check_rests(
    title: str,
    why_not: str,
    rests: tuple[Residence, ...],
    program: Program,
    expected: Collection[str],
) -> None:
    """Between plans a weight rests in "nvme" and perhaps elsewhere, all others on the device."""
    tiers: dict[str, list[str]] = {}
    for rest in rests:
        tiers.setdefault(rest.array, []).append(rest.tier)
    if surplus := sorted(tiers.keys() - set(expected)):
        raise PlanError(f"{title}: {surplus[0]!r} cannot be held here: {why_not}")
    for name in expected:
        found = tiers.get(name, [])
        if len(set(found)) < len(found):
            raise PlanError(f"{title}: {name!r} is listed twice, in {found}")
        if program.arrays[name].kind == "weight":
            if NVME not in found:
                raise PlanError(f"{title}: weight {name!r} must rest in {NVME!r}, found in {found}")
        elif found != [DEVICE]:
            raise PlanError(f"{title}: {name!r} must rest in {DEVICE!r} only, found in {found}")


def _check_names(walk: _Walk, array: str, tier: str, codec: str) -> None:
    """Array, tier and codec exist."""
    if array not in walk.nbytes:
        raise PlanError(f"{array!r} is not an array of the program")
    if tier not in walk.places:
        raise PlanError(f"the machine has no tier {tier!r}")
    if codec not in CODECS:
        raise PlanError(f"codec {codec!r} is unknown; steps read {CODECS}")


def _need(place: _Place, name: str, version: int) -> None:
    """An array lies in a tier in exactly this version."""
    rest = place.held.get(name)
    if rest is None:
        raise PlanError(f"{name!r} is not in {place.tier.name!r}")
    if rest.version != version:
        raise PlanError(
            f"{name!r} in {place.tier.name!r} is stale or early: it has version "
            f"{rest.version}, wanted is version {version}"
        )


def _put(walk: _Walk, name: str, tier_name: str, version: int, offset: int | None) -> None:
    """An array appears in a tier that did not hold it, where nothing else lies."""
    place = walk.places[tier_name]
    tier = place.tier
    if name in place.held:
        raise PlanError(f"{name!r} is already in {tier.name!r}; free it before")
    is_weight = walk.program.arrays[name].kind == "weight"
    nbytes = walk.nbytes[name]
    if is_weight and tier.name == NVME:
        place.held[name] = _Rest(version, None)
        if offset is not None:
            raise PlanError(f"{NVME!r} has no arena, so no offset {offset}")
        return
    if nbytes > tier.max_array_bytes:
        raise PlanError(
            f"{nbytes:,} B in one array, {tier.name!r} takes at most "
            f"{tier.max_array_bytes:,} B; split {name!r}"
        )
    in_arena = is_weight and tier.name == (DEVICE if walk.machine.device_is_host else HOST)
    if in_arena != (offset is not None):
        raise PlanError(
            f"offset is {offset}, but {name!r} in {tier.name!r} "
            f"{'lies in the arena' if in_arena else 'is placed by its tier'}"
        )
    place.held[name] = _Rest(version, offset)
    if offset is None:
        place.loose_bytes += rounded(nbytes, tier.alignment_bytes)
    else:
        _occupy(place, name, offset, rounded(nbytes, tier.alignment_bytes))


def _occupy(place: _Place, name: str, offset: int, nbytes: int) -> None:
    """A range of the arena is inside, aligned, and shared with nothing."""
    tier = place.tier
    if offset < 0 or offset + nbytes > tier.capacity_bytes:
        raise PlanError(
            f"bytes {offset:,} to {offset + nbytes:,} are not within the "
            f"{tier.capacity_bytes:,} B of {tier.name!r}"
        )
    if offset % tier.alignment_bytes:
        raise PlanError(f"offset {offset} is no multiple of {tier.alignment_bytes} B")
    index = bisect.bisect(place.taken, (offset, 0, name))
    # What is taken never overlaps, so only the two neighbours can be in the way.
    for first, end, other in place.taken[max(0, index - 1) : index + 1]:
        if max(first, offset) < min(end, offset + nbytes):
            raise PlanError(
                f"bytes {offset:,} to {offset + nbytes:,} of {tier.name!r} are taken: "
                f"{other!r} lies at {first:,} to {end:,}; free it before"
            )
    if nbytes:
        place.taken.insert(index, (offset, offset + nbytes, name))


def _account(place: _Place, workspace_bytes: int) -> None:
    """What is in use now is within the budget, and may be the most so far."""
    tier = place.tier
    used = place.arena_bytes + place.loose_bytes + workspace_bytes
    place.peak_bytes = max(place.peak_bytes, used)
    if used > tier.capacity_bytes:
        raise PlanError(
            f"{tier.name!r} would hold {used:,} B of {tier.capacity_bytes:,} B: "
            f"arena {place.arena_bytes:,}, arrays outside it {place.loose_bytes:,}, "
            f"workspace {workspace_bytes:,}; plan for less or raise the capacity by "
            f"{used - tier.capacity_bytes:,} B"
        )
