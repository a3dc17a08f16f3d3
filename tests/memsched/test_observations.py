"""Observations: what a pass says, and the file that collects them."""

import dataclasses
import fcntl
import json
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
from programs import array, program, tiny_machine

from memsched.cost import Span
from memsched.cost import observation_file as files
from memsched.cost.observations import CopyObservation, RunObservation, observe
from memsched.cost.rates import rates_digest
from memsched.errors import DamagedError, StoreError
from memsched.plan import Copy, Free, Plan, Residence, Run
from memsched.program import Step

MACHINE = tiny_machine()
SIZE = 2000  # floats of a weight: 8,000 B, two blocks of 4096
PROGRAM = program(
    [
        array("x", "input", 1),
        *[array(f"{which}{i}", "weight", SIZE) for which in "vw" for i in range(3)],
        *[array(f"h{i}", "activation", 1) for i in range(3)],
    ],
    [
        Step("s0", "k", ("x", "w0"), ("h0",), flops=2 * SIZE),
        Step("s1", "k", ("h0", "w1"), ("h1",), flops=2 * SIZE),
        Step("s2", "k", ("h1", "w2"), ("h2",), flops=2 * SIZE),
    ],
    ["h2"],
)


def plan_that_reads(which: str) -> Plan:
    """Steps take "w0" to "w2"; "v0" to "v2" are what a later plan will take."""
    first, second, third = (f"{which}{i}" for i in range(3))
    actions = (
        Copy(first, "nvme", "device"),
        Copy(second, "nvme", "device"),
        Run("s0"),
        Copy(third, "nvme", "device"),
        Run("s1"),
        Free(second, "device"),
        Run("s2"),
        Copy(second, "nvme", "device"),
    )
    home = tuple(Residence(name, "nvme") for name in (first, second, third))
    return Plan(PROGRAM.digest, MACHINE.digest, home, actions, home)


PLAN = plan_that_reads("v")
TIMES = [(0, 1), (1, 2), (1, 3), (4, 6), (3, 5), (5, 5), (6, 8), (8, 9)]
SPANS = tuple(Span(index, float(a), float(b)) for index, (a, b) in enumerate(TIMES))


def test_equal_steps_go_together_and_apart_by_what_ran_beside_them() -> None:
    runs = [
        one for one in observe(PLAN, PROGRAM, MACHINE, SPANS) if isinstance(one, RunObservation)
    ]
    # s0 ran beside the second copy for half its time, s1 beside the third; s2 alone.
    assert [(one.beside, one.seconds) for one in runs] == [(0.5, (2.0, 2.0)), (0.0, (2.0,))]
    assert {one.features.weight_bytes for one in runs} == {4 * SIZE}
    assert {one.case for one in runs} == {PROGRAM.digest}


def test_steps_that_take_what_came_from_disk_count_as_beside_copies_all_along() -> None:
    runs = [
        one
        for one in observe(plan_that_reads("w"), PROGRAM, MACHINE, SPANS)
        if isinstance(one, RunObservation)
    ]
    assert [(one.beside, one.seconds) for one in runs] == [(1.0, (2.0, 2.0, 2.0))]


def test_a_step_whose_end_nobody_saw_says_nothing() -> None:
    def seconds(unsure_s: float) -> list[float]:
        some = [
            dataclasses.replace(one, unsure_s=unsure_s) if one.index == 4 else one for one in SPANS
        ]
        found = observe(PLAN, PROGRAM, MACHINE, some)
        return [s for one in found if isinstance(one, RunObservation) for s in one.seconds]

    # s1 takes 2 s: a tenth of it may be unknown.
    assert seconds(0.2) == [2.0, 2.0, 2.0]
    assert seconds(0.21) == [2.0, 2.0]


def test_copies_that_follow_each_other_go_together() -> None:
    copies = [
        one for one in observe(PLAN, PROGRAM, MACHINE, SPANS) if isinstance(one, CopyObservation)
    ]
    # The last copy ends after the last step: nobody knows when it really did.
    assert [(one.copies, one.blocks, one.nbytes) for one in copies] == [
        (2, 4, 8 * SIZE),
        (1, 2, 4 * SIZE),
    ]
    assert [(one.seconds, one.beside) for one in copies] == [(2.0, 0.5), (2.0, 0.5)]


def test_what_the_pass_before_still_reads_runs_beside_the_first_steps() -> None:
    found = observe(PLAN, PROGRAM, MACHINE, SPANS, carried_s=1.5)
    runs = [one for one in found if isinstance(one, RunObservation)]
    # s0 from 1 to 3 now meets copies until 2: as before, for the second copy ends there.
    assert [one.beside for one in runs] == [0.5, 0.0]
    longer = observe(PLAN, PROGRAM, MACHINE, SPANS, carried_s=3.0)
    # s0 all the time, s1 the later two of its three seconds.
    assert {one.beside for one in longer if isinstance(one, RunObservation)} == {1.0, 0.5, 0.0}


def test_copies_that_follow_the_pass_before_without_a_gap_say_nothing() -> None:
    def rows(carried_s: float) -> list[int]:
        found = observe(PLAN, PROGRAM, MACHINE, SPANS, carried_s=carried_s)
        return [one.copies for one in found if isinstance(one, CopyObservation)]

    assert rows(0.0) == [2, 1]
    later = [dataclasses.replace(one, start_s=1.0) if one.index == 0 else one for one in SPANS]
    found = observe(PLAN, PROGRAM, MACHINE, later, carried_s=1.0)
    assert [one.copies for one in found if isinstance(one, CopyObservation)] == [1]


def test_a_copy_that_is_overtaken_ends_its_row() -> None:
    """w0 arrives after w1, which was asked for later: w2 still follows them."""
    times = [(0, 4), (1, 2), (4, 5), (4, 6), (5, 6), (6, 6), (6, 8), (8, 9)]
    spans = [Span(index, float(a), float(b)) for index, (a, b) in enumerate(times)]
    found = observe(PLAN, PROGRAM, MACHINE, spans)
    copies = [one for one in found if isinstance(one, CopyObservation)]
    assert [(one.copies, one.seconds) for one in copies] == [(3, 6.0)]


def test_fused_steps_say_nothing() -> None:
    fused = [Span(4, 3.0, 3.0) if span.index == 4 else span for span in SPANS]
    assert observe(PLAN, PROGRAM, MACHINE, fused) == ()


def test_of_many_equal_steps_a_few_are_kept_at_equal_distances() -> None:
    steps = [Step(f"s{i}", "k", ("x",), (f"h{i}",)) for i in range(80)]
    many = program(
        [array("x", "input", 1), *[array(f"h{i}", "activation", 1) for i in range(80)]],
        steps,
        ["h79"],
    )
    plan = Plan(many.digest, MACHINE.digest, (), tuple(Run(step.name) for step in steps), ())
    spans = [Span(i, 100.0 * i, 100.0 * i + 80 - i) for i in range(80)]
    (one,) = observe(plan, many, MACHINE, spans)
    assert isinstance(one, RunObservation)
    assert one.seconds == (6, 16, 26, 36, 46, 56, 66, 76)


def add(file: Path) -> int:
    """Adds what one pass says: four observations."""
    return files.write(file, rates_digest(MACHINE), observe(PLAN, PROGRAM, MACHINE, SPANS))


def test_what_is_appended_is_read_back_for_this_machine_only(tmp_path: Path) -> None:
    file = tmp_path / "new" / "machine.observations.jsonl"
    assert files.read(file, rates_digest(MACHINE)) == ()
    for _ in range(2):
        assert add(file) == 4
    assert files.read(file, rates_digest(MACHINE)) == 2 * observe(PLAN, PROGRAM, MACHINE, SPANS)
    faster = tiny_machine(flops_per_s=1e9)
    assert files.read(file, rates_digest(faster)) == ()
    assert rates_digest(MACHINE.with_capacities({"device": 1})) == rates_digest(MACHINE)


def test_a_full_file_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "full"
    add(file)
    before = file.read_bytes()
    monkeypatch.setattr(files, "MOST_BYTES", 2 * len(before) - 1)
    assert add(file) == 0
    assert file.read_bytes() == before


def test_a_replaced_file_has_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, found = tmp_path / "full", observe(PLAN, PROGRAM, MACHINE, SPANS)
    machine = rates_digest(MACHINE)
    assert files.replace(file, machine, found) == 4
    size = len(file.read_bytes())
    monkeypatch.setattr(files, "MOST_BYTES", 2 * size - 2)
    assert files.replace(file, machine, found) == 3
    assert files.read(file, machine) == found[1:]


def test_what_a_crash_cut_is_left_out_and_written_over(tmp_path: Path) -> None:
    file = tmp_path / "cut"
    add(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert len(files.read(file, rates_digest(MACHINE))) == 3
    add(file)
    assert len(files.read(file, rates_digest(MACHINE))) == 7
    assert file.stat().st_size == len(whole) + whole[:-20].rfind(b"\n") + 1


def test_a_file_that_was_cut_never_grows_beyond_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cut"
    add(file)
    cut = file.read_bytes()[:-20]
    for limit in range(2 * len(cut) - 300, 2 * len(cut) + 50):
        file.write_bytes(cut)
        monkeypatch.setattr(files, "MOST_BYTES", limit)
        added = add(file)
        assert file.stat().st_size <= limit
        assert len(files.read(file, rates_digest(MACHINE))) == 3 + added


def test_who_writes_waits_for_others_and_then_counts_what_they_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, added = tmp_path / "shared", []
    add(file)
    text = file.read_bytes()
    monkeypatch.setattr(files, "MOST_BYTES", 2 * len(text))
    thread = threading.Thread(target=lambda: added.append(add(file)))
    with file.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        other.write(text)
    thread.join()
    assert added == [0]
    assert file.read_bytes() == 2 * text


def test_who_waited_adds_to_the_file_that_has_taken_the_place(tmp_path: Path) -> None:
    file, machine = tmp_path / "shared", rates_digest(MACHINE)
    add(file)
    thread = threading.Thread(target=add, args=(file,))
    with file.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.2)
        files.replace(file, machine, observe(PLAN, PROGRAM, MACHINE, SPANS)[:1])
    thread.join()
    assert len(files.read(file, machine)) == 1 + 4


def test_a_full_file_has_room_again_after_it_shrank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, machine, found = tmp_path / "full", rates_digest(MACHINE), []
    monkeypatch.setattr(files, "MOST_BYTES", 4000)
    files.write(file, "another", observe(PLAN, PROGRAM, MACHINE, SPANS))
    while add(file):
        found += observe(PLAN, PROGRAM, MACHINE, SPANS)
    files.shrink(file, machine)
    left = files.read(file, machine)
    assert 1 < len(left) < len(found)
    assert left == tuple(found[-len(left) :])
    assert file.stat().st_size <= 2000
    assert files.read(file, "another") == ()
    assert add(file) == 4


def test_a_disk_that_takes_a_part_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "observations"
    add(file)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) * 3 // 2, hard))
    try:
        with pytest.raises(StoreError, match="observations: File too large"):
            add(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "binary"
    file.write_bytes(b"\x00\xffgarbage\n" * 1000)
    with pytest.raises(DamagedError, match="line 1: not JSON; delete it"):
        files.read(file, "m")
    file.write_text(f"{run_line()}\n{run_line()[:-20]}\n{run_line()}\n")
    with pytest.raises(DamagedError, match="line 2: not JSON"):
        files.read(file, "m")


def run_line(**values: Any) -> str:
    features = ["k", "float32", 1, 2, 3, 4, 5, 6]
    good = {"v": 1, "machine": "m", "run": features, "case": "c", "beside": 0.5, "seconds": [1.0]}
    return json.dumps(good | values)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[]", "an observation must be an object"),
        (run_line(more=1), "'more' is one too many"),
        (run_line(v=2), "version 2 is unknown"),
        (run_line(seconds=[]), "at least one entry"),
        (run_line(seconds=[0]), "seconds must be a number"),
        (run_line(seconds=[1.0] * 9), "at most 8 entries"),
        (run_line(seconds=[10**400]), "seconds must be a number"),
        (run_line(beside=float("inf")), "beside must be a number"),
        (run_line(beside=2), "beside must be a number from 0 to 1"),
        (run_line(run=["k"]), "run must have 8 entries, found 1"),
        (run_line(run=["k", "text", *[1] * 6]), "dtype 'text' is unknown"),
        (run_line(run=["k", "i4,(", *[1] * 6]), "dtype 'i4,.' is unknown"),
        (run_line(run=["k", "datetime64[D]", *[1] * 6]), "dtype 'datetime64.D.' is unknown"),
        (run_line(run=["k", "float32", 1.5, *[1] * 5]), "rows must be a whole number"),
        (run_line(case="x" * 300), "case must be a short text"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "wrong"
    file.write_text(f"{run_line()}\n{line}\n")
    with pytest.raises(DamagedError, match=f"line 2: .*{says}"):
        files.read(file, "m")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="give another place"):
        add(tmp_path / "file" / "observations")


def test_a_place_is_checked_before_anything_is_written_there(tmp_path: Path) -> None:
    file = tmp_path / "observations"
    files.check_writable(file)
    assert not file.exists()
    add(file)
    files.check_writable(file)
    (tmp_path / "directory").mkdir()
    for place, says in (("directory", "Is a directory; give"), ("no/where", "no such directory")):
        with pytest.raises(StoreError, match=says):
            files.check_writable(tmp_path / place)
