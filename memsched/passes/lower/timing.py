"""When streamed weights come and go, in steps: as early as their slots allow, first in first out.

A copy after step -1 precedes the first step; in a plan that follows itself, steps below zero belong
to the round before.
"""

import dataclasses
import itertools
from collections.abc import Sequence

LATEST = 1 << 60
# Each pass carries what one round leaves to the next; few rounds settle it.
MOST_PASSES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Lane:
    """The visits of one tier in their order, and who must leave before whom.

    `floors[i]`: visits before this number have left when visit i comes. `before[i]`: the number of
    the visit of the same array that precedes it, if any. Numbers below zero count back into the
    round before.
    """

    floors: tuple[int, ...]
    before: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Times:
    """The step after which each visit comes and goes, and the visit that it goes for.

    `gone_for` is `LATEST` where nobody is waiting for the room.
    """

    comes: tuple[int, ...]
    goes: tuple[int, ...]
    gone_for: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """`steps` is the length of a round and `earliest` the first moment a visit may come."""

    steps: int
    earliest: int
    repeat: bool


def arrivals(
    clock: Clock,
    lane: Lane,
    first: Sequence[int],
    gone: Sequence[int],
    start: Sequence[int],
    *,
    late: int,
) -> tuple[int, ...] | None:
    """The step after which each visit comes, or None where a visit would come too late.

    Args:
        clock: the round.
        lane: who needs whose room.
        first: the step that needs the visit; it must come before.
        gone: the step after which each visit can have left, running maximum.
        start: the earliest that other lanes allow.
        late: steps to wait longer than necessary, where there is time. A Free holds up what is
            issued after it, so it should not wait for the step issued just before.
    """
    hard = _waits(clock, lane, gone)
    if any(step >= limit for step, limit in zip(hard, first, strict=True)):
        return None
    # The end of a round waits for its last step anyway.
    waits = [
        step if clock.repeat and (step + 1) % clock.steps == 0 else min(step + late, limit - 1)
        for step, limit in zip(hard, first, strict=True)
    ]
    comes = [max(own, wait) for own, wait in zip(start, waits, strict=True)]
    latest = clock.earliest
    for _ in range(MOST_PASSES):
        before = comes
        if clock.repeat and comes:
            latest = max(clock.earliest, comes[-1] - clock.steps)
        comes = list(itertools.accumulate([latest, *comes], max))[1:]
        if comes == before:
            break
    return tuple(comes)


def departures(clock: Clock, lane: Lane, comes: Sequence[int], due: Sequence[int]) -> Times:
    """When each visit goes: when it is due, or before that for the visit that needs its room."""
    count = len(comes)
    goes, gone_for = list(due), [LATEST] * count
    turns = 2 if clock.repeat else 1
    oldest = 0
    for turn, index in itertools.product(range(turns), range(count)):
        number, step = index + turn * count, comes[index] + turn * clock.steps
        floor, same = lane.floors[index], lane.before[index]
        waiting = [] if same is None else [same + turn * count]
        waiting += range(oldest, min(floor + turn * count, count))
        oldest = max(oldest, floor + turn * count)
        for other in waiting:
            if 0 <= other < count and step <= goes[other] and gone_for[other] == LATEST:
                goes[other], gone_for[other] = step, number
    return Times(tuple(comes), tuple(goes), tuple(gone_for))


def _waits(clock: Clock, lane: Lane, gone: Sequence[int]) -> list[int]:
    """For each visit the last step that must be over before it comes."""
    count, waits = len(gone), []
    for floor, before in zip(lane.floors, lane.before, strict=True):
        wait = clock.earliest - 1
        for number in (floor - 1, before):
            if number is not None and (clock.repeat or number >= 0):
                turn, place = divmod(number, count)
                wait = max(wait, gone[place] + turn * clock.steps)
        waits.append(wait)
    return waits
