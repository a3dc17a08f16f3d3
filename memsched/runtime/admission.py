"""May a plan begin in the state that the plans before it left?

Its own weights must lie exactly where it expects them. Weights of other programs may stay where
they are, if the plan never touches their place and there is room for both.
"""

import dataclasses
from collections.abc import Mapping

from memsched.errors import PlanError
from memsched.machine import Machine, rounded
from memsched.plan import Residence
from memsched.program import Program
from memsched.runtime.operations import Rests, Schedule
from memsched.runtime.ranges import Range, size, union, without


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """What a plan may do in the state `held`: bytes of the arena to keep, and what is in use.

    `idle` are weights of other programs.
    """

    held: Rests
    idle: Rests
    ranges: tuple[Range, ...]
    start_bytes: Mapping[str, int]


def admit(
    held: Rests,
    nbytes: Mapping[str, int],
    made: Schedule,
    program: Program,
    peaks: Mapping[str, int],
    machine: Machine,
) -> Admission:
    """Compare the state with the plan's entry.

    Args:
        held: where weights lie, other than in "nvme".
        nbytes: sizes of all of them.
        peaks: what the plan takes in each tier by itself.

    Raises:
        PlanError: a weight lies elsewhere, or an idle one is in the way.
    """
    own = {key: rest for key, rest in held.items() if key[0] in program.arrays}
    idle = {key: rest for key, rest in held.items() if key[0] not in program.arrays}
    if own != made.weights_before:
        raise _differs(own, made.weights_before)
    ranges = made.ranges
    start_bytes = dict(made.start_bytes)
    for (name, tier), rest in idle.items():
        taken = rounded(nbytes[name], machine.tier(tier).alignment_bytes)
        start_bytes[tier] += taken
        if rest.offset is not None:
            place = (rest.offset, rest.offset + taken)
            if size(without([place], made.ranges)) < taken:
                raise PlanError(
                    f"weight {name!r} of another program lies in {tier!r} at offset {rest.offset}, "
                    "where this plan puts its own; run the bridge that frees it first"
                )
            ranges = union([*ranges, place])
    for tier, start in start_bytes.items():
        most = peaks[tier] + start - made.start_bytes[tier]
        if most > (capacity := machine.tier(tier).capacity_bytes):
            raise PlanError(
                f"{tier!r} would hold {most:,} B of {capacity:,} B with the weights of other "
                f"programs, {start - made.start_bytes[tier]:,} B: run the bridge that frees them"
            )
    return Admission(held, idle, ranges, start_bytes)


def _differs(own: Rests, wanted: Rests) -> PlanError:
    differing = set(own.items()) ^ set(wanted.items())
    (name, tier), rest = min(differing, key=_order)
    side = "lies there" if own.get((name, tier)) == rest else "is missing there"
    return PlanError(
        f"weight {name!r} in {tier!r} at offset {rest.offset} {side}, against the plan's entry "
        f"(one of {len(differing)} differences); run the bridge from `held` to the entry first"
    )


def _order(item: tuple[tuple[str, str], Residence]) -> str:
    return str(item)
