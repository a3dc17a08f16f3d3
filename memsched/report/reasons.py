"""Why an array is where it is, in a sentence: only what follows from the plan itself."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from memsched.cost import is_steady
from memsched.machine import DEVICE, Machine
from memsched.plan import Copy, Free, Plan, Run
from memsched.program import Program
from memsched.report.summary import ArrayUse
from memsched.sizes import format_size


@dataclasses.dataclass(slots=True)
class _Story:
    """What happens to one array: links it crosses, steps around its moves, steps that read it."""

    links: list[str] = dataclasses.field(default_factory=list)
    readers: list[str] = dataclasses.field(default_factory=list)
    maker: str = ""
    left_after: str = ""
    back_before: str = ""
    freed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class _Facts:
    """What is the same for all arrays of a plan. `rest_bytes` is the device's peak without the
    weights; `lies` has the tiers in which an array lies before and after the plan.
    """

    repeated: bool
    capacity_bytes: int
    wanted_bytes: int
    rest_bytes: int
    before: Mapping[str, Sequence[str]]
    after: Mapping[str, Sequence[str]]


def reasons(
    plan: Plan, program: Program, machine: Machine, uses: Sequence[ArrayUse], rest_bytes: int
) -> dict[str, str]:
    """A sentence for each array. `rest_bytes` is what the device holds besides weights at most."""
    stories = _stories(plan, program)
    wanted = {name for step in program.steps for name in step.reads}
    wanted &= set(program.of_kind("weight"))
    facts = _Facts(
        is_steady(plan, program),
        machine.tier(DEVICE).capacity_bytes,
        sum(program.arrays[name].nbytes for name in wanted),
        rest_bytes,
        _tiers_by_array((rest.array, rest.tier) for rest in plan.entry),
        _tiers_by_array((rest.array, rest.tier) for rest in plan.exit),
    )
    return {use.name: _reason(use, stories.get(use.name, _Story()), facts) for use in uses}


def _tiers_by_array(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, tier in pairs:
        found.setdefault(name, []).append(tier)
    return found


def _stories(plan: Plan, program: Program) -> dict[str, _Story]:
    stories = {name: _Story() for name in program.arrays}
    step = ""
    for action in plan.actions:
        match action:
            case Run(step=step):
                for name in program.step(step).inputs:
                    story = stories[name]
                    story.readers.append(step)
                    if story.left_after and not story.back_before:
                        story.back_before = step
                for name in program.step(step).writes:
                    stories[name].maker = stories[name].maker or step
            case Copy(array=name, source=source, target=target):
                stories[name].links.append(f"{source}->{target}")
                if source == DEVICE and not stories[name].left_after:
                    stories[name].left_after = step or "the start"
            case Free(array=name, tier=tier):
                stories[name].freed |= tier == DEVICE
    return stories


def _reason(use: ArrayUse, story: _Story, facts: _Facts) -> str:
    match use.role:
        case "pinned":
            return _pinned(story, facts)
        case "streamed":
            return _streamed(use, story, facts)
        case "spilled":
            return (
                f"Others need its room for a while: it leaves after step {story.left_after} and is "
                f"back before step {story.back_before or 'the end'}."
            )
        case "resident":
            return "Is given, and stays for what comes next."
        case "passing":
            made = f"Made by step {story.maker}" if story.maker else "Given"
            last = f", last read by step {story.readers[-1]}" if story.readers else ", read by none"
            return f"{made}{last}, then freed."
        case "unread":
            waits = [tier for tier in facts.before.get(use.name, ()) if tier != use.tier]
            where = f"waits in {waits[0]} for another plan" if waits else "stays in its file"
            return f"No step of this plan reads it: it {where}."


def _pinned(story: _Story, facts: _Facts) -> str:
    if not story.readers:
        return "Stays on the device for another plan: no step of this one reads it."
    if not facts.repeated:
        return f"Lies on the device before and after; {_readers(story)}."
    return f"Stays on the device, so that no pass moves it; {_readers(story)}."


def _streamed(use: ArrayUse, story: _Story, facts: _Facts) -> str:
    before, after = (DEVICE in rests.get(use.name, ()) for rests in (facts.before, facts.after))
    way = " and ".join(dict.fromkeys(story.links))
    if not story.readers:
        return f"Moves over {way} for another plan: no step of this one reads it."
    if after and not before:
        return f"Comes over {way} and stays for the next plan; {_readers(story)}."
    if before and not after and not facts.repeated:
        return f"Was left on the device, and gives up its place; {_readers(story)}."
    short_bytes = facts.wanted_bytes + facts.rest_bytes - facts.capacity_bytes
    why = (
        f"The weights that are read do not fit beside the rest: {format_size(short_bytes)} too much"
        if short_bytes > 0
        else "It is not kept, though all weights that are read would fit"
    )
    return f"{why}. This one comes over {way}; {_readers(story)}, then its place is used again."


def _readers(story: _Story) -> str:
    first, *others = dict.fromkeys(story.readers)
    return (
        f"step {first} reads it"
        if not others
        else (f"{len(others) + 1:,} steps read it, the first is {first}")
    )
