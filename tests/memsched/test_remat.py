"""What is computed again: plans stay valid and get no slower, and gradients keep their bits."""

import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import TINY, random_program, tiny_machine, training

import memsched
from memsched.cost import Remembered, Roofline, plan_seconds
from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, HOST, Machine
from memsched.passes.budgets import fastest
from memsched.passes.lower.values import value_budgets
from memsched.passes.needs import Needs, read_needs
from memsched.passes.remat import best_order, rematerialised
from memsched.passes.remat_order import repeatable
from memsched.plan import Copy, Plan, Run
from memsched.program import Program
from memsched.referee import verify
from memsched.runtime import Executor
from memsched.runtime.fuse import Kernel

ROWS, WIDTH = 256, 32


@jax.jit
def layer(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.tanh(x @ weight)


@jax.jit
def distance(x: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean((x - target) ** 2)


def loss(weights: list[jax.Array], x: jax.Array, target: jax.Array) -> jax.Array:
    for weight in weights:
        x = layer(x, weight)
    return distance(x, target)


@functools.cache
def toy(layers: int) -> tuple[Program, Mapping[str, Kernel]]:
    """A training step of an MLP: its loss and the gradients of all weights."""
    rows = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * layers
    return memsched.trace(jax.value_and_grad(loss), weights, rows, rows)


def given_to(program: Program) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    specs = [program.arrays[name] for name in program.given]
    return {one.name: rng.normal(size=one.shape).astype(np.float32) / 6 for one in specs}


def plain_plan(needs: Needs) -> Plan:
    return fastest(needs, repeat=True).plan


def needs_of(program: Program, machine: Machine) -> Needs:
    return read_needs(program, machine, Remembered(Roofline()))


def seconds(plan: Plan, program: Program, machine: Machine) -> float:
    return plan_seconds(plan, program, machine, Roofline())


def runs_of(plan: Plan) -> int:
    return sum(isinstance(action, Run) for action in plan.actions)


def moved_out(plan: Plan) -> set[str]:
    return {one.array for one in plan.actions if isinstance(one, Copy) and one.source == DEVICE}


@pytest.mark.parametrize(("layers", "share"), [(3, 0.6), (12, 0.35)])
def test_gradients_keep_their_bits_where_only_computing_again_makes_room(
    layers: int, share: float
) -> None:
    program, kernels = toy(layers)
    budgets = value_budgets(needs_of(program, tiny_machine()))
    budget = int(budgets.spilled + share * (budgets.tight - budgets.spilled))
    machine = tiny_machine(device=budget, nvme=0, flops_per_s=1e9)
    with pytest.raises(DoesNotFitError):
        plain_plan(needs_of(program, machine))
    plan = memsched.compile_plan(program, machine)
    peaks = verify(plan, program, machine)
    assert peaks[DEVICE] <= budget < budgets.tight
    assert runs_of(plan) > len(program.steps)
    given = given_to(program)
    weights = [jnp.array(given[f"weights.{index}"]) for index in range(layers)]
    value, gradients = jax.value_and_grad(loss)(weights, given["x"], given["target"])
    with Executor(machine, {}) as executor:
        outcome = executor.run(plan, program, kernels, given)
        assert executor.ledger_peak_bytes == peaks
    found = [np.asarray(outcome.outputs[name]) for name in program.outputs]
    wanted = sorted(np.asarray(one).tobytes() for one in (value, *gradients))
    assert sorted(one.tobytes() for one in found) == wanted
    assert len(set(wanted)) == layers + 1


@pytest.mark.parametrize("fuse", [False, True])
def test_a_plan_that_moves_out_and_computes_again_is_carried_out(
    tmp_path: Path, *, fuse: bool
) -> None:
    program, kernels = toy(6)
    budgets = value_budgets(needs_of(program, tiny_machine()))
    machine = tiny_machine(
        device=budgets.spilled, nvme=1 << 22, nvme_bytes_per_s=3e7, flops_per_s=1e9
    )
    plan = memsched.compile_plan(program, machine)
    assert moved_out(plan)
    assert runs_of(plan) > len(program.steps)
    given = given_to(program)
    wanted = memsched.execute(
        plain_plan(needs_of(program, tiny_machine(device=1 << 24))),
        program,
        tiny_machine(device=1 << 24),
        kernels,
        {},
        dict(given),
    ).outputs
    with Executor(machine, {}, nvme_dir=tmp_path, nvme_space_bytes=1 << 22) as executor:
        outcome = executor.run(plan, program, kernels, given, fuse=fuse)
    for name in program.outputs:
        assert np.asarray(outcome.outputs[name]).tobytes() == np.asarray(wanted[name]).tobytes()


def test_the_faster_of_moving_out_and_computing_again_is_chosen() -> None:
    program = training(6)
    whole = needs_of(program, tiny_machine())
    budget = whole.weights_bytes + value_budgets(whole).tight - 448
    slow_disk = tiny_machine(device=budget, nvme_bytes_per_s=1e5)
    plan = memsched.compile_plan(program, slow_disk)
    assert not moved_out(plan)
    assert runs_of(plan) > len(program.steps)
    slow_processor = tiny_machine(device=budget, nvme_bytes_per_s=1e9, flops_per_s=1e4)
    plan = memsched.compile_plan(program, slow_processor)
    assert runs_of(plan) == len(program.steps)


@pytest.mark.parametrize("name", [*TINY, *(str(seed) for seed in range(16))])
def test_no_plan_gets_invalid_or_slower(name: str) -> None:
    if name in TINY:
        program = TINY[name]()
    else:
        program = random_program(np.random.default_rng(int(name)), steps=8)
    for device, host in ((900, None), (1500, 900), (2200, None), (3000, None)):
        machine = tiny_machine(device=device, host=host, nvme_bytes_per_s=2e5)
        needs = needs_of(program, machine)
        try:
            before = plain_plan(needs)
        except DoesNotFitError:
            continue
        after = rematerialised(needs, plain_plan)
        peaks = verify(after, program, machine)
        assert all(peaks[tier.name] <= tier.capacity_bytes for tier in machine.tiers)
        assert seconds(after, program, machine) <= seconds(before, program, machine)
        assert host is None or HOST in peaks


def test_a_program_that_is_no_chain_computes_again_what_is_cheap() -> None:
    skip = jax.jit(lambda x, y: jnp.tanh(x + y))

    def forked(weights: list[jax.Array], x: jax.Array, target: jax.Array) -> jax.Array:
        first = layer(x, weights[0])
        left, right = layer(first, weights[1]), layer(first, weights[2])
        return distance(skip(skip(left, right), first), target)

    rows = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * 3
    program, _ = memsched.trace(jax.value_and_grad(forked), weights, rows, rows)
    budgets = value_budgets(needs_of(program, tiny_machine()))
    machine = tiny_machine(device=(budgets.spilled + 3 * budgets.tight) // 4, nvme=0)
    plan = memsched.compile_plan(program, machine)
    assert verify(plan, program, machine)[DEVICE] <= machine.tier(DEVICE).capacity_bytes
    assert runs_of(plan) > len(program.steps)


def test_steps_that_change_something_are_never_run_again() -> None:
    program = TINY["prefill"]()
    names = {program.steps[index].name for index in repeatable(program)}
    assert names == {"rotate"}
    order = best_order(needs_of(training(4), tiny_machine()), 1700)
    assert order is not None
    backward = [index for index in order if index >= 4]
    assert len(backward) == len(set(backward))


def test_where_nothing_fits_the_refusal_names_what_would_do() -> None:
    program = training(3)
    with pytest.raises(DoesNotFitError) as caught:
        memsched.compile_plan(program, tiny_machine(device=512))
    enough = tiny_machine(device=512).with_capacities(caught.value.smallest)
    verify(memsched.compile_plan(program, enough), program, enough)
