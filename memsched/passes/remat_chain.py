"""Whether a program goes through a chain and back: stages, and for each what undoes it.

A training step of layers that follow each other is one. What stage `i` reads of the stage before is
its state; what its way back reads of it besides is its tape.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from memsched.passes.needs import Needs
from memsched.passes.remat_order import repeatable, stays
from memsched.program import Program

# The way back begins where most is held, or so many steps before: with the loss, say.
TURNS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What the stages of a chain take, in bytes or in units of so many; one entry per stage.

    `work` is what the way there takes and `undo` what the way back takes, both beside the stage's
    input. `state[i]` and `cotangent[i]` lie between stages i - 1 and i; these two have one entry
    more: above the last stage lies what is given to it alone. `result` is what the way back reads
    of the next state, `left` what stays after the way back.
    """

    state: tuple[int, ...]
    tape: tuple[int, ...]
    result: tuple[int, ...]
    work: tuple[int, ...]
    cotangent: tuple[int, ...]
    undo: tuple[int, ...]
    left: tuple[int, ...]

    def left_above(self, stage: int) -> int:
        """What the ways back of all stages after one leave."""
        return sum(self.left[stage + 1 :])

    def divisor(self) -> int:
        """The most that divides all of them."""
        return math.gcd(*itertools.chain(*dataclasses.astuple(self))) or 1

    def in_units(self, unit: int) -> "Sizes":
        """Rounded to the nearest unit: what comes out is measured exactly."""
        return Sizes(
            *(tuple(round(one / unit) for one in many) for many in dataclasses.astuple(self))
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """Stages there, and back: their steps by number, seconds and bytes; one entry per stage.

    `reads_tape` says whether the way back needs anything that its stage makes. `base_bytes` are
    there all the time.
    """

    forward: tuple[tuple[int, ...], ...]
    backward: tuple[tuple[int, ...], ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    nbytes: Sizes
    reads_tape: tuple[bool, ...]
    base_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Way:
    """The way there while it is read: where it turns, its cuts, and who is made and read where.

    `common` are made on the way and read all along it: they are always kept.
    """

    needs: Needs
    turn: int
    cuts: tuple[int, ...]
    made_at: Mapping[str, int]
    read_until: Mapping[str, int]
    common: frozenset[str]

    def size(self, names: Collection[str]) -> int:
        """Bytes of what is neither a weight nor kept anyway."""
        program = self.needs.program
        return sum(
            self.needs.device_bytes[name]
            for name in names
            if name in self.made_at and name not in self.common and name not in program.outputs
        )

    def stage_of(self, name: str) -> int:
        """The stage that makes an array."""
        return sum(self.made_at[name] >= cut for cut in self.cuts[1:])

    def crossing(self, place: int) -> frozenset[str]:
        """What is made before a step of the way there, and read from it on."""
        return frozenset(
            name
            for name, made in self.made_at.items()
            if made < place <= self.read_until.get(name, -1) and name not in self.common
        )


def as_chain(needs: Needs) -> Chain | None:
    """The chain that a program is, or None if it is none."""
    most = _turn(needs)
    for turn in range(most, max(1, most - TURNS), -1):
        way = _way_there(needs, turn)
        levels = None if way is None else _levels(way)
        if way is not None and levels is not None:
            return _measured(way, levels)
    return None


def _way_there(needs: Needs, turn: int) -> _Way | None:
    """The first steps, cut where nothing passes two cuts. None if they cannot run again."""
    program = needs.program
    if not 2 <= turn < len(program.steps) or not repeatable(program).issuperset(range(turn)):
        return None
    made_at: dict[str, int] = {}
    read_until: dict[str, int] = {}
    for index, step in enumerate(program.steps[:turn]):
        made_at |= dict.fromkeys(step.writes, index)
        read_until |= dict.fromkeys(step.reads, index)
    longest = max(2, turn // 2)
    common = {name for name, made in made_at.items() if read_until.get(name, -1) - made > longest}
    way = _Way(needs, turn, (), made_at, read_until, frozenset(common))
    cuts, before = [0], frozenset[str]()
    for place in range(1, turn):
        crossing = way.crossing(place)
        if crossing and crossing.isdisjoint(before):
            cuts.append(place)
            before = crossing
    return _with_loss(dataclasses.replace(way, cuts=tuple(cuts)))


def _with_loss(way: _Way) -> _Way:
    """The way there, with a stage without steps at its end: what turns round, a loss, say.

    So what that reads of the stage before is a state of its own, and the rest need not be there.
    """
    step, start = way.needs.program.steps[way.turn], way.cuts[-1]
    result = {name for name in step.inputs if way.size([name])}
    if not result or any(way.made_at[name] < start for name in result):
        return way
    until = {**way.read_until, **dict.fromkeys(result, way.turn)}
    return dataclasses.replace(way, cuts=(*way.cuts, way.turn), read_until=until)


def _turn(needs: Needs) -> int:
    """After how many steps most of what can be made again waits for a reader."""
    program, waiting = needs.program, set[str]()
    again = repeatable(program)
    held = most = turn = 0
    for index, step in enumerate(program.steps):
        made = {n for n in step.writes if needs.uses[n] and n not in program.outputs}
        waiting |= made if index in again else set()
        held += sum(needs.device_bytes[name] for name in made & waiting)
        done = {name for name in waiting if needs.uses[name][-1] == index}
        held -= sum(needs.device_bytes[name] for name in done)
        waiting -= done
        if held > most:
            most, turn = held, index + 1
    return turn


def _levels(way: _Way) -> tuple[tuple[int, ...], ...] | None:
    """For each stage the steps of its way back, or None if they do not lead straight back."""
    program, last = way.needs.program, len(way.cuts) - 1
    states = {name for cut in way.cuts[1:] for name in way.crossing(cut)}
    own = _own(way)
    found: list[list[int]] = [[] for _ in way.cuts]
    level = last
    for index in range(way.turn, len(program.steps)):
        names = program.steps[index].inputs
        made = [n for n in names if n in way.made_at and way.size([n])]
        least = max((way.stage_of(name) for name in made), default=0)
        highest = [way.stage_of(name) + (name in states) for name in made]
        level = min([level, *(highest or [own[name] for name in names if name in own])])
        if level < least:
            return None
        found[level].append(index)
    return tuple(tuple(steps) for steps in found)


def _own(way: _Way) -> dict[str, int]:
    """Given arrays that only one stage reads on the way there, and which."""
    readers: dict[str, set[int]] = {}
    for index, step in enumerate(way.needs.program.steps[: way.turn]):
        stage = sum(index >= cut for cut in way.cuts[1:])
        for name in step.inputs:
            if name not in way.made_at:
                readers.setdefault(name, set()).add(stage)
    return {name: min(stages) for name, stages in readers.items() if len(stages) == 1}


def _measured(way: _Way, levels: Sequence[tuple[int, ...]]) -> Chain:
    """Adds up what each stage takes."""
    needs, program = way.needs, way.needs.program
    ends = (*way.cuts[1:], way.turn)
    forward = tuple(tuple(range(a, b)) for a, b in zip(way.cuts, ends, strict=True))
    states = [frozenset[str](), *(way.crossing(cut) for cut in way.cuts[1:]), frozenset[str]()]
    read_back = [{n for index in steps for n in program.steps[index].inputs} for steps in levels]
    made = [{n for index in steps for n in program.steps[index].writes} for steps in forward]
    tapes = [(made[i] & read_back[i]) - states[i + 1] for i in range(len(forward))]
    passing = _passing_back(needs, way, levels)
    kept = {n for n in way.made_at if n in way.common or n in program.outputs}
    given = {n for n in program.given if program.arrays[n].kind != "weight"}
    # What only the last stage reads is gone before anything runs again.
    last_cut = max(cut for cut in way.cuts if cut < way.turn)
    end = max(levels[-1], default=way.turn - 1)
    brief = {n for n in given if needs.uses[n] and last_cut <= needs.uses[n][0]}
    brief = {n for n in brief - set(stays(program)) if needs.uses[n][-1] <= end}
    passing[-1] = tuple(sorted(brief))
    coming = [{n for n in names if needs.uses[n][-1] >= way.turn} for names in passing]
    undone = [
        _undo(way, steps, coming[i + 1] | tapes[i] | (states[i + 1] & read_back[i]))
        for i, steps in enumerate(levels)
    ]
    nbytes = Sizes(
        state=tuple(way.size(names) for names in states),
        tape=tuple(way.size(names) for names in tapes),
        result=tuple(way.size(states[i + 1] & read_back[i]) for i in range(len(forward))),
        work=tuple(_work(way, steps, tapes[i] | states[i + 1]) for i, steps in enumerate(forward)),
        cotangent=tuple(sum(needs.device_bytes[n] for n in names) for names in passing),
        undo=tuple(undone),
        left=tuple(_left(program, needs.device_bytes, steps) for steps in levels),
    )
    return Chain(
        forward=forward,
        backward=tuple(levels),
        forward_s=tuple(sum((needs.step_s[index] for index in steps), 0.0) for steps in forward),
        backward_s=tuple(sum((needs.step_s[index] for index in steps), 0.0) for steps in levels),
        nbytes=nbytes,
        reads_tape=tuple(
            i == len(levels) - 1 or not made[i].isdisjoint(read_back[i]) for i in range(len(levels))
        ),
        base_bytes=sum(needs.device_bytes[name] for name in kept | given - brief),
    )


def _passing_back(
    needs: Needs, way: _Way, levels: Sequence[tuple[int, ...]]
) -> list[tuple[str, ...]]:
    """What the ways back hand to each other, below each stage; nothing above the last one."""
    program = needs.program
    level_of = {index: level for level, steps in enumerate(levels) for index in steps}
    passing: list[list[str]] = [[] for _ in range(len(levels) + 1)]
    for index in range(way.turn, len(program.steps)):
        for name in program.steps[index].writes:
            if name not in program.outputs and needs.uses[name]:
                lowest = level_of[needs.uses[name][-1]]
                for level in range(lowest + 1, level_of[index] + 1):
                    passing[level].append(name)
    return [tuple(names) for names in passing]


def _undo(way: _Way, steps: Sequence[int], given: Collection[str]) -> int:
    """The most that a way back takes, when it is given some arrays beside the stage's input."""
    program, sizes = way.needs.program, way.needs.device_bytes
    held = {name: sizes[name] for name in given if way.size([name]) or name not in way.made_at}
    most = sum(held.values())
    for index in steps:
        step = program.steps[index]
        held |= {name: sizes[name] for name in step.writes}
        most = max(most, sum(held.values()) + step.workspace_bytes)
        for name in list(held):
            uses = way.needs.uses[name]
            if name not in program.outputs and (not uses or uses[-1] <= index):
                del held[name]
    return most


def _work(way: _Way, steps: Sequence[int], kept: Collection[str]) -> int:
    """The most that a way there takes beside its input, when all that is read later is kept."""
    program, held, most = way.needs.program, set[str](), 0
    for index in steps:
        step = program.steps[index]
        held.update(step.writes)
        most = max(most, way.size(held) + step.workspace_bytes)
        held = {name for name in held if name in kept or way.read_until.get(name, -1) > index}
    return most


def _left(program: Program, sizes: Mapping[str, int], steps: Sequence[int]) -> int:
    """Bytes of the outputs that steps make."""
    names = (name for index in steps for name in program.steps[index].writes)
    return sum(sizes[name] for name in names if name in program.outputs)
