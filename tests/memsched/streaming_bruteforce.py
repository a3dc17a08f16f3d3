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


def best_of_all_orders(
    sizes: Sequence[int], step_s: Sequence[float], bytes_per_s: float, capacity: int
) -> float:
    """The same over all sets of pinned weights and all orders in which the others are fetched.

    An order is kept to in every round; a fetch starts as soon as the link and bytes are free.
    """
    subsets = []
    for pinned in itertools.product((False, True), repeat=len(sizes)):
        passing = [index for index, stays in enumerate(pinned) if not stays]
        ring = capacity - sum(size for size, stays in zip(sizes, pinned, strict=True) if stays)
        if ring >= max((sizes[index] for index in passing), default=0):
            least = max(sum(step_s), sum(sizes[index] for index in passing) / bytes_per_s)
            subsets.append((least, passing, ring))
    best = float("inf")
    for least, passing, ring in sorted(subsets):
        for order in itertools.permutations(passing):
            if least >= best * (1 - 1e-12):
                break
            best = min(best, _ordered_round_seconds(sizes, step_s, bytes_per_s, order, ring))
    return best


def _ordered_round_seconds(
    sizes: Sequence[int],
    step_s: Sequence[float],
    bytes_per_s: float,
    order: Sequence[int],
    ring: int,
) -> float:
    """A settled round of one order of fetches; infinite if it gets stuck."""
    count, passing = len(sizes), set(order)
    queue = [(turn, index) for turn in range(ROUNDS) for index in order]
    arrived: dict[tuple[int, int], float] = {}
    held, taken, link, now, room_since = 0, 0, 0.0, 0.0, 0.0
    marks = []
    for turn, step in itertools.product(range(ROUNDS), range(count)):
        while taken < len(queue) and held + sizes[queue[taken][1]] <= ring:
            link = max(link, room_since) + sizes[queue[taken][1]] / bytes_per_s
            arrived[queue[taken]] = link
            held += sizes[queue[taken][1]]
            taken += 1
        if step in passing and (turn, step) not in arrived:
            return float("inf")
        now = max(now, arrived.get((turn, step), 0.0)) + step_s[step]
        if step in passing:
            held -= sizes[step]
            room_since = now
        if step == count - 1:
            marks.append(now)
    return (marks[-1] - marks[ROUNDS // 2 - 1]) / (ROUNDS - ROUNDS // 2)
