"""When steps are said to have ended, and how far that is known."""

import dataclasses
import time
from typing import Any

import pytest

from memsched.plan import Run
from memsched.runtime.flight import Flight
from memsched.runtime.operations import Call, RunOp
from memsched.runtime.record import Record


@dataclasses.dataclass
class Clock:
    """A time that moves when it is told to, or waited for."""

    now: float = 0.0


@dataclasses.dataclass
class Result:
    """Ready at a time; notes whether anyone asked."""

    clock: Clock
    end: float
    asked: bool = False

    def is_ready(self) -> bool:
        self.asked = True
        return self.clock.now >= self.end

    def block_until_ready(self) -> None:
        self.clock.now = max(self.clock.now, self.end)


def step(number: int) -> RunOp:
    call = Call("k", ("x",), ("y",))
    return RunOp(number, Run("s"), (call,), ("x",), ("y",), (), 0, 0, number=number)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: found.now)
    return found


def dispatched(clock: Clock, *ends: float) -> tuple[Flight, Record, list[Any]]:
    """One step after the other, all dispatched at once."""
    record = Record(len(ends))
    flight, results = Flight(record), [Result(clock, end) for end in ends]
    for number, result in enumerate(results):
        flight.began(step(number), (result,), clock.now)
    return flight, record, results


def test_ends_that_are_waited_for_are_known(clock: Clock) -> None:
    flight, record, _ = dispatched(clock, 1.0, 3.0)
    flight.end_all()
    assert [(s.start_s, s.end_s, s.unsure_s) for s in record.spans()] == [(0, 1, 0), (1, 3, 0)]


def test_an_end_between_two_looks_is_unsure_by_the_time_between_them(clock: Clock) -> None:
    flight, record, _ = dispatched(clock, 1.0, 3.0)
    clock.now = 0.75
    flight.look()
    clock.now = 1.5
    flight.look()
    flight.end_all()
    first, second = record.spans()
    # It ended at some time from 0.75 to 1.5, and so began the one behind it.
    assert (first.start_s, first.end_s, first.unsure_s) == (0.0, 1.5, 0.75)
    assert (second.start_s, second.end_s, second.unsure_s) == (1.5, 3.0, 0.75)


def test_two_that_have_ended_before_anyone_looks_are_all_unsure(clock: Clock) -> None:
    flight, record, _ = dispatched(clock, 1.0, 2.0)
    clock.now = 4.0
    flight.end_all()
    assert [(s.end_s, s.unsure_s) for s in record.spans()] == [(4.0, 4.0), (4.0, 4.0)]


def test_a_run_is_not_looked_at_before_another_one_waits_behind_it(clock: Clock) -> None:
    """XLA tells those who asked last first: who asks before the next dispatch hears after it."""
    flight, _, (only,) = dispatched(clock, 1.0)
    flight.look()
    assert not only.asked
    flight, _, (first, second) = dispatched(clock, 1.0, 2.0)
    clock.now = 1.5
    flight.look()
    assert (first.asked, second.asked) == (True, False)
