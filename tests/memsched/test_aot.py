"""Steps are compiled for accelerators that are not there, where their compilers are installed."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from memsched.aot import Compiler, Workspace, absent_device, with_workspaces
from memsched.aot.target_text import target_text
from memsched.errors import ProgramError
from memsched.machine import Machine
from memsched.profiles import load_machine, write_machine
from memsched.program import Program
from memsched.tracing.function import Kernels, trace

ROOT = Path(__file__).parents[2]
MACHINES = sorted((ROOT / "configs" / "machines").glob("*.toml"))
SM61 = next(path for path in MACHINES if "sm61" in path.name)
HAS_CUDA_COMPILER = importlib.util.find_spec("jax_cuda12_plugin") is not None


@jax.jit
def widen(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Sorts a float32 copy of what it is given: that needs workspace on every device."""
    return jnp.sort((x @ weight).astype(jnp.float32), axis=-1).sum(axis=-1)


def traced(rows: int = 1024) -> tuple[Program, Kernels]:
    def twice(weights: list[jax.Array], x: jax.Array) -> list[jax.Array]:
        return [widen(weight, x) for weight in weights]

    weights = [jax.ShapeDtypeStruct((256, 512), jnp.float32) for _ in range(2)]
    return trace(twice, weights, jax.ShapeDtypeStruct((rows, 256), jnp.float32))


def sm61() -> Machine:
    return load_machine(SM61)


def test_the_text_has_the_figures_of_the_machines_file():
    lines = [line.strip() for line in target_text(sm61()).splitlines()]
    assert "cuda_compute_capability { major: 6 minor: 1 }" in lines
    assert "core_count: 3" in lines
    assert "shared_memory_per_block: 49152" in lines
    assert "memory_bandwidth: 48000000000" in lines
    assert "clock_rate_ghz: 1.582" in lines


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_every_shipped_gpu_says_what_to_compile_for(path: Path, tmp_path: Path):
    machine = load_machine(path)
    assert (machine.target is not None) == (machine.platform == "gpu")
    if machine.platform == "gpu":
        assert target_text(machine).count("cuda_compute_capability") == 1
    write_machine(machine, tmp_path / "copy.toml")
    assert load_machine(tmp_path / "copy.toml") == machine


def test_plans_do_not_depend_on_the_target():
    machine = sm61()
    assert dataclasses.replace(machine, target=None).digest == machine.digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("cores = 3 ", "# "), "target.cores is missing"),
        (("cores = 3 ", "cores = 0 "), "target.cores must be a whole number from 1"),
        (("cores = 3 ", "chip = 3 "), "target.chip is unknown"),
        (("[target]", "[[target]]"), "target must be a table"),
    ],
)
def test_a_target_is_read_strictly(change: tuple[str, str], says: str, tmp_path: Path):
    text = SM61.read_text()
    assert change[0] in text
    (tmp_path / "machine.toml").write_text(text.replace(*change))
    with pytest.raises(ProgramError, match=re.escape(says)):
        load_machine(tmp_path / "machine.toml")


def without_target(machine: Machine) -> Machine:
    return dataclasses.replace(machine, target=None)


def with_strange_capability(machine: Machine) -> Machine:
    assert machine.target is not None
    target = dataclasses.replace(machine.target, compute_capability="six")
    return dataclasses.replace(machine, target=target)


def without_block_limits(machine: Machine) -> Machine:
    compute = dataclasses.replace(machine.compute, threads_per_block=0)
    return dataclasses.replace(machine, compute=compute)


def with_a_tpu(machine: Machine) -> Machine:
    return dataclasses.replace(machine, platform="tpu")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_target, "no table [target]"),
        (with_strange_capability, "like '6.1', found 'six'"),
        (without_block_limits, "needs threads_per_block_limit"),
        (with_a_tpu, "computes on a tpu"),
    ],
)
def test_a_machine_that_cannot_be_compiled_for_is_refused(
    change: Callable[[Machine], Machine], says: str
):
    with pytest.raises(ProgramError, match=re.escape(says)) as refused:
        absent_device(change(sm61()))
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)


def test_each_kernel_is_compiled_once_for_all_programs():
    # The device of this machine stands in for one that is absent.
    asked: list[str] = []
    compiler = Compiler(jax.devices("cpu")[0], asked.append)
    program, kernels = traced()
    first = compiler.workspaces(program, kernels)
    assert asked == ["widen"]
    assert compiler.workspaces(*traced()) == first
    assert asked == ["widen"]
    (other,) = compiler.workspaces(*traced(rows=512))
    assert asked == ["widen", "widen"]
    assert other.estimated_bytes != first[0].estimated_bytes


def test_a_step_that_cannot_be_compiled_is_named_in_one_line():
    @jax.jit
    def foreign(x: jax.Array) -> jax.Array:
        return jax.ffi.ffi_call("no_such_target_here", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    program, kernels = trace(foreign, jax.ShapeDtypeStruct((8,), jnp.float32))
    with pytest.raises(ProgramError, match=r"step '0\.foreign' cannot be compiled for") as refused:
        Compiler(jax.devices("cpu")[0]).workspaces(program, kernels)
    assert "\n" not in str(refused.value)


def test_figures_of_the_compiler_replace_the_estimates():
    program, _ = traced()
    kernel = program.steps[0].kernel
    found = with_workspaces(program, [Workspace(kernel, 1, 12345)])
    assert [step.workspace_bytes for step in found.steps] == [12345, 12345]
    assert found.arrays == program.arrays


@pytest.mark.skipif(HAS_CUDA_COMPILER, reason="the compiler for CUDA is installed")
def test_without_a_compiler_the_extra_is_named():
    with pytest.raises(ProgramError, match="extra 'aot'"):
        absent_device(sm61())


@pytest.mark.skipif(not HAS_CUDA_COMPILER, reason="needs the extra aot")
def test_xla_compiles_for_a_card_that_is_not_there():
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot_child.py"), SM61],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["asked"] == ["widen", "double"]
    # The product must lie somewhere to be sorted; sorting takes a few times as much.
    product_bytes = 1024 * 512 * 4
    assert product_bytes <= found["widen"] <= 4 * product_bytes
    # It is updated in place.
    assert found["double"] == 0
