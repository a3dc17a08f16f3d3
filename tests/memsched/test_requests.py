"""memsched.calibration.requests: which size and number of requests a disk is read with."""

from pathlib import Path

import pytest
from programs import tiny_machine

from memsched.calibration.requests import (
    ARRAY_BYTES,
    ARRAYS,
    BLOCK_BYTES,
    QUEUE_DEPTHS,
    USUAL,
    Reading,
    best_of,
    measure_requests,
    observations_of,
    requests_text,
    with_requests,
)
from memsched.calibration.scratch import Scratch

MIB = 1 << 20


def reading(block_bytes: int, queue_depth: int, *seconds: float) -> Reading:
    """Twice as long beside steps."""
    return Reading(block_bytes, queue_depth, seconds, tuple(2 * one for one in seconds))


def test_the_fastest_is_taken_where_it_is_faster_every_time() -> None:
    usual, other = reading(*USUAL, 0.4, 0.4, 0.4), reading(MIB, 2, 0.2, 0.3, 0.2)
    slow = reading(MIB, 1, 0.9, 0.9, 0.9)
    assert best_of([slow, other, usual]) is other


@pytest.mark.parametrize("seconds", [(0.2, 0.2, 0.41), (0.39, 0.38, 0.39)])
def test_the_usual_one_stays_where_another_is_not_clearly_faster(
    seconds: tuple[float, ...],
) -> None:
    usual = reading(*USUAL, 0.4, 0.4, 0.4)
    assert best_of([reading(MIB, 2, *seconds), usual]) is usual


def test_one_bad_moment_of_the_fastest_does_not_hide_the_next() -> None:
    usual, second = reading(*USUAL, 0.4, 0.4, 0.4), reading(MIB, 4, 0.2, 0.2, 0.2)
    assert best_of([reading(MIB, 2, 0.1, 0.1, 0.45), second, usual]) is second


def test_one_try_is_not_enough_to_leave_the_usual_one() -> None:
    usual = reading(*USUAL, 0.4)
    assert best_of([reading(MIB, 2, 0.1), usual]) is usual


def test_only_the_link_that_was_read_gets_the_chosen_requests() -> None:
    machine = tiny_machine(host=1 << 20)
    changed = with_requests(machine, reading(MIB, 2, 0.1))
    for before, after in zip(machine.links, changed.links, strict=True):
        if after.source == "nvme":
            assert (after.block_bytes, after.queue_depth) == (MIB, 2)
            assert after.bytes_per_s == before.bytes_per_s
        else:
            assert after == before
    assert changed.tiers == machine.tiers


def test_what_is_learned_of_them_are_bytes_and_requests_of_the_chosen_depth() -> None:
    machine = tiny_machine()
    some = [reading(MIB, 2, 0.1), reading(4 * MIB, 2, 0.2), reading(4 * MIB, 6, 0.3)]
    found = list(observations_of(some, machine, some[0]))
    assert [(one.blocks, one.beside, one.seconds) for one in found] == [
        (ARRAYS * ARRAY_BYTES // MIB, 0.0, 0.1),
        (ARRAYS * ARRAY_BYTES // MIB, 1.0, 0.2),
        (ARRAYS * ARRAY_BYTES // (4 * MIB), 0.0, 0.2),
        (ARRAYS * ARRAY_BYTES // (4 * MIB), 1.0, 0.4),
    ]
    assert {one.link for one in found} == {"nvme->device"}
    assert {one.nbytes for one in found} == {ARRAYS * ARRAY_BYTES}


def test_a_disk_is_read_in_every_size_at_every_depth_alone_and_beside_steps(
    tmp_path: Path,
) -> None:
    with Scratch(tmp_path) as scratch:
        found = measure_requests(scratch, seconds=1.0)
    settings = {(one.block_bytes, one.queue_depth) for one in found}
    assert settings == {(size, depth) for size in BLOCK_BYTES for depth in QUEUE_DEPTHS}
    assert USUAL in settings
    assert {len(one.alone_s) for one in found} == {len(one.beside_s) for one in found}
    # No disk reads at more than this, and none that is worth measuring at less.
    assert all(1e6 < one.alone_bytes_per_s < 1e12 for one in found)
    chosen = best_of(found)
    lines = requests_text(found, chosen).splitlines()
    assert len(lines) == 1 + len(found)
    assert sum(line.endswith("*") for line in lines) == 1
    assert list(tmp_path.iterdir()) == []
