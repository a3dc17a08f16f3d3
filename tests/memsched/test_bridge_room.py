"""Bridges through a full host: what is in the way leaves, and comes back."""

import pytest

from memsched.errors import DoesNotFitError
from memsched.machine import Compute, Link, Machine, Tier
from memsched.passes.bridge import bridge
from memsched.plan import Copy, Free, Residence
from memsched.program import ArraySpec
from memsched.referee import verify

SIZES = {"a": 384, "b": 256, "c": 320, "d": 320, "huge": 2048}
ARRAYS = {name: ArraySpec(name, (size,), "uint8", "weight") for name, size in SIZES.items()}
IN_HOST = [
    Residence("a", "host", offset=0),
    Residence("b", "host", offset=384),
    Residence("c", "host", offset=640),
]


def machine(host: int) -> Machine:
    tiers = (
        Tier("device", 4096, 4096, 64),
        Tier("host", host, 4096, 64),
        Tier("nvme", 1 << 20, 4096, 64),
    )
    pairs = (("nvme", "host"), ("host", "nvme"), ("host", "device"), ("device", "host"))
    links = tuple(Link(source, target, 1e6) for source, target in pairs)
    return Machine("any", "gpu", tiers, links, Compute(1e9, 1e9))


def moves(host: int, wanted: str) -> list[tuple[str, str, str]]:
    """What is freed in the host and copied there, in order; the referee has accepted it."""
    here = machine(host)
    after = [*IN_HOST, Residence(wanted, "device")]
    program, plan = bridge(IN_HOST, after, ARRAYS, here, ["a", "b", "c", wanted])
    verify(plan, program, here)
    found = []
    for action in plan.actions:
        match action:
            case Free(array=array, tier=tier):
                found.append(("free", array, tier))
            case Copy(array=array, target=tier):
                found.append(("copy", array, tier))
    return found


def passing(name: str) -> list[tuple[str, str, str]]:
    return [("copy", name, "host"), ("copy", name, "device"), ("free", name, "host")]


def test_with_a_gap_nothing_else_moves() -> None:
    assert moves(960 + 320, "d") == passing("d")


@pytest.mark.parametrize(
    ("host", "leaves"),
    # Full: the 320 bytes of c are the fewest. With 64 bytes after c, they are still.
    # With 192 free at the end, c's place and these are more than enough.
    [(960, "c"), (1024, "c"), (1152, "c")],
)
def test_the_smallest_that_is_large_enough_makes_room(host: int, leaves: str) -> None:
    assert moves(host, "d") == [("free", leaves, "host"), *passing("d"), ("copy", leaves, "host")]


def test_what_can_never_pass_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match="2,048 B must pass through tier 'host'"):
        moves(960, "huge")
