"""The best that pinning some weights and streaming the rest can do, by trying every choice.

A chain of steps reads one weight each, round after round. What is not pinned passes through a
first-in-first-out ring of all the bytes that are left, without offsets and without alignment.
"""

import itertools
from collections.abc import Sequence

ROUNDS = 8


def best_round_seconds(
    sizes: Sequence[int], step_s: Sequence[float], bytes_per_s: float, capacity: int
) -> float:
    """Seconds of a settled round, over all sets of pinned weights."""
    best = float("inf")
    for pinned in itertools.product((False, True), repeat=len(sizes)):
        ring = capacity - sum(size for size, stays in zip(sizes, pinned, strict=True) if stays)
        passing = [index for index, stays in enumerate(pinned) if not stays]
        if ring >= max((sizes[index] for index in passing), default=0):
            best = min(best, _round_seconds(sizes, step_s, bytes_per_s, passing, ring))
    return best


def _round_seconds(
    sizes: Sequence[int],
    step_s: Sequence[float],
    bytes_per_s: float,
    passing: Sequence[int],
    ring: int,
) -> float:
    """One step after another; before each, all transfers are started that have room by then."""
    count = len(sizes)
    queue = [turn * count + index for turn in range(ROUNDS) for index in passing]
    arrived: dict[int, float] = {}
    ended: dict[int, float] = {}
    in_ring: list[int] = []
    link = now = room_since = 0.0
    marks = []
    for step in range(ROUNDS * count):
        while queue:
            size = sizes[queue[0] % count]
            while in_ring and in_ring[0] in ended and _bytes(sizes, in_ring) + size > ring:
                room_since = max(room_since, ended[in_ring.pop(0)])
            if _bytes(sizes, in_ring) + size > ring:
                break
            link = max(link, room_since) + size / bytes_per_s
            arrived[queue[0]] = link
            in_ring.append(queue.pop(0))
        now = max(now, arrived.get(step, 0.0)) + step_s[step % count]
        ended[step] = now
        if step % count == count - 1:
            marks.append(now)
    return (marks[-1] - marks[ROUNDS // 2 - 1]) / (ROUNDS - ROUNDS // 2)


def _bytes(sizes: Sequence[int], steps: Sequence[int]) -> int:
    return sum(sizes[step % len(sizes)] for step in steps)
