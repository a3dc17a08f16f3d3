"""Predicted times, against times worked out by hand."""

import numpy as np
import pytest
from programs import array, program, tiny_machine

from memsched.cost import (
    Remembered,
    Roofline,
    Span,
    is_steady,
    lane_of,
    plan_seconds,
    simulate,
    simulate_rounds,
)
from memsched.cost.sharing import FREE, Task, share
from memsched.cost.simulate import _rounds
from memsched.errors import ProgramError
from memsched.machine import Machine
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import Program, Step


class Table:
    """A cost model that takes seconds from a table: steps by their name, copies by their array."""

    def __init__(self, **seconds: float) -> None:
        self.seconds_of = seconds
        self.asked = 0

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        self.asked += 1
        return self.seconds_of[action.step if isinstance(action, Run) else action.array]


TWO = program(
    [
        array("x", "input", 1),
        array("a", "weight", 1),
        array("b", "weight", 1),
        array("h", "activation", 1),
        array("y", "activation", 1),
    ],
    [Step("first", "k", ("x", "a"), ("h",)), Step("second", "k", ("h", "b"), ("y",))],
    ["y"],
)
MACHINE = tiny_machine()
HOME = (Residence("a", "nvme"), Residence("b", "nvme"))


def plan(*actions: Action, entry: tuple[Residence, ...] = HOME) -> Plan:
    return Plan(TWO.digest, MACHINE.digest, (*entry, Residence("x", "device")), actions, entry)


def times(spans: tuple[Span, ...]) -> list[tuple[float, float]]:
    return [(span.start_s, span.end_s) for span in spans]


def test_a_copy_and_a_step_overlap_and_a_step_waits_for_its_arrays() -> None:
    made = plan(
        Copy("a", "nvme", "device"), Copy("b", "nvme", "device"), Run("first"), Run("second")
    )
    spans = simulate(made, TWO, MACHINE, Table(a=2.0, b=3.0, first=1.0, second=4.0))
    # b follows a on the link; the first step waits for a, the second for b.
    assert times(spans) == [(0, 2), (2, 5), (2, 3), (5, 9)]
    assert [span.index for span in spans] == [0, 1, 2, 3]


def test_a_free_waits_for_the_last_reader_and_holds_up_what_is_issued_after_it() -> None:
    made = plan(
        Copy("a", "nvme", "device"),
        Run("first"),
        Free("a", "device"),
        Copy("b", "nvme", "device"),
        Run("second"),
    )
    spans = simulate(made, TWO, MACHINE, Table(a=2.0, b=3.0, first=1.0, second=4.0))
    assert times(spans) == [(0, 2), (2, 3), (3, 3), (3, 6), (6, 10)]


def test_two_links_and_the_compute_work_at_once() -> None:
    made = plan(
        Copy("a", "nvme", "host"),
        Copy("a", "host", "device"),
        Copy("b", "nvme", "host"),
        Copy("b", "host", "device"),
        Run("first"),
        Run("second"),
    )
    spans = simulate(made, TWO, MACHINE, Table(a=2.0, b=1.0, first=5.0, second=1.0))
    assert times(spans) == [(0, 2), (2, 4), (2, 3), (4, 5), (4, 9), (9, 10)]


def test_an_update_waits_for_a_copy_that_still_reads_the_old_values() -> None:
    written = program([array("c", "cache", 1)], [Step("change", "k", (), (), ("c",))], ["c"])
    rests = (Residence("c", "device"),)
    made = Plan(
        written.digest, MACHINE.digest, rests, (Copy("c", "device", "nvme"), Run("change")), rests
    )
    spans = simulate(made, written, MACHINE, Table(c=3.0, change=1.0))
    assert times(spans) == [(0, 3), (3, 4)]


def test_where_nothing_slows_anything_down_sharing_changes_no_time() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        places = range(6)
        some = [_task(rng, places) for _ in range(40)]
        slow = [one._replace(slowdown=1.0) for one in some]
        assert share(slow) == _rounds(slow, 1)[0]


def _task(rng: np.random.Generator, places: range) -> Task:
    """Times are whole, so that sums are exact."""
    if rng.random() < 0.2:
        return Task(FREE, 0.0, (int(rng.choice(places)),), ())
    takes, gives = (
        tuple(map(int, rng.choice(places, int(rng.integers(0, 3)), replace=False)))
        for _ in range(2)
    )
    return Task(int(rng.integers(0, 3)), float(rng.integers(1, 9)), takes, gives)


def test_steps_and_copies_slow_each_other_down_while_they_overlap() -> None:
    # A step of 4 s at half its speed beside a copy of 3 s at a third of its own.
    times = share([Task(0, 4.0, (), (0,), 2.0), Task(1, 3.0, (), (1,), 3.0)])
    # Both are done for 8 s: the step has 4 s behind it, the copy 8/3; the rest goes at full speed.
    assert times == [(0.0, 8.0), (0.0, pytest.approx(8 + 1 / 3))]


def test_blocks_that_are_read_together_end_together() -> None:
    large = Task(1, 6.0, (), (0,), 1.0, blocks=6, depth=4)
    small = Task(1, 1.0, (), (1,), 1.0, blocks=1, depth=4)
    # Four blocks of the first, then its last two with the small one and one of what follows it.
    last = large._replace(gives=(2,))
    assert share([large, small, last]) == [(0.0, 8.0), (4.0, 8.0), (4.0, 13.0)]
    # Alone it would have been there as soon as it is read.
    assert share([large, small]) == [(0.0, 7.0), (4.0, 7.0)]


def test_a_round_of_a_plan_that_follows_itself_is_taken_when_it_has_settled() -> None:
    # The first round finds b there, all later ones wait for the copy of the round before.
    held = (*HOME, Residence("a", "device", offset=0), Residence("b", "device", offset=64))
    made = plan(
        Run("first"), Run("second"), Free("b", "device"), Copy("b", "nvme", "device"), entry=held
    )
    cost = Table(b=3.0, first=1.0, second=1.0)
    ends = [spans[1].end_s for spans in simulate_rounds(made, TWO, MACHINE, cost, 3)]
    assert ends == [2, 6, 10]
    assert is_steady(made, TWO)
    assert plan_seconds(made, TWO, MACHINE, cost) == 4.0


def test_a_plan_that_ends_elsewhere_takes_until_its_last_action() -> None:
    made = Plan(
        TWO.digest,
        MACHINE.digest,
        HOME,
        (Copy("a", "nvme", "device"),),
        (*HOME, Residence("a", "device", offset=0)),
        {0: 0},
    )
    assert not is_steady(made, TWO)
    assert plan_seconds(made, TWO, MACHINE, Table(a=2.5)) == 2.5
    assert plan_seconds(plan(), TWO, MACHINE, Table()) == 0.0


def test_the_roofline_takes_the_slower_of_computing_and_touching() -> None:
    machine = tiny_machine(flops_per_s=100.0, nvme_bytes_per_s=50.0)
    slow = program(
        [array("a", "weight", 25), array("y", "activation", 100_000_000)],
        [Step("count", "k", ("a",), (), (), flops=300), Step("fill", "k", (), ("y",), (), flops=1)],
        ["y"],
    )
    cost = Roofline()
    assert cost.seconds(Run("count"), slow, machine) == pytest.approx(3.0)
    # 400 MB at 1 GB/s.
    assert cost.seconds(Run("fill"), slow, machine) == pytest.approx(0.4)
    assert cost.seconds(Copy("a", "nvme", "device"), slow, machine) == pytest.approx(2.0)
    assert cost.seconds(Free("a", "device"), slow, machine) == 0.0
    with pytest.raises(ProgramError, match="has no link nvme->host"):
        cost.seconds(Copy("a", "nvme", "host"), slow, machine)


def test_a_remembered_cost_is_asked_once_per_action() -> None:
    table = Table(a=2.0)
    cost = Remembered(table)
    assert [cost.seconds(Copy("a", "nvme", "device"), TWO, MACHINE) for _ in range(3)] == [2.0] * 3
    assert table.asked == 1


def test_lanes_are_named_after_their_ends() -> None:
    assert lane_of(Run("first")) == "compute"
    assert lane_of(Copy("a", "host", "device")) == "host->device"
