"""Plans carried out: the same bits as without a plan, and the memory that was promised."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
import programs
import pytest
import random_plans
import stored
import tiny_kernels

from memsched.machine import Machine
from memsched.plan import Plan
from memsched.program import Program
from memsched.referee import verify
from memsched.runtime import Executor, Outcome
from memsched.runtime.flight import Flight
from memsched.stores.blocks import StoredArray
from memsched.stores.reader import Reader

MACHINES = {
    "two tiers": programs.tiny_machine(),
    "three tiers": programs.tiny_machine(host=1 << 20),
}


@pytest.fixture(params=MACHINES, ids=list(MACHINES))
def machine(request: pytest.FixtureRequest) -> Machine:
    return MACHINES[request.param]


def bits_of(arrays: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program with kernels, contents, and what comes out when nothing is planned."""

    program: Program
    kernels: Mapping[str, Callable[..., tuple[jax.Array, ...]]]
    values: Mapping[str, np.ndarray]
    wanted: Mapping[str, np.ndarray]

    @property
    def given(self) -> dict[str, np.ndarray]:
        weights = self.program.of_kind("weight")
        return {name: value for name, value in self.values.items() if name not in weights}


@functools.cache
def case(name: str) -> Case:
    """Compiled once for all tests: one of `programs.TINY`, or a random program by its seed."""
    if name in programs.TINY:
        program = programs.TINY[name]()
    else:
        program = programs.random_program(np.random.default_rng(int(name)), steps=5)
    kernels, values = tiny_kernels.kernels(program), tiny_kernels.given_values(program)
    wanted = {name: values[name] for name in program.of_kind("cache", "feature")}
    wanted |= tiny_kernels.run_directly(program, kernels, values)
    return Case(program, kernels, values, wanted)


def carried_out(
    plan: Plan, case: Case, machine: Machine, path: Path, *, fuse: bool = False
) -> Outcome:
    """Loads the weights, runs the plan, and compares the ledger with verify's account."""
    sources = stored.stored_weights(path / "weights", case.program, case.values)
    with Executor(machine, sources, nvme_dir=path / "nvme", nvme_space_bytes=1 << 20) as executor:
        loader, load = stored.loading(plan.entry, case.program, machine)
        executor.run(load, loader, {}, {})
        outcome = executor.run(plan, case.program, case.kernels, case.given, fuse=fuse)
        peaks = verify(plan, case.program, machine)
        loads = verify(load, loader, machine)
        assert executor.ledger_peak_bytes == {tier: max(peaks[tier], loads[tier]) for tier in peaks}
    return outcome


@pytest.mark.parametrize("name", programs.TINY)
def test_a_naive_plan_gives_the_bits_of_the_steps(
    name: str, machine: Machine, tmp_path: Path
) -> None:
    plan = programs.naive_plan(case(name).program, machine)
    outcome = carried_out(plan, case(name), machine, tmp_path)
    assert bits_of(outcome.outputs) == bits_of(case(name).wanted)


@pytest.mark.parametrize("name", [*programs.TINY, "0", "1"])
def test_random_plans_give_the_bits_of_the_steps(
    name: str, machine: Machine, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for turn in range(5):
        plan = random_plans.random_plan(rng, case(name).program, machine)
        (tmp_path / str(turn)).mkdir()
        outcome = carried_out(plan, case(name), machine, tmp_path / str(turn))
        assert bits_of(outcome.outputs) == bits_of(case(name).wanted), f"plan {turn}"


@pytest.mark.parametrize("name", ["decode", "prefill", "0"])
def test_fused_runs_give_the_bits_of_the_steps(name: str, tmp_path: Path) -> None:
    machine = MACHINES["two tiers"]
    rng = np.random.default_rng(3)
    plan = random_plans.random_plan(rng, case(name).program, machine)
    outcome = carried_out(plan, case(name), machine, tmp_path, fuse=True)
    assert bits_of(outcome.outputs) == bits_of(case(name).wanted)


def slow_sum(layers: int, values: int = 64) -> Case:
    """`x[i+1] = (long work on x[i]) + x[i] / 2 + w[i]`: weights are read when a step ends."""
    program = programs.chain(layers, values * values)

    @jax.jit
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array]:
        square = x.reshape(values, values)
        square = jax.lax.fori_loop(0, 300, lambda _, y: jax.numpy.tanh(y @ y + square), square)
        return (square.reshape(-1) + x / 2 + w,)

    values_of = tiny_kernels.given_values(program)
    kernels = {"layer": layer}
    wanted = tiny_kernels.run_directly(program, kernels, values_of)
    return Case(program, kernels, values_of, wanted)


def one_slot(slow: Case, path: Path) -> dict[str, bytes]:
    """What comes out when all weights pass through one slot."""
    machine = MACHINES["two tiers"]
    plan = programs.naive_plan(slow.program, machine)
    assert set(plan.slots.values()) == {0}
    sources = stored.stored_weights(path / "weights", slow.program, slow.values, 1 << 20)
    with Executor(machine, sources) as executor:
        outcome = executor.run(plan, slow.program, slow.kernels, slow.given)
        return bits_of(outcome.outputs)


@pytest.fixture
def instant_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are there as soon as they are asked for: no reader is saved by a slow disk."""

    def read(self: Reader, name: str, stored: StoredArray, target: np.ndarray) -> Future[None]:
        (block,) = stored.blocks
        with block.path.open("rb") as file:
            file.seek(block.offset)
            target[:] = np.frombuffer(file.read(block.nbytes), np.uint8)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(Reader, "read", read)


@pytest.mark.usefixtures("instant_disk")
def test_a_slot_is_overwritten_only_after_its_last_reader_has_ended(tmp_path: Path) -> None:
    slow = slow_sum(layers=6)
    for _ in range(3):
        assert one_slot(slow, tmp_path) == bits_of(slow.wanted)


@pytest.mark.usefixtures("instant_disk")
def test_without_waiting_for_readers_the_numbers_would_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = slow_sum(layers=6)
    monkeypatch.setattr(Flight, "look", lambda self: None)
    monkeypatch.setattr(Flight, "end", lambda self, number: None)
    monkeypatch.setattr(Flight, "end_all", lambda self: None)
    assert one_slot(slow, tmp_path) != bits_of(slow.wanted)


def test_steady_streaming_takes_no_memory_without_gc(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("steady_child.py"), tmp_path],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rises = np.diff(json.loads(done.stdout), axis=0)
    # An allocator that takes a large piece does it once or twice; what is kept is kept every time.
    steady = np.sort(rises[:, 0])[:-2].sum()
    assert steady < 3 << 18, f"{rises[:, 0].tolist()} B more after every 250 runs"
    assert rises[:, 1].sum() < 100
