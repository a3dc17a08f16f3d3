"""The order that goes through a chain and back in the least time within a memory.

Source: O. Beaumont, L. Eyraud-Dubois, J. Herrmann, A. Joly and A. Shilova, Optimal checkpointing
for heterogeneous chains: how to train deep neural networks with limited memory, 2019 (the dynamic
programme of "rotor"), with two differences: a stage is one step that always makes its tape, and
what the way back leaves behind stays.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from memsched.passes.remat_chain import Chain
from memsched.passes.remat_order import Order

# Memory is counted in units of which the room has so many, or in a unit that divides all sizes.
UNITS = 512
MOST_UNITS = 2048

Curve = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Table:
    """Least seconds of every part of a chain, for every memory up to a limit.

    `curves[first, last][units]` is the time from the state before `first` and the cotangent after
    `last` to the cotangent before `first`, in that much memory beside the state.
    """

    chain: "Chain"
    unit_bytes: int
    curves: dict[tuple[int, int], Curve]

    def seconds(self, room_bytes: int) -> float:
        """Least seconds for the whole chain in a memory; infinite where it is too small."""
        units = self._units(room_bytes)
        return float(self._whole[units]) if units >= 0 else float("inf")

    def order(self, room_bytes: int) -> Order | None:
        """The order that takes these seconds, or None where the memory is too small."""
        if self.seconds(room_bytes) == float("inf"):
            return None
        return tuple(_walk(self, 0, len(self.chain.forward) - 1, self._units(room_bytes)))

    def _units(self, room_bytes: int) -> int:
        free = (room_bytes - self.chain.base_bytes) // self.unit_bytes
        return int(min(free, len(self._whole) - 1))

    @property
    def _whole(self) -> Curve:
        return self.curves[0, len(self.chain.forward) - 1]


@dataclasses.dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of a chain in units, rounded to the nearest: what comes out is measured exactly."""

    state: tuple[int, ...]
    tape: tuple[int, ...]
    work: tuple[int, ...]
    cotangent: tuple[int, ...]
    undo: tuple[int, ...]
    left: tuple[int, ...]


def solve(chain: Chain, room_bytes: int) -> Table:
    """The table of a chain for all memories up to one.

    Args:
        chain: what there is to do.
        room_bytes: the most of interest. Units divide it finely, or all sizes exactly.
    """
    unit = unit_bytes(chain, room_bytes)
    table = Table(chain, unit, {})
    count = max(0, (room_bytes - chain.base_bytes) // unit) + 1
    sizes = _sizes(chain, unit)
    for length in range(len(chain.forward)):
        for first in range(len(chain.forward) - length):
            curve = np.full(count, np.inf)
            for _, found in _choices(table, sizes, first, first + length, count):
                np.minimum(curve, found, out=curve)
            table.curves[first, first + length] = curve
    return table


def unit_bytes(chain: Chain, room_bytes: int) -> int:
    """Bytes of a unit: what divides all sizes, if that makes few enough units."""
    sizes = (
        *chain.state_bytes,
        *chain.tape_bytes,
        *chain.work_bytes,
        *chain.cotangent_bytes,
        *chain.undo_bytes,
        *chain.left_bytes,
    )
    free = max(1, room_bytes - chain.base_bytes)
    exact = int(np.gcd.reduce(np.array(sizes, dtype=np.int64))) or 1
    return exact if free // exact <= MOST_UNITS else max(1, free // UNITS)


def _sizes(chain: Chain, unit: int) -> _Sizes:
    def units(nbytes: Sequence[int]) -> tuple[int, ...]:
        return tuple(round(one / unit) for one in nbytes)

    return _Sizes(
        units(chain.state_bytes),
        units(chain.tape_bytes),
        units(chain.work_bytes),
        units(chain.cotangent_bytes),
        units(chain.undo_bytes),
        units(chain.left_bytes),
    )


def _choices(
    table: Table, sizes: _Sizes, first: int, last: int, count: int
) -> Iterator[tuple[int, Curve]]:
    """The ways to do a part of a chain, each with its time for every memory.

    Way `first`: the stage's tape is kept. Way j: only the state before stage j is, and what comes
    before it is run again later.
    """
    chain = table.chain
    there, back = chain.forward_s[first], chain.backward_s[first]
    if first == last:
        yield first, _single(chain, sizes, first, count)
        return
    left = sum(sizes.left[first + 1 : last + 1])
    least = max(sizes.cotangent[last + 1] + sizes.work[first], left + sizes.undo[first])
    taken = sizes.tape[first] + sizes.state[first + 1]
    yield first, _from(_shifted(table.curves[first + 1, last], taken) + (there + back), least)
    least, seconds, after = 0, 0.0, sum(sizes.left[first : last + 1])
    for cut in range(first + 1, last + 1):
        stage = cut - 1
        held = sizes.state[stage] if stage > first else 0
        least = max(least, sizes.cotangent[last + 1] + held + sizes.work[stage])
        seconds += chain.forward_s[stage]
        after -= sizes.left[stage]
        upper = _shifted(table.curves[cut, last], sizes.state[cut])
        lower = _shifted(table.curves[first, cut - 1], after)
        yield cut, _from(upper + lower + seconds, least)


def _single(chain: Chain, sizes: _Sizes, stage: int, count: int) -> Curve:
    """The curve of one stage. One whose way back reads nothing of it need not run again."""
    least, seconds = sizes.undo[stage], chain.backward_s[stage]
    if chain.reads_tape[stage]:
        least = max(least, sizes.cotangent[stage + 1] + sizes.work[stage])
        seconds += chain.forward_s[stage]
    return _from(np.full(count, seconds, np.float64), least)


def _from(curve: Curve, least: int) -> Curve:
    """The curve, infinite below a memory. The array is changed in place."""
    curve[:least] = np.inf
    return curve


def _shifted(curve: Curve, units: int) -> Curve:
    """The curve of what is left when so many units are taken."""
    found = np.full(len(curve), np.inf)
    if units < len(curve):
        found[units:] = curve[: len(curve) - units]
    return found


def _walk(table: Table, first: int, last: int, units: int) -> Iterator[int]:
    """The steps of a part of a chain in a memory."""
    chain, sizes = table.chain, _sizes(table.chain, table.unit_bytes)
    count = len(table.curves[0, 0])
    choices = _choices(table, sizes, first, last, count)
    way, _ = min(choices, key=lambda choice: choice[1][units])
    if first == last:
        yield from chain.forward[first] if chain.reads_tape[first] else ()
        yield from chain.backward[first]
    elif way == first:
        yield from chain.forward[first]
        taken = sizes.tape[first] + sizes.state[first + 1]
        yield from _walk(table, first + 1, last, units - taken)
        yield from chain.backward[first]
    else:
        yield from itertools.chain(*chain.forward[first:way])
        yield from _walk(table, way, last, units - sizes.state[way])
        yield from _walk(table, first, way - 1, units - sum(sizes.left[way : last + 1]))
