"""What happens to an array, in a sentence, and why: as `reasons` says it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from memsched.machine import DEVICE
from memsched.plan import Copy, Plan, Run
from memsched.program import Program
from memsched.report.reasons import of_one
from memsched.report.summary import ArrayUse


@dataclasses.dataclass(slots=True)
class _Story:
    """What happens to one array: links it crosses, steps around its moves, steps that read it."""

    links: list[str] = dataclasses.field(default_factory=list)
    readers: list[str] = dataclasses.field(default_factory=list)
    maker: str = ""
    left_after: str = ""
    back_before: str = ""


def stories(plan: Plan, program: Program, uses: Sequence[ArrayUse]) -> dict[str, str]:
    """A sentence for each array."""
    found = _stories(plan, program)
    waits = _tiers_by_array((rest.array, rest.tier) for rest in plan.entry)
    return {use.name: _told(use, found[use.name], waits.get(use.name, ())) for use in uses}


def _tiers_by_array(pairs: Iterable[tuple[str, str]]) -> Mapping[str, Sequence[str]]:
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
    return stories


def _told(use: ArrayUse, story: _Story, rests: Sequence[str]) -> str:
    """What happens, why, and who reads it. `rests` are the tiers that have it before the plan."""
    why = of_one(use.reason)
    made = f"Made by step {story.maker}" if story.maker else "Given"
    match use.role:
        case "pinned":
            return f"Stays on the device: {why}; {_readers(story)}."
        case "streamed":
            way = " and ".join(dict.fromkeys(story.links))
            return f"Comes over {way}: {why}; {_readers(story)}."
        case "spilled":
            back = story.back_before or "the end"
            return f"Leaves after step {story.left_after}, is back before step {back}: {why}."
        case "resident":
            return f"{made}, and stays: {why}."
        case "passing":
            last = f"last read by step {story.readers[-1]}" if story.readers else "read by none"
            return f"{made}, {last}, then freed: {why}."
        case "unread":
            waits = [tier for tier in rests if tier != use.tier]
            where = f"Waits in {waits[0]} for another plan" if waits else "Stays in its file"
            return f"{where}: {why}."


def _readers(story: _Story) -> str:
    if not story.readers:
        return "no step of this plan reads it"
    first, *others = dict.fromkeys(story.readers)
    return (
        f"step {first} reads it"
        if not others
        else (f"{len(others) + 1:,} steps read it, the first is {first}")
    )
