"""Arrays that are written to disk once and then streamed as if they were weights."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import programs
import pytest
import stored
import tiny_kernels

from memsched.errors import DamagedError, DoesNotFitError, PlanError, StoreError
from memsched.machine import DEVICE, NVME, Machine
from memsched.passes.bridge import bridge
from memsched.passes.compile import compile_plan
from memsched.plan import Copy, Plan
from memsched.referee import verify
from memsched.runtime import Executor
from memsched.stores.blocks import StoredArray

PAGE = 4096
CHAIN = programs.chain(4)
VALUES = tiny_kernels.given_values(CHAIN)
KERNELS = tiny_kernels.kernels(CHAIN)
X = {"x": VALUES["x"]}
SEALED = ("w1", "w3")
NVME_BYTES = 16 * PAGE


def machine(device_bytes: int, tiers: int = 2) -> Machine:
    host = None if tiers == 2 else 1 << 20
    return programs.tiny_machine(device=device_bytes, host=host, nvme=NVME_BYTES)


def sources(folder: Path) -> dict[str, StoredArray]:
    """All weights but those that are sealed, in a file."""
    found = stored.stored_weights(folder / "weights", CHAIN, VALUES)
    return {name: array for name, array in found.items() if name not in SEALED}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Executor]:
    with executor(tmp_path, 1 << 20) as found:
        yield found


def executor(folder: Path, device_bytes: int, tiers: int = 2) -> Executor:
    """One that takes disk space as it needs it."""
    return Executor(
        machine(device_bytes, tiers),
        sources(folder),
        nvme_dir=folder / "spill",
        nvme_space_bytes=None,
    )


def seal(executor: Executor) -> None:
    """Seals what is to be, and spoils the array afterwards."""
    for name in SEALED:
        array = jnp.array(VALUES[name])
        executor.seal(name, array)
        array.delete()


def ran(executor: Executor, plan: Plan) -> np.ndarray:
    """What the plan gives, its weights brought to where it expects them."""
    weights = {name: CHAIN.arrays[name] for name in CHAIN.of_kind("weight")}
    entry = [rest for rest in plan.entry if rest.array in weights]
    loader, load = bridge(executor.held, entry, weights, executor.machine, list(weights))
    executor.run(load, loader, {}, {})
    return np.asarray(executor.run(plan, CHAIN, KERNELS, X).outputs["h3"])


@pytest.mark.parametrize("tiers", [2, 3])
def test_sealed_arrays_stream_as_weights_do_within_the_budget(tiers: int, tmp_path: Path) -> None:
    wanted = tiny_kernels.run_directly(CHAIN, KERNELS, VALUES)["h3"]
    small = 1300 if tiers == 2 else 1200  # the whole chain takes 2,048 B
    plan = compile_plan(CHAIN, machine(small, tiers))
    streamed = {action.array for action in plan.actions if isinstance(action, Copy)}
    assert streamed & set(SEALED)
    with executor(tmp_path, small, tiers) as found:
        seal(found)
        for _ in range(2):
            assert np.array_equal(ran(found, plan), wanted)
        assert found.ledger_peak_bytes[DEVICE] == verify(plan, CHAIN, found.machine)[DEVICE]
        assert found.written_bytes == len(SEALED) * PAGE
    assert list((tmp_path / "spill").iterdir()) == []


def test_space_of_released_arrays_is_used_again(opened: Executor) -> None:
    array = jnp.arange(PAGE, dtype=jnp.float32)  # four pages of the sixteen
    for turn in range(40):
        opened.seal(f"block {turn}", array)
        opened.seal(f"other {turn}", array)
        assert opened.spilled_bytes == 8 * PAGE
        opened.release(f"other {turn}")
        opened.release(f"block {turn}")
    assert opened.spilled_bytes == 0
    assert opened.written_bytes == 80 * 4 * PAGE


def test_a_released_array_leaves_memory_and_its_name_is_free(opened: Executor) -> None:
    plan = compile_plan(CHAIN, opened.machine)
    seal(opened)
    ran(opened, plan)
    assert {rest.array for rest in opened.held} == set(CHAIN.of_kind("weight"))
    opened.release("w1")
    assert "w1" not in {rest.array for rest in opened.held}
    assert opened.resident("w1") is None
    with pytest.raises(PlanError, match="'w1'"):
        opened.run(plan, CHAIN, KERNELS, X)
    opened.seal("w1", jnp.array(VALUES["w1"]))


def test_what_changed_on_disk_is_told(opened: Executor) -> None:
    seal(opened)
    spill = opened._tiers._spill
    assert spill is not None
    with open(f"/proc/self/fd/{spill._file.descriptor}", "r+b", buffering=0) as file:
        file.seek(5)
        file.write(b"\xff")
        os.fsync(file.fileno())
    with pytest.raises(DamagedError, match=r"'w1': the spill file in .* is damaged"):
        ran(opened, compile_plan(CHAIN, opened.machine))


def test_a_name_belongs_to_one_array(opened: Executor) -> None:
    with pytest.raises(PlanError, match="'w0' cannot be sealed: there is a source of this name"):
        opened.seal("w0", jnp.array(VALUES["w0"]))


def test_nothing_is_sealed_without_a_place(tmp_path: Path) -> None:
    with (
        Executor(machine(1 << 20), sources(tmp_path)) as found,
        pytest.raises(PlanError, match="give the executor an nvme_dir"),
    ):
        found.seal("w1", jnp.array(VALUES["w1"]))


def test_space_is_refused_before_anything_is_written(opened: Executor) -> None:
    opened.reserve(NVME_BYTES)
    seal(opened)
    opened.reserve(NVME_BYTES - 2 * PAGE)
    with pytest.raises(DoesNotFitError, match="raise the nvme space to 65,537 B") as caught:
        opened.reserve(NVME_BYTES - 2 * PAGE + 1)
    assert caught.value.smallest == {NVME: NVME_BYTES + 1}


def test_a_fixed_space_does_not_grow(tmp_path: Path) -> None:
    with Executor(
        machine(1 << 20), sources(tmp_path), nvme_dir=tmp_path / "spill", nvme_space_bytes=PAGE
    ) as found:
        found.seal("w1", jnp.array(VALUES["w1"]))
        with pytest.raises(StoreError, match="'w3' takes 4,096 B of the spill file, which has 0 B"):
            found.seal("w3", jnp.array(VALUES["w3"]))
