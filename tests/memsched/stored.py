"""Weights in a file, and the plan that brings them to where another plan expects them."""

from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import numpy as np

from memsched.machine import DEVICE, HOST, NVME, Machine, rounded
from memsched.plan import Action, Copy, Free, Plan, Residence
from memsched.program import Program
from memsched.stores.blocks import Block, StoredArray

BLOCK_BYTES = 96


def stored_weights(
    path: Path, program: Program, values: Mapping[str, np.ndarray], block_bytes: int = BLOCK_BYTES
) -> dict[str, StoredArray]:
    """All weights one after the other in a file, in small blocks with checksums."""
    sources = {}
    with path.open("wb") as file:
        for name in program.of_kind("weight"):
            content = values[name].tobytes()
            blocks = []
            for start in range(0, len(content), block_bytes):
                part = content[start : start + block_bytes]
                blocks.append(Block(path, file.tell(), len(part), len(part), True))
                file.write(part)
                file.write(google_crc32c.value(part).to_bytes(4, "little"))
            sources[name] = StoredArray(len(content), tuple(blocks))
    return sources


def loading(
    entry: tuple[Residence, ...], program: Program, machine: Machine
) -> tuple[Program, Plan]:
    """From all weights in "nvme" to a plan's entry. It wants room for one array more."""
    weights = [rest for rest in entry if program.arrays[rest.array].kind == "weight"]
    there = {(rest.array, rest.tier): rest for rest in weights}
    staging = max(
        (
            rest.offset + rounded(program.arrays[rest.array].nbytes, 64)
            for rest in weights
            if rest.offset is not None
        ),
        default=0,
    )
    actions: list[Action] = []
    slots = {}
    for (name, tier), rest in there.items():
        if tier == NVME:
            continue
        if tier == DEVICE and not machine.device_is_host:
            if (name, HOST) not in there:
                slots[len(actions)] = staging
                actions.append(Copy(name, NVME, HOST))
            elif Copy(name, NVME, HOST) not in actions:
                slots[len(actions)] = there[name, HOST].offset
                actions.append(Copy(name, NVME, HOST))
            actions.append(Copy(name, HOST, DEVICE))
            if (name, HOST) not in there:
                actions.append(Free(name, HOST))
        elif Copy(name, NVME, tier) not in actions:
            slots[len(actions)] = rest.offset
            actions.append(Copy(name, NVME, tier))
    arrays = {name: program.arrays[name] for name in program.of_kind("weight")}
    only_weights = Program(arrays, (), ())
    before = tuple(Residence(name, NVME) for name in arrays)
    plan = Plan(only_weights.digest, machine.digest, before, tuple(actions), tuple(weights), slots)
    return only_weights, plan
