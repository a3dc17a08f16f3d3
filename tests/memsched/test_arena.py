"""memsched.stores.arena: memory that comes when touched and goes when told."""

import jax
import numpy as np
import pages
import pytest

from memsched.errors import PlanError, StoreError
from memsched.stores.arena import Arena

MIB = 1 << 20


@pages.known
def test_memory_is_taken_when_touched_and_given_back_when_released() -> None:
    arena = Arena(256 * MIB, 4096)
    slots = [arena.view(offset * MIB, 64 * MIB) for offset in (0, 128)]
    place = slots[0].ctypes.data, 256 * MIB
    assert pages.resident_bytes(*place) == 0
    for slot in slots:
        slot[:] = 7
    assert pages.resident_bytes(*place) == 128 * MIB
    arena.release(0, 64 * MIB)
    assert pages.resident_bytes(*place) == 64 * MIB
    assert not slots[0].any()
    assert np.all(slots[1] == 7)
    del slots, slot
    arena.close()
    # Something else may have come to lie there meanwhile.
    assert pages.resident_bytes(*place) < 16 * MIB


@pytest.mark.parametrize(
    ("nbytes", "boundary"), [(100, 4096), (2 * MIB - 1, 4096), (5 * MIB, 2 * MIB)]
)
def test_it_begins_at_a_page_boundary(nbytes: int, boundary: int) -> None:
    arena = Arena(nbytes, 64)
    assert arena.view(0, nbytes).ctypes.data % boundary == 0
    assert not arena.view(0, nbytes).any()
    arena.close()


def test_views_of_one_place_are_one_memory_and_slots_do_not_touch() -> None:
    arena = Arena(4096, 64)
    arena.view(64, 64)[:] = 1
    arena.view(192, 64)[:] = 2
    wanted = np.repeat(np.array([0, 1, 0, 2, 0], np.uint8), [64, 64, 64, 64, 3840])
    assert np.array_equal(arena.view(0, 4096), wanted)
    arena.close()


def test_release_keeps_pages_that_are_shared_with_neighbours() -> None:
    arena = Arena(3 * 4096, 64)
    whole = arena.view(0, 3 * 4096)
    whole[:] = 9
    arena.release(64, 2 * 4096)
    assert np.array_equal(whole, np.repeat(np.array([9, 0, 9], np.uint8), 4096))
    arena.release(0, 64)
    assert whole[0] == 9
    del whole
    arena.close()


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(-64, 64), (32, 32), (4096, 1), (4032, 65), (64, -64)]
)
def test_a_slot_outside_or_off_the_alignment_is_refused(offset: int, nbytes: int) -> None:
    arena = Arena(4096, 64)
    with pytest.raises(PlanError, match=r"must lie inside, at a multiple of 64 B"):
        arena.view(offset, nbytes)
    with pytest.raises(PlanError, match=r"must lie inside, at a multiple of 64 B"):
        arena.release(offset, nbytes)
    arena.close()


def test_views_outlive_the_arena() -> None:
    arena = Arena(8192, 64)
    view = arena.view(64, 128)
    view[:] = 5
    arena.close()
    assert np.all(view == 5)


def test_jax_reads_the_slot_itself() -> None:
    arena = Arena(1 << 16, 64)
    slot = arena.view(128, 4096)
    array = jax.device_put(slot.view(np.float32), jax.devices("cpu")[0])
    slot.view(np.float32)[:] = 3
    assert float(array[17]) == 3.0


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(StoreError, match="no address space for an arena of"):
        Arena(1 << 60, 64)
