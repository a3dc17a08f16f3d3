"""The referee refuses what is wrong, and nothing else."""

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from plan_mutations import rebuilt
from programs import array, program, tiny_machine
from quick import least_s, slowness
from symbolic import objections

import memsched
from memsched.errors import PlanError, ProgramError
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import Step
from memsched.referee import verify, verify_hand_over

PACKAGE = Path(memsched.__file__).parent

# Two steps with an array of every kind but embeddings: 256 B each, the feature 40 B (it takes 64).
PROGRAM = program(
    [
        array("x", "input", 64),
        array("w0", "weight", 64),
        array("w1", "weight", 64),
        array("f", "feature", 10),
        array("c", "cache", 64),
        array("h", "activation", 64),
        array("y", "activation", 64),
    ],
    [
        Step("first", "k0", ("x", "w0"), ("h",), ("c",), workspace_bytes=100),
        Step("second", "k1", ("h", "w1", "f"), ("y",)),
    ],
    ["y", "c"],
)
# While "first" runs: 512 in the arena, x 256, c 256, f 64, h 256, workspace 100.
MOST_ON_DEVICE = 1444
MACHINE = tiny_machine(device=MOST_ON_DEVICE, nvme=256, max_array_bytes=256)
HOME = (Residence("w0", "nvme"), Residence("w1", "nvme"), Residence("w1", "device", offset=0))
STAYS = (Residence("c", "device"), Residence("f", "device"))
PLAN = Plan(
    PROGRAM.digest,
    MACHINE.digest,
    (*HOME, *STAYS, Residence("x", "device")),
    (
        Copy("w0", "nvme", "device"),
        Run("first"),
        Free("w0", "device"),
        Free("x", "device"),
        Copy("c", "device", "nvme"),
        Run("second"),
        Free("h", "device"),
        Free("c", "nvme"),
    ),
    (*HOME, *STAYS, Residence("y", "device")),
    {0: 256},
)


def edited(at: int, *new: Action, remove: int = 0, slot: int | None = None) -> Plan:
    """PLAN with actions removed and added at an index; `slot` is for the first of the new."""
    order = list(enumerate(PLAN.actions))
    order[at : at + remove] = [(-1, action) for action in new]
    plan = rebuilt(PLAN, order)
    return plan if slot is None else dataclasses.replace(plan, slots={**plan.slots, at: slot})


def entered(*more: Residence, without: str = "") -> Plan:
    """PLAN with other residences at the entry."""
    rests = tuple(rest for rest in PLAN.entry if rest.array != without)
    return dataclasses.replace(PLAN, entry=(*rests, *more))


def left(*more: Residence, without: str = "") -> Plan:
    """PLAN with other residences at the exit."""
    rests = tuple(rest for rest in PLAN.exit if rest.array != without)
    return dataclasses.replace(PLAN, exit=(*rests, *more))


def test_a_plan_is_accepted_and_its_peaks_are_those_counted_by_hand() -> None:
    assert verify(PLAN, PROGRAM, MACHINE) == {"device": MOST_ON_DEVICE, "nvme": 256}
    assert not objections(PLAN, PROGRAM, MACHINE)


BROKEN: dict[str, tuple[Plan, str]] = {
    "another program": (
        dataclasses.replace(PLAN, program="0" * 16),
        f"the plan was made for program 0000000000000000, this is {PROGRAM.digest}; plan it anew",
    ),
    "slot of a Run": (
        dataclasses.replace(PLAN, slots={0: 256, 1: 0}),
        "slots: 1 is not the index of a Copy; remove it",
    ),
    "slot after the end": (
        dataclasses.replace(PLAN, slots={0: 256, 8: 0}),
        "slots: 8 is not the index of a Copy",
    ),
    "slot before the start": (
        dataclasses.replace(PLAN, slots={0: 256, -4: 0}),
        "slots: -4 is not the index of a Copy",
    ),
    "entry: unknown array": (
        entered(Residence("z", "device")),
        "entry Residence(array='z', tier='device', codec='raw', offset=None): "
        "'z' is not an array of the program",
    ),
    "entry: unknown tier": (entered(Residence("w0", "tape")), "the machine has no tier 'tape'"),
    "entry: unknown codec": (
        entered(Residence("w0", "device", "int8", 256)),
        "codec 'int8' is unknown; steps read ('raw',)",
    ),
    "entry: twice": (
        entered(Residence("x", "device")),
        "entry Residence(array='x', tier='device', codec='raw', offset=None): "
        "'x' is already in 'device'",
    ),
    "entry: made by a step": (
        entered(Residence("h", "device")),
        "entry: 'h' cannot be held here: a step makes it",
    ),
    "entry: weight not at home": (
        entered(Residence("w0", "device", offset=256), without="w0"),
        "entry: weight 'w0' must rest in 'nvme', found in ['device']",
    ),
    "entry: given array missing": (
        entered(without="x"),
        "entry: 'x' must rest in 'device' only, found in []",
    ),
    "entry: given array elsewhere": (
        entered(Residence("c", "nvme"), without="c"),
        "entry: 'c' must rest in 'device' only, found in ['nvme']",
    ),
    "entry: given array twice": (
        entered(Residence("x", "nvme")),
        "entry: 'x' must rest in 'device' only, found in ['device', 'nvme']",
    ),
    "entry: weight without offset": (
        entered(Residence("w0", "device")),
        "offset is None, but 'w0' in 'device' lies in the arena",
    ),
    "entry: offset of an input": (
        entered(Residence("x", "device", offset=256), without="x"),
        "offset is 256, but 'x' in 'device' is placed by its tier",
    ),
    "entry: offset in nvme": (
        entered(Residence("w0", "nvme", offset=0), without="w0"),
        "'nvme' has no arena, so no offset 0",
    ),
    "entry: overlap": (
        entered(Residence("w0", "device", offset=192)),
        "bytes 192 to 448 of 'device' are taken: 'w1' lies at 0 to 256; free it before",
    ),
    "entry: over budget": (
        entered(Residence("w0", "device", offset=512)),
        "entry: 'device' would hold 1,344 B of 1,343 B: arena 768, arrays outside it 576, "
        "workspace 0; plan for less or raise the capacity by 1 B",
    ),
    "run: unknown step": (
        edited(1, Run("third")),
        "action 1 Run(step='third'): the program has no step 'third'",
    ),
    "run: updates twice": (
        edited(5, Run("first")),
        "action 5 Run(step='first'): runs again, but a step that updates ('c',) runs once",
    ),
    "run: input never fetched": (
        edited(0, remove=1),
        "action 0 Run(step='first'): 'w0' is not in 'device'",
    ),
    "run: input freed before": (
        edited(5, Free("h", "device")),
        "action 6 Run(step='second'): 'h' is not in 'device'",
    ),
    "run: result there before": (
        edited(6, Run("second")),
        "action 6 Run(step='second'): 'y' is already in 'device'; free it before",
    ),
    "run: workspace over budget": (
        PLAN,
        "action 1 Run(step='first'): 'device' would hold 1,444 B of 1,443 B: arena 512, "
        "arrays outside it 832, workspace 100; plan for less or raise the capacity by 1 B",
    ),
    "run: results over budget": (
        edited(3, remove=1),
        "action 4 Run(step='second'): 'device' would hold 1,600 B of 1,444 B: arena 512, "
        "arrays outside it 1,088, workspace 0",
    ),
    "copy: unknown array": (
        edited(0, Copy("z", "nvme", "device")),
        "action 0 Copy(array='z', source='nvme', target='device', codec='raw'): "
        "'z' is not an array of the program",
    ),
    "copy: unknown tier": (
        edited(0, Copy("w0", "nvme", "host")),
        "action 0 Copy(array='w0', source='nvme', target='host', codec='raw'): "
        "the machine has no tier 'host'",
    ),
    "copy: unknown codec": (
        edited(0, Copy("w0", "nvme", "device", "int8"), remove=1, slot=256),
        "codec 'int8' is unknown",
    ),
    "copy: no link": (
        edited(4, Copy("c", "device", "device")),
        "action 4 Copy(array='c', source='device', target='device', codec='raw'): "
        "there is no link device->device",
    ),
    "copy: source missing": (
        edited(2, Copy("c", "nvme", "device")),
        "action 2 Copy(array='c', source='nvme', target='device', codec='raw'): "
        "'c' is not in 'nvme'",
    ),
    "copy: target there before": (
        edited(5, Copy("c", "device", "nvme")),
        "'c' is already in 'nvme'; free it before",
    ),
    "copy: weight without offset": (
        dataclasses.replace(PLAN, slots={}),
        "action 0 Copy(array='w0', source='nvme', target='device', codec='raw'): "
        "offset is None, but 'w0' in 'device' lies in the arena",
    ),
    "copy: offset in a file": (
        dataclasses.replace(PLAN, slots={0: 256, 4: 0}),
        "offset is 0, but 'c' in 'nvme' is placed by its tier",
    ),
    "copy: unaligned": (
        dataclasses.replace(PLAN, slots={0: 257}),
        "offset 257 is no multiple of 64 B",
    ),
    "copy: below the arena": (
        dataclasses.replace(PLAN, slots={0: -64}),
        "bytes -64 to 192 are not within the 1,444 B of 'device'",
    ),
    "copy: beyond the arena": (
        dataclasses.replace(PLAN, slots={0: 1216}),
        "bytes 1,216 to 1,472 are not within the 1,444 B of 'device'",
    ),
    "copy: overlaps what is below": (
        dataclasses.replace(PLAN, slots={0: 192}),
        "bytes 192 to 448 of 'device' are taken: 'w1' lies at 0 to 256; free it before",
    ),
    "copy: over budget": (
        edited(5, Copy("h", "device", "nvme")),
        "action 5 Copy(array='h', source='device', target='nvme', codec='raw'): "
        "'nvme' would hold 512 B of 256 B: arena 0, arrays outside it 512, workspace 0",
    ),
    "free: not there": (
        edited(3, Free("w0", "device")),
        "action 3 Free(array='w0', tier='device'): 'w0' is not in 'device'",
    ),
    "free: unknown tier": (
        edited(3, Free("x", "tape")),
        "action 3 Free(array='x', tier='tape'): 'x' is not in 'tape'",
    ),
    "free: weight at home": (
        edited(3, Free("w0", "nvme")),
        "action 3 Free(array='w0', tier='nvme'): weights rest in 'nvme' for ever; remove this Free",
    ),
    "steps: never run": (
        edited(5, remove=2),
        "1 of 2 steps never run: ['second']",
    ),
    "exit: unknown array": (
        left(Residence("z", "device")),
        "exit Residence(array='z', tier='device', codec='raw', offset=None): "
        "'z' is not an array of the program",
    ),
    "exit: unknown tier": (left(Residence("y", "tape")), "the machine has no tier 'tape'"),
    "exit: unknown codec": (
        left(Residence("y", "device", "int8"), without="y"),
        "codec 'int8' is unknown",
    ),
    "exit: not there": (
        left(Residence("w0", "device", offset=256)),
        "exit Residence(array='w0', tier='device', codec='raw', offset=256): "
        "'w0' is not in 'device'",
    ),
    "exit: lies elsewhere": (
        dataclasses.replace(
            PLAN, exit=(*HOME[:2], Residence("w1", "device", offset=256), *PLAN.exit[3:])
        ),
        "it lies at offset 0, not at 256",
    ),
    "exit: listed twice": (
        left(Residence("y", "device")),
        "exit: 'y' is listed twice, in ['device', 'device']",
    ),
    "exit: weight listed twice": (
        left(HOME[2]),
        "exit: 'w1' is listed twice, in ['nvme', 'device', 'device']",
    ),
    "exit: weight not listed at home": (
        left(without="w0"),
        "exit: weight 'w0' must rest in 'nvme', found in []",
    ),
    "exit: output not listed": (
        left(without="y"),
        "exit: 'y' must rest in 'device' only, found in []",
    ),
    "exit: feature not listed": (
        left(without="f"),
        "exit: 'f' must rest in 'device' only, found in []",
    ),
    "exit: output elsewhere too": (
        dataclasses.replace(edited(7, remove=1), exit=(*PLAN.exit, Residence("c", "nvme"))),
        "exit: 'c' must rest in 'device' only, found in ['device', 'nvme']",
    ),
    "exit: done with, but kept": (
        dataclasses.replace(edited(6, remove=1), exit=(*PLAN.exit, Residence("h", "device"))),
        "exit: 'h' cannot be held here: it is no output, so free it",
    ),
    "exit: held, but not listed": (
        edited(6, remove=1),
        "exit: 'h' is still in 'device'; free or list it",
    ),
}
SMALLER = {"entry: over budget": 1343, "run: workspace over budget": 1443}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_plan_that_breaks_one_rule_is_refused_in_these_words(rule: str) -> None:
    plan, says = BROKEN[rule]
    machine = MACHINE.with_capacities({"device": SMALLER.get(rule, MOST_ON_DEVICE)})
    with pytest.raises(PlanError) as refusal:
        verify(plan, PROGRAM, machine)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("offset", range(0, 1600, 64))
def test_a_slot_is_free_exactly_where_nothing_lies(offset: int) -> None:
    pinned = (256, 512, 1088)
    chain = programs.chain(4)
    rests = [Residence(f"w{i}", "nvme") for i in range(4)]
    rests += [Residence(f"w{i}", "device", offset=at) for i, at in enumerate(pinned)]
    runs = [Run(f"layer{i}") for i in range(4)]
    frees = [Free(name, "device") for name in ("x", "h0", "h1", "h2")]
    plan = Plan(
        chain.digest,
        "",
        (*rests, Residence("x", "device")),
        (Copy("w3", "nvme", "device"), *runs, *frees),
        (*rests, Residence("w3", "device", offset=offset), Residence("h3", "device")),
        {0: offset},
    )
    # A range of 256 B shares no byte with another one if it starts 256 B before or after it.
    if all(abs(offset - at) >= 256 for at in pinned):
        verify(plan, chain, tiny_machine())
    else:
        with pytest.raises(PlanError, match=r"are taken: 'w\d' lies at"):
            verify(plan, chain, tiny_machine())


# A cache that is updated twice and read last: versions 0, 1, 2.
TWICE = program(
    [array("c", "cache", 64), array("y", "activation", 64)],
    [
        Step("one", "k0", (), (), ("c",)),
        Step("two", "k1", (), (), ("c",)),
        Step("read", "k2", ("c",), ("y",)),
    ],
    ["y", "c"],
)
SAVE, BRING, DROP = Copy("c", "device", "nvme"), Copy("c", "nvme", "device"), Free("c", "device")
ONE, TWO, READ, FORGET = Run("one"), Run("two"), Run("read"), Free("c", "nvme")


def twice(*actions: Action, left: tuple[Residence, ...] = ()) -> Plan:
    """A plan of TWICE."""
    rests = (Residence("c", "device"),)
    return Plan(TWICE.digest, "", rests, actions, (*rests, Residence("y", "device"), *left))


@pytest.mark.parametrize(
    "plan",
    [
        twice(ONE, TWO, READ),
        twice(ONE, SAVE, DROP, BRING, FORGET, TWO, READ),
        twice(ONE, SAVE, TWO, READ, FORGET),
        twice(ONE, TWO, SAVE, DROP, BRING, READ, FORGET),
    ],
    ids=["stays", "spilled and fetched", "saved for nothing", "spilled before its reader"],
)
def test_a_plan_that_reads_each_version_in_its_turn_is_accepted(plan: Plan) -> None:
    verify(plan, TWICE, tiny_machine())
    assert not objections(plan, TWICE, tiny_machine())


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (
            twice(TWO, ONE, READ),
            "action 0 Run(step='two'): 'c' in 'device' is stale or early: it has version 0, "
            "wanted is version 1",
        ),
        (
            twice(ONE, READ, TWO),
            "action 1 Run(step='read'): 'c' in 'device' is stale or early: it has version 1, "
            "wanted is version 2",
        ),
        (
            twice(SAVE, ONE, DROP, BRING, FORGET, TWO, READ),
            "action 3 Copy(array='c', source='nvme', target='device', codec='raw'): "
            "'c' in 'nvme' is stale or early: it has version 0, wanted is version 1",
        ),
        (
            twice(ONE, SAVE, TWO, READ, left=(Residence("c", "nvme"),)),
            "exit Residence(array='c', tier='nvme', codec='raw', offset=None): "
            "'c' in 'nvme' is stale or early: it has version 1, wanted is version 2",
        ),
    ],
    ids=["updates swapped", "read before an update", "old copy fetched", "old copy at the exit"],
)
def test_a_plan_that_reads_another_version_is_refused(plan: Plan, says: str) -> None:
    with pytest.raises(PlanError) as refusal:
        verify(plan, TWICE, tiny_machine())
    assert says in str(refusal.value)


def test_a_step_may_run_again_while_what_it_reads_is_as_it_was() -> None:
    chain = programs.chain(2)
    rests = (*(Residence(f"w{i}", "nvme") for i in range(2)),)
    fetch = [Copy(f"w{i}", "nvme", "device") for i in range(2)]
    runs = [Run("layer0"), Free("h0", "device"), Run("layer0"), Run("layer1")]
    frees = [Free(name, "device") for name in ("x", "w0", "w1", "h0")]
    plan = Plan(
        chain.digest,
        "",
        (*rests, Residence("x", "device")),
        (*fetch, *runs, *frees),
        (*rests, Residence("h1", "device")),
        {0: 256, 1: 0},
    )
    # The arena, x, h0 and h1.
    assert verify(plan, chain, tiny_machine()) == {"device": 512 + 3 * 256, "nvme": 0}
    assert not objections(plan, chain, tiny_machine())


def test_an_early_copy_counts_from_its_issue_and_pages_once_touched_stay() -> None:
    chain = programs.chain(2)
    machine = tiny_machine()
    plan = programs.naive_plan(chain, machine)
    assert verify(plan, chain, machine)["device"] == 256 + 2 * 256
    moved = dataclasses.replace(plan, slots={**plan.slots, max(plan.slots): 1024})
    assert verify(moved, chain, machine)["device"] == 2 * 256 + 2 * 256
    partly = dataclasses.replace(plan, slots={**plan.slots, max(plan.slots): 64})
    assert verify(partly, chain, machine)["device"] == 256 + 64 + 2 * 256


def test_an_arena_may_reach_to_the_last_byte_of_its_tier() -> None:
    chain = programs.chain(2)
    machine = tiny_machine(device=256 + 2 * 256)
    plan = programs.naive_plan(chain, machine)
    last = dataclasses.replace(plan, slots=dict.fromkeys(plan.slots, 512))
    assert verify(last, chain, machine) == {"device": 768, "nvme": 0}


def test_with_a_host_tier_weights_have_offsets_there_and_none_on_the_device() -> None:
    machine = tiny_machine(host=1 << 16)
    chain = programs.chain(2)
    plan = programs.naive_plan(chain, machine)
    assert verify(plan, chain, machine) == {"device": 256 + 2 * 256, "host": 256, "nvme": 0}
    to_host, to_device = plan.actions[:2]
    assert (to_host, to_device) == (Copy("w0", "nvme", "host"), Copy("w0", "host", "device"))
    with pytest.raises(PlanError, match=r"action 0 .*: offset is None, but 'w0' in 'host' lies in"):
        verify(dataclasses.replace(plan, slots={}), chain, machine)
    with pytest.raises(
        PlanError, match=r"action 1 .*: offset is 0, but 'w0' in 'device' is placed"
    ):
        verify(dataclasses.replace(plan, slots={**plan.slots, 1: 0}), chain, machine)
    with pytest.raises(PlanError, match="there is no link nvme->device"):
        verify(rebuilt(plan, [(-1, Copy("w0", "nvme", "device"))]), chain, machine)


def test_the_largest_array_of_a_tier_is_the_largest() -> None:
    assert verify(PLAN, PROGRAM, tiny_machine(max_array_bytes=256))
    with pytest.raises(PlanError, match=r"256 B in one array, 'device' takes at most 255 B; split"):
        verify(PLAN, PROGRAM, tiny_machine(max_array_bytes=255))


def test_a_weight_at_home_is_not_held_to_the_largest_array() -> None:
    unread = program([array("w", "weight", 1000)], [], [])
    rests = (Residence("w", "nvme"),)
    plan = Plan(unread.digest, "", rests, (), rests)
    assert verify(plan, unread, tiny_machine(nvme=0, max_array_bytes=1)) == {"device": 0, "nvme": 0}


def test_empty_arrays_take_no_place() -> None:
    empty = program([array("a", "weight", 0), array("b", "weight", 64)], [], [])
    home = (Residence("a", "nvme"), Residence("b", "nvme"))
    held = (*home, Residence("b", "device", offset=0), Residence("a", "device", offset=0))
    actions = (Free("a", "device"), Copy("a", "nvme", "device"))
    plan = Plan(
        empty.digest,
        "",
        held,
        actions,
        (*held[:3], held[3]._replace(offset=128)),
        {1: 128},
    )
    assert verify(plan, empty, tiny_machine())["device"] == 256


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([Step("s", "k", (), ("h",))] * 2, "step 's': 2 steps have this name; want one"),
        ([Step("s", "k", ("z",), ("h",))], "step 's': 'z' is not an array of the program"),
        ([Step("s", "k", (), ("z",))], "step 's': 'z' is not an array of the program"),
        ([Step("s", "k", (), (), ("w",))], "step 's': changes 'w', but a weight is only read"),
        ([Step("s", "k", (), ("f",))], "step 's': changes 'f', but a feature is only read"),
        (
            [Step("s", "k", ("c",), (), ("c",))],
            "step 's': has its result 'c' 2 times; want it once",
        ),
    ],
    ids=["same name", "unknown read", "unknown write", "weight", "feature", "read and updated"],
)
def test_a_program_that_no_plan_can_carry_out_is_refused(steps: list[Step], says: str) -> None:
    arrays = [array("w", "weight", 1), array("f", "feature", 1), array("c", "cache", 1)]
    wrong = program([*arrays, array("h", "activation", 1)], steps, [])
    with pytest.raises(ProgramError) as refusal:
        verify(Plan(wrong.digest, "", (), (), ()), wrong, tiny_machine())
    assert says in str(refusal.value)


def test_a_plan_follows_another_if_the_weights_lie_where_they_were_left() -> None:
    weights = PROGRAM.of_kind("weight")
    verify_hand_over(PLAN, PLAN, weights)
    elsewhere = Residence("w1", "device", offset=512)
    with pytest.raises(
        PlanError, match=r"hand-over: .*offset=0\) is left behind but not expected, one of 2 diff"
    ):
        verify_hand_over(PLAN, entered(*HOME[:2], elsewhere, without="w1"), weights)
    with pytest.raises(
        PlanError, match=r"hand-over: .*offset=512\) is expected but not left, one of 1 diff"
    ):
        verify_hand_over(PLAN, entered(elsewhere), weights)


def test_twenty_thousand_actions_take_less_than_a_second() -> None:
    script = """
import time, programs
from memsched.referee import verify
chain, machine = programs.chain(5000), programs.tiny_machine(device=1 << 22)
plan = programs.naive_plan(chain, machine)
start = time.process_time()
verify(plan, chain, machine)
print(len(plan.actions), time.process_time() - start)
"""
    # In a process of its own: here every call checks its annotations, which takes ten times longer.
    paths = [str(Path(programs.__file__).parent), str(PACKAGE.parent)]

    def verified() -> float:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=True,
        )
        actions, seconds = done.stdout.split()
        assert int(actions) == 20_000
        return float(seconds) / slowness()

    assert least_s(verified, 1.0) < 1.0


def test_the_referee_knows_neither_the_planner_nor_the_runtime_nor_jax() -> None:
    tree = ast.parse((PACKAGE / "referee.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    ours = {module for module in modules if module and module.startswith("memsched")}
    assert ours == {f"memsched.{name}" for name in ("errors", "machine", "plan", "program")}
    assert (modules - ours) | names == {
        "bisect",
        "collections",
        "collections.abc",
        "dataclasses",
        "typing",
    }
