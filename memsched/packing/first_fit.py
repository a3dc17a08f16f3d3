"""First fit: every item, in a given order, at the lowest offset where it fits."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from memsched.packing.items import Item

# What is hard to place comes first: one of these is nearly always the right idea of "hard".
_HARDNESS: tuple[Callable[[Item], float], ...] = (
    lambda item: item.size,
    lambda item: item.size * (item.upper - item.lower),
    lambda item: item.upper - item.lower,
    lambda item: item.size * math.sqrt(item.upper - item.lower),
)
ORDERS = len(_HARDNESS)


def hardest_first(items: Sequence[Item], order: int) -> list[int]:
    """Indices of the items, the hardest first. There are `ORDERS` opinions of what is hard."""
    hardness = _HARDNESS[order]
    return sorted(
        range(len(items)),
        key=lambda i: (-hardness(items[i]), -items[i].size, items[i].lower, items[i].upper, i),
    )


def first_fit(items: Sequence[Item], order: Sequence[int]) -> list[int]:
    """Offsets of all items. `order` are the indices of all; fixed items come before the others."""
    count = len(items)
    lower, upper, start, end = (np.zeros(count, np.int64) for _ in range(4))
    offsets = [0] * count
    for placed, index in enumerate(sorted(order, key=lambda index: items[index].offset is None)):
        item = items[index]
        offset = item.offset
        if offset is None:
            alive = (lower[:placed] < item.upper) & (upper[:placed] > item.lower)
            offset = _lowest(item, start[:placed][alive], end[:placed][alive])
        lower[placed], upper[placed] = item.lower, item.upper
        start[placed], end[placed] = offset, offset + item.size
        offsets[index] = offset
    return offsets


def _lowest(item: Item, start: np.ndarray, end: np.ndarray) -> int:
    """The lowest aligned offset at which the item leaves the ranges alone."""
    ranks = np.argsort(start, kind="stable")
    tops = np.maximum.accumulate(np.concatenate((np.zeros(1, np.int64), end[ranks])))
    begins = -(-tops // item.alignment) * item.alignment
    gaps = np.flatnonzero(begins[:-1] + item.size <= start[ranks])
    return int(begins[gaps[0]] if gaps.size else begins[-1])
