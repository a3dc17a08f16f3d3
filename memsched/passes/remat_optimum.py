"""The order that goes through a chain and back in the least time within a memory.

A dynamic programme over the parts of a chain (`remat_ways`) and all memories.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from memsched.passes.remat_chain import Chain
from memsched.passes.remat_order import Order
from memsched.passes.remat_ways import KINDS, Part, Sizes, Way, in_units, runs, single, ways

# Memory is counted in units of which the room has so many, or in a unit that divides all sizes.
UNITS = 512
MOST_UNITS = 2048
# In a longer chain a state stays until its way back is done: a second for 40 stages, not for 100.
LONGEST = 40

Curve = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Table:
    """Least seconds of every part of a chain, for every memory up to a limit.

    `curves[part][units]` is the time from the state before a part and the cotangent after it to the
    cotangent before it. A state before it that stays, and what lies beside it, is not counted.
    """

    chain: Chain
    unit_bytes: int
    curves: dict[Part, Curve]

    def seconds(self, room_bytes: int) -> float:
        """Least seconds for the whole chain in a memory; infinite where it is too small."""
        units = self._units(room_bytes)
        return float(self.curves[self._whole][units]) if units >= 0 else float("inf")

    def order(self, room_bytes: int) -> Order | None:
        """The order that takes these seconds, or None where the memory is too small."""
        if self.seconds(room_bytes) == float("inf"):
            return None
        return tuple(_walk(self, self._whole, self._units(room_bytes)))

    def _units(self, room_bytes: int) -> int:
        free = (room_bytes - self.chain.base_bytes) // self.unit_bytes
        return int(min(free, len(self.curves[self._whole]) - 1))

    @property
    def _whole(self) -> Part:
        return Part(0, len(self.chain.forward) - 1)


def solve(chain: Chain, room_bytes: int) -> Table:
    """The table of a chain for all memories up to one.

    Args:
        chain: what there is to do.
        room_bytes: the most of interest. Units divide it finely, or all sizes exactly.
    """
    unit = unit_bytes(chain, room_bytes)
    table = Table(chain, unit, {})
    count = max(0, (room_bytes - chain.base_bytes) // unit) + 1
    sizes = in_units(chain, unit)
    for length in range(len(chain.forward)):
        for first in range(len(chain.forward) - length):
            for kind in KINDS if len(chain.forward) <= LONGEST else KINDS[:1]:
                part = Part(first, first + length, *kind)
                table.curves[part] = _curve(table, sizes, part, count)
    return table


def unit_bytes(chain: Chain, room_bytes: int) -> int:
    """Bytes of a unit: what divides all sizes, if that makes few enough units."""
    sizes = (
        *chain.state_bytes,
        *chain.tape_bytes,
        *chain.result_bytes,
        *chain.work_bytes,
        *chain.cotangent_bytes,
        *chain.undo_bytes,
        *chain.left_bytes,
    )
    free = max(1, room_bytes - chain.base_bytes)
    exact = int(np.gcd.reduce(np.array(sizes, dtype=np.int64))) or 1
    return exact if free // exact <= MOST_UNITS else max(1, free // UNITS)


def _curve(table: Table, sizes: Sizes, part: Part, count: int) -> Curve:
    """Least seconds of a part for every memory. Those of shorter parts are known."""
    curve = np.full(count, np.inf)
    if part.first == part.last:
        least, seconds = single(table.chain, sizes, part)
        curve[least:] = seconds
        return curve
    for way in _known(table, sizes, part):
        start = max(way.least, *way.taken)
        if start >= count:
            continue
        above, below = way.taken
        found = table.curves[way.upper][start - above : count - above] + way.seconds
        if way.lower is not None:
            found += table.curves[way.lower][start - below : count - below]
        np.minimum(curve[start:], found, out=curve[start:])
    return curve


def _known(table: Table, sizes: Sizes, part: Part) -> Iterator[Way]:
    """The ways to do a part that are made of parts in the table."""
    for way in ways(table.chain, sizes, part):
        if way.upper in table.curves and (way.lower is None or way.lower in table.curves):
            yield way


def _seconds(table: Table, way: Way, units: int) -> float:
    """What a way takes in a memory."""
    if units < max(way.least, *way.taken):
        return float("inf")
    seconds = way.seconds + float(table.curves[way.upper][units - way.taken[0]])
    if way.lower is not None:
        seconds += float(table.curves[way.lower][units - way.taken[1]])
    return seconds


def _walk(table: Table, part: Part, units: int) -> Iterator[int]:
    """The steps of a part of a chain in a memory."""
    chain, first = table.chain, part.first
    back = chain.backward[first] if part.leaves == "done" else ()
    if first == part.last:
        yield from chain.forward[first] if runs(chain, part) else ()
        yield from back
        return
    known = _known(table, in_units(chain, table.unit_bytes), part)
    best = min(known, key=lambda way: _seconds(table, way, units))
    yield from itertools.chain(*chain.forward[first : best.until])
    yield from _walk(table, best.upper, units - best.taken[0])
    if best.lower is None:
        yield from back
    else:
        yield from _walk(table, best.lower, units - best.taken[1])
