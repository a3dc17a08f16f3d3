"""A plan from nothing to its result: opens everything, runs once, closes."""

from collections.abc import Mapping
from pathlib import Path

from memsched.machine import Machine
from memsched.passes.bridge import bridge
from memsched.plan import Plan, Run
from memsched.program import Program
from memsched.runtime.executor import Executor, Outcome
from memsched.runtime.fuse import Kernel
from memsched.runtime.given import Given
from memsched.stores.blocks import StoredArray


def execute(
    plan: Plan,
    program: Program,
    machine: Machine,
    kernels: Mapping[str, Kernel],
    sources: Mapping[str, StoredArray],
    given: Given,
    *,
    nvme_dir: Path | None = None,
    nvme_space_bytes: int = 0,
) -> Outcome:
    """Bring the weights to where the plan expects them, run it once, and close everything.

    Raises:
        MemschedError: as `Executor` and `Executor.run` say.
    """
    weights = program.of_kind("weight")
    entry = [rest for rest in plan.entry if rest.array in weights]
    arrays = {name: program.arrays[name] for name in weights}
    with Executor(
        machine, sources, nvme_dir=nvme_dir, nvme_space_bytes=nvme_space_bytes
    ) as executor:
        loader, load = bridge([], entry, arrays, machine, _by_first_use(plan, program))
        executor.run(load, loader, {}, {})
        return executor.run(plan, program, kernels, given)


def _by_first_use(plan: Plan, program: Program) -> list[str]:
    order: dict[str, None] = {}
    for action in plan.actions:
        names = program.step(action.step).reads if isinstance(action, Run) else (action.array,)
        order |= dict.fromkeys(names)
    return [name for name in order if program.arrays[name].kind == "weight"]
