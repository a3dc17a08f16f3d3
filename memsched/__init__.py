"""Plans the memory of a JAX program ahead of time. It knows JAX and no model.

    program, kernels = memsched.trace(function, *shapes)
    plan = memsched.compile_plan(program, machine)
    peaks = memsched.verify(plan, program, machine)
    outcome = memsched.execute(plan, program, machine, kernels, sources, given)

Names are loaded when they are first used: planning needs no JAX, and reading a plan nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memsched.detection import detect
    from memsched.machine import Machine
    from memsched.passes.compile import compile_phases, compile_plan
    from memsched.plan import Plan
    from memsched.plan_json import from_json, to_json
    from memsched.profiles import load_machine
    from memsched.program import ArraySpec, Program, Step
    from memsched.referee import verify
    from memsched.runtime import Executor
    from memsched.runtime.once import execute
    from memsched.stores.saving import save
    from memsched.tracing.array_names import named_arrays
    from memsched.tracing.function import trace

__version__ = "0.2.0"

_HOMES = {
    "ArraySpec": "program",
    "Executor": "runtime",
    "Machine": "machine",
    "Plan": "plan",
    "Program": "program",
    "Step": "program",
    "compile_phases": "passes.compile",
    "compile_plan": "passes.compile",
    "detect": "detection",
    "execute": "runtime.once",
    "from_json": "plan_json",
    "load_machine": "profiles",
    "named_arrays": "tracing.array_names",
    "save": "stores.saving",
    "to_json": "plan_json",
    "trace": "tracing.function",
    "verify": "referee",
}

__all__ = [
    "ArraySpec",
    "Executor",
    "Machine",
    "Plan",
    "Program",
    "Step",
    "__version__",
    "compile_phases",
    "compile_plan",
    "detect",
    "execute",
    "from_json",
    "load_machine",
    "named_arrays",
    "save",
    "to_json",
    "trace",
    "verify",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memsched' has no attribute {name!r}")
    return getattr(importlib.import_module(f"memsched.{_HOMES[name]}"), name)
