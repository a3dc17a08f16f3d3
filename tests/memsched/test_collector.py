"""Planning leaves Python's collector of cycles alone, and leaves it as it was."""

import gc
import weakref

import pytest
from programs import chain, tiny_machine

from memsched.collector import uncollected
from memsched.cost import Roofline
from memsched.passes.compile import compile_plan


def test_no_cycles_are_looked_for_meanwhile_and_again_afterwards() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_leaves_it_as_it_was() -> None:
    with pytest.raises(KeyError), uncollected():
        raise KeyError("a")
    assert gc.isenabled()


def test_who_switched_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_planning_remembers_goes_with_it_though_no_cycles_are_looked_for() -> None:
    cost = Roofline()
    seen = weakref.ref(cost)
    gc.disable()
    try:
        assert compile_plan(chain(8), tiny_machine(device=1536), cost).actions
        del cost
        assert seen() is None
    finally:
        gc.enable()
