"""The ways to do a part of a chain there and back, each made of ways to do shorter parts.

Source: O. Beaumont, L. Eyraud-Dubois, J. Herrmann, A. Joly and A. Shilova, Optimal checkpointing
for heterogeneous chains: how to train deep neural networks with limited memory, 2019 ("rotor").
There a state stays until its way back is done. Here it may also go before, with its tape left or
not, and be made again; a stage is one step that always makes its tape; and what the way back leaves
behind stays.
"""

import itertools
from typing import Literal, NamedTuple

from memsched.passes.remat_chain import Chain, Sizes

# What becomes of the stage before which a part begins; see `Part`.
Leaves = Literal["done", "tape", "nothing"]
Kind = tuple[bool, Leaves]
# Parts of the same stages; the first kind is that of the source.
KINDS: tuple[Kind, ...] = (
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

    @property
    def kind(self) -> Kind:
        """What it is besides its stages."""
        return self.held, self.leaves


class Cut(NamedTuple):
    """How a part is cut in two. The stages before the cut run, `upper` is done, then `lower`.

    The state at the cut stays while the upper part is done; or it goes on the way, and the way back
    of the stage at the cut belongs to the lower part.
    """

    upper: Kind
    lower: Kind
    stays: bool


class First(NamedTuple):
    """The first stage of a part runs, the rest is done, then the way back of the first stage.

    `taken` lies beside the rest, `least` is what the first stage takes; both in units.
    """

    taken: int
    least: int
    seconds: float


def cuts(part: Part) -> tuple[Cut, ...]:
    """How a part can be cut; the first is that of the source."""
    held, leaves = part.kind
    return (
        Cut((held, "done"), (False, leaves), stays=True),
        Cut((held, "tape"), (True, leaves), stays=False),
        Cut((held, "nothing"), (False, leaves), stays=False),
    )


def before_cuts(chain: Chain, sizes: Sizes, part: Part) -> tuple[list[int], list[float]]:
    """Units and seconds that the stages before a cut take, for every cut of a part."""
    stages = range(part.first, part.last)
    beside = base(sizes, part) + _above(sizes, part)
    # The first state of a part is counted by whoever is before it.
    works = (beside + sizes.work[i] + (sizes.state[i] if i > part.first else 0) for i in stages)
    seconds = (chain.forward_s[i] for i in stages)
    return list(itertools.accumulate(works, max)), list(itertools.accumulate(seconds))


def first_alone(chain: Chain, sizes: Sizes, part: Part) -> First:
    """What the first stage of a part takes; its tape is kept if anybody wants it."""
    first = part.first
    least = base(sizes, part) + _above(sizes, part) + sizes.work[first]
    seconds = chain.forward_s[first]
    if part.leaves == "done":
        least = max(least, sizes.left_above(first) + sizes.undo[first])
        seconds += chain.backward_s[first]
    tape = 0 if part.leaves == "nothing" else sizes.tape[first]
    return First(tape + sizes.state[first + 1], least, seconds)


def single(chain: Chain, sizes: Sizes, part: Part) -> tuple[int, float]:
    """Units and seconds of one stage."""
    stage, above = part.first, sizes.left_above(part.first)
    least, seconds = 0, 0.0
    if runs(chain, part):
        least = base(sizes, part) + above + sizes.cotangent[stage + 1] + sizes.work[stage]
        seconds = chain.forward_s[stage]
    if part.leaves == "done":
        least = max(least, above + sizes.undo[stage])
        seconds += chain.backward_s[stage]
    return least, seconds


def runs(chain: Chain, part: Part) -> bool:
    """Whether a single stage runs: not if its way back reads nothing of it, or what is there."""
    return chain.reads_tape[part.first] and not part.held and part.leaves != "nothing"


def base(sizes: Sizes, part: Part) -> int:
    """The state before a part, if it is the part that lets it go."""
    return 0 if part.leaves == "done" else sizes.state[part.first]


def _above(sizes: Sizes, part: Part) -> int:
    """What lies there because of the stages after a part, and of its last one if that ran."""
    last = part.last
    held = sizes.tape[last] + sizes.result[last] if part.held else 0
    return sizes.left_above(last) + sizes.cotangent[last + 1] + held
