"""What lies where while plans are carried out, and who owns it."""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pages
import programs
import pytest
import random_plans
import stored
import tiny_kernels

from memsched.errors import PlanError
from memsched.machine import DEVICE, HOST, NVME, Machine
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import Program, Step
from memsched.referee import verify
from memsched.runtime import Executor, execute
from memsched.runtime.ranges import size, union, without
from memsched.stores.blocks import StoredArray
from memsched.stores.reader import Reader

TWO, THREE = programs.tiny_machine(), programs.tiny_machine(host=1 << 20)
CHAIN = programs.chain(2)
VALUES = tiny_kernels.given_values(CHAIN)
KERNELS = tiny_kernels.kernels(CHAIN)
X = {"x": VALUES["x"]}


def rests(*places: tuple[str, int | None], tier: str = DEVICE) -> tuple[Residence, ...]:
    """All weights of the chain in nvme, and some places elsewhere."""
    return (
        *(Residence(name, NVME) for name in CHAIN.of_kind("weight")),
        *(Residence(name, tier, offset=offset) for name, offset in places),
    )


def plan_of(
    entry: tuple[Residence, ...],
    actions: list[Action],
    leave: tuple[Residence, ...],
    slots: Mapping[int, int],
) -> Plan:
    """For the chain on either machine: `verify` does not compare the machine's digest."""
    given = (Residence("x", DEVICE),)
    made = (Residence("h1", DEVICE),)
    return Plan(CHAIN.digest, TWO.digest, entry + given, tuple(actions), leave + made, slots)


# w0 stays; w1 is fetched, and fetched for the next time behind the last step.
STEADY = plan_of(
    rests(("w0", 0), ("w1", 256)),
    [
        Run("layer0"),
        Free("x", DEVICE),
        Run("layer1"),
        Free("h0", DEVICE),
        Free("w1", DEVICE),
        Copy("w1", NVME, DEVICE),
    ],
    rests(("w0", 0), ("w1", 256)),
    {5: 256},
)


def wanted() -> np.ndarray:
    return tiny_kernels.run_directly(CHAIN, KERNELS, VALUES)["h1"]


def loaded(executor: Executor, plan: Plan) -> None:
    loader, load = stored.loading(plan.entry, CHAIN, executor.machine)
    executor.run(load, loader, {}, {})


def test_weights_stay_from_plan_to_plan_and_only_what_streams_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, read = [], Reader.read

    def noted(self: Reader, name: str, stored: StoredArray, target: np.ndarray) -> Future[None]:
        names.append(name)
        return read(self, name, stored, target)

    monkeypatch.setattr(Reader, "read", noted)
    sources = stored.stored_weights(tmp_path / "weights", CHAIN, VALUES)
    with Executor(TWO, sources) as executor:
        loaded(executor, STEADY)
        for _ in range(3):
            outcome = executor.run(STEADY, CHAIN, KERNELS, X)
            np.testing.assert_array_equal(np.asarray(outcome.outputs["h1"]), wanted())
        assert executor.held == (
            Residence("w0", DEVICE, offset=0),
            Residence("w1", DEVICE, offset=256),
        )
    assert names == ["w0", "w1", "w1", "w1", "w1"]
    assert executor.read_bytes >= 4 * 256


def test_a_plan_that_expects_weights_elsewhere_is_refused(tmp_path: Path) -> None:
    sources = stored.stored_weights(tmp_path / "weights", CHAIN, VALUES)
    with Executor(TWO, sources) as executor:
        with pytest.raises(PlanError, match=r"'w0' in 'device' at offset 0 is missing.*bridge"):
            executor.run(STEADY, CHAIN, KERNELS, X)
        loaded(executor, STEADY)
        naive = programs.naive_plan(CHAIN, TWO)
        with pytest.raises(PlanError, match="'w0' in 'device' at offset 0 lies there"):
            executor.run(naive, CHAIN, KERNELS, X)
        outcome = executor.run(STEADY, CHAIN, KERNELS, X)
        np.testing.assert_array_equal(np.asarray(outcome.outputs["h1"]), wanted())


def other_program(offset: int) -> tuple[Program, Plan]:
    """Brings a weight of another program, and no more."""
    program = Program({"other": programs.array("other", "weight", 64)}, (), ())
    home, place = Residence("other", NVME), Residence("other", DEVICE, offset=offset)
    fetch = (Copy("other", NVME, DEVICE),)
    return program, Plan(program.digest, TWO.digest, (home,), fetch, (home, place), {0: offset})


def test_weights_of_another_program_stay_where_they_are_not_in_the_way(tmp_path: Path) -> None:
    sources = stored.stored_weights(tmp_path / "weights", CHAIN, VALUES)
    sources["other"] = sources["w1"]
    naive = programs.naive_plan(CHAIN, TWO)
    peak = verify(naive, CHAIN, TWO)[DEVICE]
    for offset, capacity, says in [
        (256, peak + 256, None),
        (0, peak + 256, "'other' of another program lies in 'device' at offset 0"),
        (256, peak + 255, "would hold 1,024 B of 1,023 B"),
    ]:
        machine = TWO.with_capacities({DEVICE: capacity})
        with Executor(machine, sources) as executor:
            program, fetch = other_program(offset)
            executor.run(fetch, program, {}, {})
            if says is None:
                outcome = executor.run(naive, CHAIN, KERNELS, X)
                np.testing.assert_array_equal(np.asarray(outcome.outputs["h1"]), wanted())
                assert executor.held == (Residence("other", DEVICE, offset=256),)
                assert executor.ledger_peak_bytes[DEVICE] == peak + 256
            else:
                with pytest.raises(PlanError, match=says):
                    executor.run(naive, CHAIN, KERNELS, X)


def test_on_two_tiers_steps_read_the_slot_itself(tmp_path: Path) -> None:
    taken = []

    def spying(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        taken.append(w.unsafe_buffer_pointer())
        return KERNELS["layer"](x, w)

    sources = stored.stored_weights(tmp_path / "weights", CHAIN, VALUES)
    with Executor(TWO, sources) as executor:
        loaded(executor, STEADY)
        for _ in range(2):
            executor.run(STEADY, CHAIN, {"layer": spying}, X)
    assert taken[:2] == taken[2:]
    assert taken[1] - taken[0] == 256


def test_on_three_tiers_the_device_has_a_copy_of_its_own(tmp_path: Path) -> None:
    """Both weights pass through one slot of the host before the first step runs."""
    actions: list[Action] = []
    for name in ("w0", "w1"):
        actions += [Copy(name, NVME, HOST), Copy(name, HOST, DEVICE), Free(name, HOST)]
    actions += [Run("layer0"), Run("layer1")]
    actions += [Free(name, DEVICE) for name in ("x", "h0", "w0", "w1")]
    plan = plan_of(rests(), actions, rests(), {0: 0, 3: 0})
    sources = stored.stored_weights(tmp_path / "weights", CHAIN, VALUES)
    with Executor(THREE, sources) as executor:
        for _ in range(3):
            outcome = executor.run(plan, CHAIN, KERNELS, X)
            np.testing.assert_array_equal(np.asarray(outcome.outputs["h1"]), wanted())


def updating() -> tuple[Program, Plan]:
    arrays = [programs.array("cache", "cache", 64), programs.array("x", "input", 8)]
    program = programs.program(arrays, [Step("add", "add", ("x",), (), ("cache",))], ["cache"])
    given = (Residence("cache", DEVICE), Residence("x", DEVICE))
    actions = (Run("add"), Free("x", DEVICE))
    return program, Plan(program.digest, TWO.digest, given, actions, given[:1])


@pytest.mark.parametrize("committed", [False, True])
def test_a_given_cache_is_updated_where_it_lies(committed: bool) -> None:
    program, plan = updating()
    add = jax.jit(lambda x, cache: (cache + x.sum(),), donate_argnums=1)
    cache = jax.numpy.zeros(64) + 1
    if committed:
        cache = jax.device_put(cache, jax.local_devices()[0])
    with Executor(TWO, {}) as executor:
        place = cache.unsafe_buffer_pointer()
        outputs = {"cache": cache}
        for _ in range(3):
            x = np.ones(8, np.float32)
            outputs = executor.run(plan, program, {"add": add}, outputs | {"x": x}).outputs
        assert outputs["cache"].unsafe_buffer_pointer() == place
        assert float(outputs["cache"][0]) == 25
        assert x.sum() == 8


def test_given_numpy_arrays_are_copied(tmp_path: Path) -> None:
    program, plan = updating()
    add = jax.jit(lambda x, cache: (cache + x.sum(),), donate_argnums=1)
    aligned = np.frombuffer(np.zeros(512, np.uint8), np.uint8)
    start = -aligned.ctypes.data % 64
    cache = aligned[start : start + 256].view(np.float32)
    with Executor(TWO, {}) as executor:
        given = {"cache": cache, "x": np.ones(8, np.float32)}
        output = executor.run(plan, program, {"add": add}, given).outputs["cache"]
        cache[:] = 7
        assert float(output[0]) == 8


def test_a_run_waits_only_for_the_arrays_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """w1 arrives only after the first step was called: waiting for it before would be for ever."""
    called, read = threading.Event(), Reader.read
    results = []

    def late(self: Reader, name: str, stored: StoredArray, target: np.ndarray) -> Future[None]:
        future = read(self, name, stored, target)
        if name == "w1":
            future.result()
            future = Future()
            results.append(future)
        return future

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        made = KERNELS["layer"](x, w)
        if not called.is_set():
            called.set()
            results[0].set_result(None)
        return made

    monkeypatch.setattr(Reader, "read", late)
    actions = [Copy("w0", NVME, DEVICE), Copy("w1", NVME, DEVICE), Run("layer0"), Run("layer1")]
    actions += [Free(name, DEVICE) for name in ("x", "h0", "w0", "w1")]
    plan = plan_of(rests(), actions, rests(), {0: 0, 1: 256})
    sources = stored.stored_weights(tmp_path / "weights", CHAIN, VALUES)
    with Executor(TWO, sources) as executor:
        outcome = executor.run(plan, CHAIN, {"layer": layer}, X)
    np.testing.assert_array_equal(np.asarray(outcome.outputs["h1"]), wanted())
    spans = outcome.spans
    assert [span.index for span in spans] == list(range(len(actions)))
    assert all(0 <= span.start_s <= span.end_s for span in spans)
    # The second Copy ended when the first step had been called; the second step came after both.
    assert spans[0].end_s <= spans[2].start_s <= spans[1].end_s <= spans[3].start_s
    assert spans[2].end_s <= spans[3].end_s


def test_a_plan_says_how_long_the_one_before_went_on_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fetched behind the last step arrives while the next plan's first step runs."""
    gate, read = threading.Event(), Reader.read

    def late(self: Reader, name: str, stored: StoredArray, target: np.ndarray) -> Future[None]:
        future: Future[None] = Future()
        whole = read(self, name, stored, target)

        def arrive() -> None:
            gate.wait()
            future.set_result(whole.result())

        threading.Thread(target=arrive, daemon=True).start()
        return future

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        return KERNELS["layer"](x, w)

    def opening(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        time.sleep(0.05)
        gate.set()
        return layer(x, w)

    with Executor(TWO, stored.stored_weights(tmp_path / "weights", CHAIN, VALUES)) as executor:
        loader, load = stored.loading(STEADY.entry, CHAIN, TWO)
        assert executor.run(load, loader, {}, {}).carried_s == 0.0
        monkeypatch.setattr(Reader, "read", late)
        executor.run(STEADY, CHAIN, {"layer": layer}, X)
        monkeypatch.setattr(Reader, "read", read)
        second = executor.run(STEADY, CHAIN, {"layer": opening}, X)
    assert second.carried_s >= 0.05
    own = second.spans[5]  # waits its turn, or has ended before anybody wrote the other's end down
    assert own.start_s >= min(second.carried_s, own.end_s)


@pages.known
def test_pages_that_the_next_plan_does_not_use_are_given_back(tmp_path: Path) -> None:
    values = 2 << 20
    program = programs.chain(1, values)
    contents = {"w0": np.ones(values, np.float32)}
    sources = stored.stored_weights(tmp_path / "weights", program, contents, 4 << 20)
    machine = programs.tiny_machine(device=1 << 30)
    weights = Program({"w0": program.arrays["w0"]}, (), ())
    here, there = Residence("w0", NVME), Residence("w0", DEVICE, offset=0)
    fetch = Plan(
        weights.digest, machine.digest, (here,), (Copy("w0", NVME, DEVICE),), (here, there), {0: 0}
    )
    drop = Plan(weights.digest, machine.digest, (here, there), (Free("w0", DEVICE),), (here,))
    nothing = Plan(weights.digest, machine.digest, (here,), (), (here,))
    with Executor(machine, sources) as executor:
        executor.run(fetch, weights, {}, {})
        place = executor._tiers._arena.view(0, 4 * values).ctypes.data, 4 * values
        executor.run(drop, weights, {}, {})
        assert pages.resident_bytes(*place) == 4 * values
        executor.run(nothing, weights, {}, {})
        assert pages.resident_bytes(*place) == 0
        executor.run(fetch, weights, {}, {})


def test_ranges_are_sets_of_bytes() -> None:
    """Against sets of single bytes."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        sides = [
            [tuple(sorted(pair)) for pair in rng.integers(0, 30, (rng.integers(0, 5), 2)).tolist()]
            for _ in range(2)
        ]
        bytes_of = [{byte for low, high in side for byte in range(low, high)} for side in sides]
        left = without(*sides)
        assert {byte for low, high in left for byte in range(low, high)} == (
            bytes_of[0] - bytes_of[1]
        )
        assert size(union(sides[0])) == len(bytes_of[0])


@pytest.mark.parametrize("machine", [TWO, THREE], ids=["two tiers", "three tiers"])
def test_execute_loads_what_a_plan_expects(machine: Machine, tmp_path: Path) -> None:
    sources = stored.stored_weights(tmp_path / "weights", CHAIN, VALUES)
    drawn = (
        random_plans.random_plan(np.random.default_rng(seed), CHAIN, machine) for seed in range(99)
    )
    plan = next(plan for plan in drawn if ("w1", DEVICE) in [(r.array, r.tier) for r in plan.entry])
    outcome = execute(
        plan, CHAIN, machine, KERNELS, sources, X, nvme_dir=tmp_path, nvme_space_bytes=1 << 16
    )
    np.testing.assert_array_equal(np.asarray(outcome.outputs["h1"]), wanted())
