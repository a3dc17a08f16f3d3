"""Golden plans: what the planner makes of five tiny programs on tiny machines, kept as text.

After a change of policy, write them anew and commit them with it, so that the difference can be
read line by line:

    PYTHONPATH=. python tests/memsched/make_golden.py
"""

from collections.abc import Mapping
from pathlib import Path

import programs

from memsched.machine import Machine
from memsched.passes.compile import compile_plan
from memsched.plan import Plan
from memsched.plan_json import to_json

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

# Each too small for everything: weights stream; "training" spills what waits for its second reader.
MACHINES: Mapping[str, Machine] = {
    "blocks": programs.tiny_machine(device=1536, host=2048),
    "chain": programs.tiny_machine(device=1280),
    "decode": programs.tiny_machine(device=2048),
    "prefill": programs.tiny_machine(device=1536, host=1024),
    "training": programs.tiny_machine(device=1280, nvme=4096),
}


def path(name: str) -> Path:
    """Where the plan of a program of `programs.TINY` is kept."""
    return GOLDEN / f"{name}.json"


def planned(name: str) -> Plan:
    """The plan as it is made now."""
    return compile_plan(programs.TINY[name](), MACHINES[name])


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name in MACHINES:
        path(name).write_text(to_json(planned(name)))


if __name__ == "__main__":
    main()
