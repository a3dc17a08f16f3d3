"""Runs one plan thousands of times and prints what it held in between: bytes, and objects.

In a process of its own, where nothing else allocates: `steady_child.py DIRECTORY`.
"""

import gc
import json
import sys
from pathlib import Path

import programs
import psutil
import stored
import tiny_kernels

from memsched.runtime import Executor

# Measured, resident kB more after every 500 runs: 135 1069 86 29 0 0 12 0 8 4 0 0 0 0 0 0 8 0 4 0.
SETTLING, RUNS, TIMES = 2000, 250, 12

machine = programs.tiny_machine()
program = programs.TINY["chain"]()
kernels, values = tiny_kernels.kernels(program), tiny_kernels.given_values(program)
given = {name: values[name] for name in values if name not in program.of_kind("weight")}
plan = programs.naive_plan(program, machine)
sources = stored.stored_weights(Path(sys.argv[1]) / "weights", program, values)
process = psutil.Process()
with Executor(machine, sources) as executor:

    def taken(times: int) -> tuple[int, int]:
        for _ in range(times):
            executor.run(plan, program, kernels, given)
        # The list of all objects is a megabyte, part of which stays: first it, then the bytes.
        objects = len(gc.get_objects())
        return process.memory_info().rss, objects

    gc.collect()
    gc.disable()
    held = [taken(SETTLING), *(taken(RUNS) for _ in range(TIMES))]
print(json.dumps(held))
