"""The ways to do a part of a chain there and back, each made of ways to do shorter parts.

Source: O. Beaumont, L. Eyraud-Dubois, J. Herrmann, A. Joly and A. Shilova, Optimal checkpointing
for heterogeneous chains: how to train deep neural networks with limited memory, 2019 ("rotor").
There a state stays until its way back is done. Here it may also go before, with its tape left or
not, and be made again; a stage is one step that always makes its tape; and what the way back leaves
behind stays.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from memsched.passes.remat_chain import Chain

# What becomes of the stage before which a part begins; see `Part`.
Leaves = Literal["done", "tape", "nothing"]
# Parts of the same stages; the first kind is that of the source.
KINDS: tuple[tuple[bool, Leaves], ...] = (
    (False, "done"),
    (False, "tape"),
    (False, "nothing"),
    (True, "done"),
    (True, "tape"),
    (True, "nothing"),
)


class Part(NamedTuple):
    """Stages in a row, both ends included; `held` says that the tape of the last one is there.

    `leaves` says what becomes of the first stage: its way back is done; or the state before it goes
    on the way, and its tape is left for later, or nothing.
    """

    first: int
    last: int
    held: bool = False
    leaves: Leaves = "done"


class Way(NamedTuple):
    """A way to do a part: its stages before `until` run, then `upper` and after it `lower` is done.

    Without a `lower` the way back of the first stage comes last, if it is to be done. `taken` is
    what lies beside the upper and the lower part, `least` what the rest takes; both in units.
    """

    until: int
    upper: Part
    lower: Part | None
    taken: tuple[int, int]
    least: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a chain in units, rounded to the nearest: what comes out is measured exactly."""

    state: tuple[int, ...]
    tape: tuple[int, ...]
    result: tuple[int, ...]
    work: tuple[int, ...]
    cotangent: tuple[int, ...]
    undo: tuple[int, ...]
    left: tuple[int, ...]


def in_units(chain: Chain, unit: int) -> Sizes:
    """The sizes of a chain in units of so many bytes."""

    def units(nbytes: Sequence[int]) -> tuple[int, ...]:
        return tuple(round(one / unit) for one in nbytes)

    return Sizes(
        units(chain.state_bytes),
        units(chain.tape_bytes),
        units(chain.result_bytes),
        units(chain.work_bytes),
        units(chain.cotangent_bytes),
        units(chain.undo_bytes),
        units(chain.left_bytes),
    )


def ways(chain: Chain, sizes: Sizes, part: Part) -> Iterator[Way]:
    """The ways to do a part.

    Its first stage runs, and what it makes is kept; or stages before a cut run, what comes from
    there on is done, and then what comes before it. Of the stage at the cut the state stays all the
    time; or it goes, and its way back belongs to what is done last, with its tape kept or not.
    """
    first, last, held, leaves = part
    yield _first(chain, sizes, part)
    left = list(itertools.accumulate(sizes.left[last:first:-1], initial=0))[::-1]
    base = 0 if leaves == "done" else sizes.state[first]
    beside = base + sizes.cotangent[last + 1] + _kept(sizes, part)
    least, seconds = beside + sizes.work[first], chain.forward_s[first]
    for cut in range(first + 1, last + 1):
        upper, lower = Part(cut, last, held), Part(first, cut - 1, False, leaves)
        taken = (base + sizes.state[cut], left[cut - 1 - first])
        yield Way(cut, upper, lower, taken, least, seconds)
        if cut < last:
            taken = (base, left[cut - first])
            upper, lower = Part(cut, last, held, "tape"), Part(first, cut, True, leaves)
            yield Way(cut, upper, lower, taken, least, seconds)
            upper, lower = Part(cut, last, held, "nothing"), Part(first, cut, False, leaves)
            yield Way(cut, upper, lower, taken, least, seconds)
        least = max(least, beside + sizes.state[cut] + sizes.work[cut])
        seconds += chain.forward_s[cut]


def _first(chain: Chain, sizes: Sizes, part: Part) -> Way:
    """The first stage runs, then the rest is done; the tape is kept if anybody wants it."""
    first, last, held, leaves = part
    base = 0 if leaves == "done" else sizes.state[first]
    least = base + sizes.cotangent[last + 1] + _kept(sizes, part) + sizes.work[first]
    seconds = chain.forward_s[first]
    if leaves == "done":
        least = max(least, sum(sizes.left[first + 1 : last + 1]) + sizes.undo[first])
        seconds += chain.backward_s[first]
    tape = 0 if leaves == "nothing" else sizes.tape[first]
    taken = (tape + sizes.state[first + 1], 0)
    return Way(first + 1, Part(first + 1, last, held), None, taken, least, seconds)


def _kept(sizes: Sizes, part: Part) -> int:
    """What the last stage of a part has left before."""
    return sizes.tape[part.last] + sizes.result[part.last] if part.held else 0


def single(chain: Chain, sizes: Sizes, part: Part) -> tuple[int, float]:
    """Memory and seconds of one stage."""
    stage = part.first
    least, seconds = 0, 0.0
    if runs(chain, part):
        state = 0 if part.leaves == "done" else sizes.state[stage]
        least = state + sizes.cotangent[stage + 1] + sizes.work[stage]
        seconds = chain.forward_s[stage]
    if part.leaves == "done":
        return max(least, sizes.undo[stage]), seconds + chain.backward_s[stage]
    return least, seconds


def runs(chain: Chain, part: Part) -> bool:
    """Whether a single stage runs: not if its way back reads nothing of it, or what is there."""
    return chain.reads_tape[part.first] and not part.held and part.leaves != "nothing"
