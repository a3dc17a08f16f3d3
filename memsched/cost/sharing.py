"""Lays actions out in time where steps and copies slow each other down.

As `simulate` does, lanes work their tasks off in order. A task goes at its own speed while it is
alone, and slower while the other side is busy: steps while anything is copied, copies while a step
runs. So time goes from event to event: between two of them all speeds are constant.

A disk serves several blocks at a time, and all of them end at about the same time. So a small array
that is asked for before a large one arrives late.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

COMPUTE_LANE = 0
FREE = -1


class Task(NamedTuple):
    """An action. Lanes and places are numbers: steps have `COMPUTE_LANE`, a Free has `FREE`.

    `takes` are the places that must be ready, `gives` those that become ready at its end.
    `slowdown` is how many times as long it takes while the other side is busy. It is made of
    `blocks`, of which its lane serves `depth` together; what is served together ends together.
    """

    lane: int
    seconds: float
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    slowdown: float = 1.0
    blocks: int = 1
    depth: int = 1


@dataclasses.dataclass(slots=True)
class _Queued:
    """A task that was handed to its lane, and how many of its blocks have not begun."""

    index: int
    blocks: int


@dataclasses.dataclass(slots=True)
class _Running:
    """Blocks at work together: what was left of them at `since_s`, and their speed from then on.

    `ends` are the tasks that are done when they are.
    """

    ends: list[int]
    left_s: float
    slowdown: float
    since_s: float
    speed: float = 1.0

    @property
    def end_s(self) -> float:
        return self.since_s + self.left_s / self.speed


def share(tasks: Sequence[Task]) -> list[tuple[float, float]]:
    """Start and end of every task, in order, from time 0."""
    waits = _waits(tasks)
    starts, ends = [0.0] * len(tasks), [0.0] * len(tasks)
    done = [False] * len(tasks)
    queues: dict[int, collections.deque[_Queued]] = {}
    running: dict[int, _Running] = {}
    issued, now = 0, 0.0

    def ready(index: int) -> bool:
        return all(done[other] for other in waits[index])

    while True:
        while issued < len(tasks):
            task = tasks[issued]
            if task.lane != FREE:
                queues.setdefault(task.lane, collections.deque()).append(
                    _Queued(issued, task.blocks)
                )
            elif ready(issued):
                starts[issued] = ends[issued] = now
                done[issued] = True
            else:
                break
            issued += 1
        for lane, queue in queues.items():
            if lane not in running and queue and ready(queue[0].index):
                running[lane] = _together(tasks, queue, ready, starts, now)
        if not running:
            assert issued == len(tasks), "every task ends, so whatever waits for it begins"
            return list(zip(starts, ends, strict=True))
        _set_speeds(running, now)
        now = min(one.end_s for one in running.values())
        for lane in [lane for lane, one in running.items() if one.end_s <= now]:
            for index in running.pop(lane).ends:
                ends[index], done[index] = now, True


def _together(
    tasks: Sequence[Task],
    queue: "collections.deque[_Queued]",
    ready: Callable[[int], bool],
    starts: list[float],
    now: float,
) -> _Running:
    """Begins as many blocks from the head of a queue as its lane serves together."""
    first = tasks[queue[0].index]
    found = _Running([], 0.0, first.slowdown, now)
    room = first.depth
    while room and queue and ready(queue[0].index):
        head = queue[0]
        task = tasks[head.index]
        if head.blocks == task.blocks:
            starts[head.index] = now
        count = min(room, head.blocks)
        found.left_s += task.seconds * count / task.blocks
        head.blocks -= count
        room -= count
        if not head.blocks:
            found.ends.append(queue.popleft().index)
    return found


def _set_speeds(running: dict[int, _Running], now: float) -> None:
    computing = COMPUTE_LANE in running
    copying = len(running) > computing
    for lane, one in running.items():
        other = copying if lane == COMPUTE_LANE else computing
        speed = 1.0 / one.slowdown if other else 1.0
        if speed != one.speed:
            one.left_s = max(0.0, one.left_s - (now - one.since_s) * one.speed)
            one.since_s, one.speed = now, speed


def _waits(tasks: Sequence[Task]) -> list[tuple[int, ...]]:
    """For every task those that must have ended before it starts: at most one of each lane counts.

    A task waits for whoever made what it takes, and for all who still use what it writes.
    """
    maker: dict[int, int] = {}
    users: dict[int, dict[int, int]] = {}
    found = []
    for index, task in enumerate(tasks):
        if task.lane == FREE:
            (place,) = task.takes
            found.append(tuple(users.pop(place, {}).values()))
            maker.pop(place, None)
            continue
        others = {maker[place] for place in task.takes if place in maker}
        for place in task.gives:
            others |= set(users.get(place, {}).values())
        found.append(tuple(sorted(others)))
        for place in task.takes:
            users.setdefault(place, {})[task.lane] = index
        for place in task.gives:
            maker[place] = index
            users[place] = {task.lane: index}
    return found
