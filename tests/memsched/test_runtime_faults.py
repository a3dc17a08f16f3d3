"""What goes wrong while a plan is carried out is told, and nothing is left behind."""

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
import stored
import tiny_kernels

from memsched.errors import DamagedError, PlanError, ProgramError, StoreError
from memsched.machine import DEVICE, NVME
from memsched.plan import Copy, Free, Plan
from memsched.runtime import Executor
from memsched.stores.blocks import StoredArray

MACHINE = programs.tiny_machine()
CHAIN = programs.chain(3)
VALUES = tiny_kernels.given_values(CHAIN)
KERNELS = tiny_kernels.kernels(CHAIN)
PLAN = programs.naive_plan(CHAIN, MACHINE)
X = {"x": VALUES["x"]}
# Run("layer1"), and the Copy of w1 before it.
RUN1, COPY1 = 5, 4


def test_the_places_in_the_plan_are_as_said() -> None:
    assert str(PLAN.actions[RUN1]) == "Run(step='layer1')"
    assert str(PLAN.actions[COPY1]).startswith("Copy(array='w1'")


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, StoredArray]:
    return stored.stored_weights(tmp_path / "weights", CHAIN, VALUES)


def notes(error: BaseException) -> str:
    return " ".join(error.__notes__)


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("memsched")]


def still_works(executor: Executor) -> None:
    wanted = tiny_kernels.run_directly(CHAIN, KERNELS, VALUES)["h2"]
    outcome = executor.run(PLAN, CHAIN, KERNELS, X)
    np.testing.assert_array_equal(np.asarray(outcome.outputs["h2"]), wanted)


class Failing:
    """A kernel whose second call fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return KERNELS["layer"](x, w)


def test_a_failing_step_is_told_and_the_executor_can_be_used_on(
    sources: dict[str, StoredArray],
) -> None:
    error = ZeroDivisionError("in the step")
    with Executor(MACHINE, sources) as executor:
        with pytest.raises(ZeroDivisionError, match="in the step") as caught:
            executor.run(PLAN, CHAIN, {"layer": Failing(error)}, X)
        assert caught.value is error
        assert notes(error) == f"while carrying out action {RUN1} Run(step='layer1')"
        assert executor.held == ()
        still_works(executor)


def test_a_step_that_fails_while_it_runs_is_told(sources: dict[str, StoredArray]) -> None:
    def broken(x: np.ndarray) -> np.ndarray:
        raise ValueError("far from the caller")

    @jax.jit
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        return (jax.pure_callback(broken, jax.ShapeDtypeStruct(x.shape, x.dtype), x + w),)

    with Executor(MACHINE, sources) as executor:
        with pytest.raises(Exception, match="far from the caller") as caught:
            executor.run(PLAN, CHAIN, {"layer": layer}, X)
        assert "Run(step='layer0')" in notes(caught.value)
        still_works(executor)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, 400)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("spoil", [flip, cut, remove])
@pytest.mark.parametrize("when", ["before the first run", "between two runs"])
def test_damaged_weights_are_never_computed_with(
    spoil: Callable[[Path], None], when: str, sources: dict[str, StoredArray], tmp_path: Path
) -> None:
    with Executor(MACHINE, sources) as executor:
        if when == "between two runs":
            still_works(executor)
        spoil(tmp_path / "weights")
        with pytest.raises(DamagedError, match=r"array 'w[01]'") as caught:
            executor.run(PLAN, CHAIN, KERNELS, X)
        assert "Copy(array='w" in notes(caught.value)
    assert our_threads() == []


def test_a_missing_file_is_told_at_the_opening(
    sources: dict[str, StoredArray], tmp_path: Path
) -> None:
    (tmp_path / "weights").unlink()
    with pytest.raises(DamagedError, match="is missing"):
        Executor(MACHINE, sources)
    assert our_threads() == []


def spilling() -> Plan:
    """The naive plan, with h0 moved out and back before its reader."""
    moves = (Copy("h0", DEVICE, NVME), Free("h0", DEVICE), Copy("h0", NVME, DEVICE))
    actions = (*PLAN.actions[:COPY1], *moves, Free("h0", NVME), *PLAN.actions[COPY1:])
    slots = {index + (4 if index >= COPY1 else 0): at for index, at in PLAN.slots.items()}
    return dataclasses.replace(PLAN, actions=actions, slots=slots)


def test_a_full_spill_file_is_told(sources: dict[str, StoredArray], tmp_path: Path) -> None:
    with Executor(MACHINE, sources, nvme_dir=tmp_path / "spill", nvme_space_bytes=0) as executor:
        with pytest.raises(StoreError, match="'h0' takes 4,096 B of the spill file") as caught:
            executor.run(spilling(), CHAIN, KERNELS, X)
        assert f"action {COPY1} Copy(array='h0', source='device', target='nvme'" in notes(
            caught.value
        )
        still_works(executor)
    assert our_threads() == []


def test_spilling_needs_a_directory(sources: dict[str, StoredArray]) -> None:
    with (
        Executor(MACHINE, sources) as executor,
        pytest.raises(PlanError, match=r"'h0' by way of a file: give the executor an nvme_dir"),
    ):
        executor.run(spilling(), CHAIN, KERNELS, X)


def test_ctrl_c_leaves_no_thread_and_no_file(
    sources: dict[str, StoredArray], tmp_path: Path
) -> None:
    executor = Executor(MACHINE, sources, nvme_dir=tmp_path / "spill", nvme_space_bytes=1 << 16)
    with pytest.raises(KeyboardInterrupt):
        executor.run(PLAN, CHAIN, {"layer": Failing(KeyboardInterrupt())}, X)
    assert our_threads() == []
    assert list((tmp_path / "spill").iterdir()) == []
    with pytest.raises(PlanError, match="closed"):
        executor.run(PLAN, CHAIN, KERNELS, X)
    executor.close()


def returning(result: Callable[[jax.Array], object]) -> Callable[..., object]:
    return lambda x, w: result(x)


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (lambda x: x * 2, "must return a tuple of 1 arrays"),
        (lambda x: (x, x), "must return a tuple of 1 arrays"),
        (lambda x: (x[:5],), r"returned \(5,\) float32 for 'h0', wanted \(64,\) float32"),
        (lambda x: (x.astype("int32"),), "int32 for 'h0', wanted"),
        (lambda x: (x,), "one of its inputs as 'h0'"),
    ],
    ids=["no tuple", "too many", "shape", "dtype", "its input"],
)
def test_a_kernel_that_is_not_what_was_planned_is_refused(
    result: Callable[[jax.Array], object], says: str, sources: dict[str, StoredArray]
) -> None:
    with Executor(MACHINE, sources) as executor:
        with pytest.raises(PlanError, match=says):
            executor.run(PLAN, CHAIN, {"layer": returning(result)}, X)
        still_works(executor)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "input 'x' is missing"),
        ({"x": np.zeros(63, np.float32)}, r"'x' is \(63,\) float32, planned for \(64,\)"),
        ({"x": np.zeros(64, np.int32)}, "int32"),
        (X | {"w0": VALUES["w0"]}, "'w0' is not an array that the plan takes"),
    ],
    ids=["missing", "shape", "dtype", "surplus"],
)
def test_what_is_given_is_checked(
    given: dict[str, np.ndarray], says: str, sources: dict[str, StoredArray]
) -> None:
    with Executor(MACHINE, sources) as executor, pytest.raises(ProgramError, match=says):
        executor.run(PLAN, CHAIN, KERNELS, given)


def test_an_input_that_was_used_up_is_told(sources: dict[str, StoredArray]) -> None:
    x = jax.device_put(VALUES["x"], jax.local_devices()[0])
    with Executor(MACHINE, sources) as executor:
        executor.run(PLAN, CHAIN, KERNELS, {"x": x})
        with pytest.raises(ProgramError, match="'x' was deleted: an earlier run took it over"):
            executor.run(PLAN, CHAIN, KERNELS, {"x": x})


def without(name: str, sources: dict[str, StoredArray]) -> dict[str, StoredArray]:
    return {key: value for key, value in sources.items() if key != name}


def test_missing_or_wrong_sources_are_told(sources: dict[str, StoredArray]) -> None:
    with (
        Executor(MACHINE, without("w1", sources)) as executor,
        pytest.raises(PlanError, match="'w1' is not among the 2 sources"),
    ):
        executor.run(PLAN, CHAIN, KERNELS, X)
    block = sources["w1"].blocks[0]
    short = sources | {"w1": StoredArray(block.used_bytes, (block,))}
    with (
        Executor(MACHINE, short) as executor,
        pytest.raises(PlanError, match="its source has 96 B, wanted 256 B"),
    ):
        executor.run(PLAN, CHAIN, KERNELS, X)


def test_a_missing_kernel_and_a_broken_plan_are_told(sources: dict[str, StoredArray]) -> None:
    with Executor(MACHINE, sources) as executor:
        with pytest.raises(PlanError, match="kernel 'layer' is not among the 0"):
            executor.run(PLAN, CHAIN, {}, X)
        broken = dataclasses.replace(PLAN, exit=PLAN.exit[1:])
        with pytest.raises(PlanError, match="weight 'w0' must rest in 'nvme'"):
            executor.run(broken, CHAIN, KERNELS, X)
        still_works(executor)
