"""Offsets for items whose lifetimes are known: dynamic storage allocation, solved ahead of time.

`pack` is the whole interface. First fit gives a packing at once; where that ends above the largest
sum of sizes that live together, beam searches for lower ones follow until time is up.
"""

from collections.abc import Sequence

from memsched.errors import DoesNotFitError
from memsched.packing.items import Item, Packing, check, largest_live_sum
from memsched.packing.search import minimise

__all__ = ["Item", "Packing", "pack"]


def pack(
    items: Sequence[Item],
    *,
    capacity: int | None = None,
    seconds: float = 1.0,
    rounds: int | None = None,
    seed: int = 0,
) -> Packing:
    """Choose an offset for every item, so that no two share a byte while both live.

    Args:
        capacity: where the search may stop, and must arrive; without it the peak is minimised.
        seconds: time for searching. First fit, which comes first, is always finished.
        rounds: searches at most. If these end before the time, the result depends on nothing else
            than the arguments.

    Raises:
        ProgramError: an item that cannot exist, or fixed items that overlap.
        DoesNotFitError: no packing within the capacity was found; `smallest` has one that was.
    """
    check(items)
    bound = largest_live_sum(items)
    if capacity is not None and capacity < bound:
        # Nothing can fit. What is left to find is roughly how much would do.
        seconds = min(seconds, 1.0)
    offsets = minimise(items, enough=capacity or 0, seconds=seconds, rounds=rounds, seed=seed)
    peak = max((o + item.size for o, item in zip(offsets, items, strict=True)), default=0)
    if capacity is not None and peak > capacity:
        raise DoesNotFitError(
            f"{len(items):,} items take {peak:,} B as packed and at least {bound:,} B in any way, "
            f"but the capacity is {capacity:,} B; give more capacity"
            + (" or more time" if bound <= capacity else ""),
            {"capacity": peak},
        )
    return Packing(tuple(offsets), peak, bound)
