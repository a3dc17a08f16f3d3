"""The order that goes through a chain and back in the least time within a memory.

A dynamic programme over the parts of a chain (`remat_ways`) and all memories.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from memsched.passes.remat_chain import Chain, Sizes
from memsched.passes.remat_order import Order
from memsched.passes.remat_ways import (
    KINDS,
    Cut,
    Kind,
    Part,
    base,
    before_cuts,
    cuts,
    first_alone,
    runs,
    single,
)

# Memory is counted in units of which the room has so many, or in a unit that divides all sizes.
UNITS = 512
MOST_UNITS = 2048
# No more numbers than this for one kind of part: chains of over 180 stages have larger units.
MOST_NUMBERS = 16_000_000
# In a longer chain a state stays until its way back is done.
LONGEST = 40

# Seconds for each number of units.
Curves = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Table:
    """Least seconds of every part of a chain, for every memory up to a limit.

    `curves[kind][first, last, units]` is the time from the state before a part and the cotangent
    after it to the cotangent before it. A state before it that stays is not counted, what the ways
    back after it have left is. In `beside` the state before the part is counted.
    """

    chain: Chain
    unit_bytes: int
    sizes: Sizes
    curves: Mapping[Kind, Curves]
    beside: Mapping[Kind, Curves]

    def seconds(self, room_bytes: int) -> float:
        """Least seconds for the whole chain in a memory; infinite where it is too small."""
        units = self._units(room_bytes)
        if units < 0:
            return float("inf")
        return float(self.curves[self._whole.kind][self._whole.first, self._whole.last, units])

    def order(self, room_bytes: int) -> Order | None:
        """The order that takes these seconds, or None where the memory is too small."""
        if self.seconds(room_bytes) == float("inf"):
            return None
        return tuple(_walk(self, self._whole, self._units(room_bytes)))

    def _units(self, room_bytes: int) -> int:
        free = (room_bytes - self.chain.base_bytes) // self.unit_bytes
        return int(min(free, self.curves[self._whole.kind].shape[-1] - 1))

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
    count = max(0, (room_bytes - chain.base_bytes) // unit) + 1
    sizes = chain.nbytes.in_units(unit)
    stages = len(chain.forward)
    kinds = KINDS if stages <= LONGEST else KINDS[:1]
    shape = (stages, stages, count)
    curves = {kind: np.empty(shape) for kind in kinds}
    beside = {kind: np.empty(shape) for kind in kinds if kind[1] == "done"}
    table = Table(chain, unit, sizes, curves, beside)
    for length in range(stages):
        for first, kind in itertools.product(range(stages - length), kinds):
            part = Part(first, first + length, *kind)
            curve = _curve(table, part, count)
            curves[kind][first, part.last] = curve
            if kind in beside:
                state = min(sizes.state[first], count)
                beside[kind][first, part.last, :state] = np.inf
                beside[kind][first, part.last, state:] = curve[: count - state]
    return table


def unit_bytes(chain: Chain, room_bytes: int) -> int:
    """Bytes of a unit: what divides all sizes, if that makes few enough units."""
    free = max(1, room_bytes - chain.base_bytes)
    exact = chain.nbytes.divisor()
    most = max(1, MOST_NUMBERS // len(chain.forward) ** 2)
    return exact if free // exact <= min(MOST_UNITS, most) else max(1, free // min(UNITS, most))


def _curve(table: Table, part: Part, count: int) -> Curves:
    """Least seconds of a part for every memory. Those of shorter parts are known."""
    curve = np.full(count, np.inf)
    if part.first == part.last:
        least, seconds = single(table.chain, table.sizes, part)
        curve[least:] = seconds
        return curve
    start = base(table.sizes, part)
    if start < count:
        for _, found in _ways(table, part, start, count):
            np.minimum(curve[start:], found.min(axis=0), out=curve[start:])
    return curve


def _ways(table: Table, part: Part, start: int, end: int) -> Iterator[tuple[Cut | None, Curves]]:
    """Seconds of the ways to do a part, for memories from one to another, in units.

    First without a cut; then a row for every place of each kind of cut.
    """
    chain, sizes, (first, last, _, _) = table.chain, table.sizes, part
    taken, least, first_s = first_alone(chain, sizes, part)
    found = np.full((1, end - start), np.inf)
    low = max(start, least, taken)
    if low < end:
        rest = table.curves[part.held, "done"][first + 1, last, low - taken : end - taken]
        found[0, low - start :] = rest + first_s
    yield None, found
    least_units, seconds = before_cuts(chain, sizes, part)
    above = slice(start - base(sizes, part), end - base(sizes, part))
    for cut in cuts(part):
        if cut.upper not in table.curves or cut.lower not in table.curves:
            continue
        if cut.stays:
            upper = table.beside[cut.upper][first + 1 : last + 1, last, above]
            lower = table.curves[cut.lower][first, first:last, start:end]
        else:
            upper = table.curves[cut.upper][first + 1 : last, last, above]
            lower = table.curves[cut.lower][first, first + 1 : last, start:end]
        found = upper + lower
        if len(found):
            found += np.array(seconds[: len(found)])[:, None]
            for row, units in zip(found, least_units, strict=False):
                row[: max(0, units - start)] = np.inf
            yield cut, found


def _walk(table: Table, part: Part, units: int) -> Iterator[int]:
    """The steps of a part of a chain in a memory."""
    chain, sizes, first = table.chain, table.sizes, part.first
    back = chain.backward[first] if part.leaves == "done" else ()
    if first == part.last:
        yield from chain.forward[first] if runs(chain, part) else ()
        yield from back
        return
    ways = list(_ways(table, part, units, units + 1))
    cut, found = min(ways, key=lambda way: float(way[1].min()))
    place = first + 1 + int(found.argmin())
    yield from itertools.chain(*chain.forward[first:place])
    if cut is None:
        taken = first_alone(chain, sizes, part).taken
        yield from _walk(table, Part(place, part.last, part.held), units - taken)
        yield from back
    else:
        taken = base(sizes, part) + (sizes.state[place] if cut.stays else 0)
        yield from _walk(table, Part(place, part.last, *cut.upper), units - taken)
        yield from _walk(table, Part(first, place - cut.stays, *cut.lower), units)
