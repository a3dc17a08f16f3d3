"""Tiny programs, tiny machines, and the dumbest valid plan: data for every test of the planner.

Arrays are some hundred bytes and programs some steps, so that a human can follow a plan of them
and brute force can enumerate them. `tiny_kernels.py` makes them computable.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from memsched.machine import DEVICE, HOST, NVME, Compute, Link, Machine, Tier, rounded
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import ArraySpec, Kind, Program, Step

ALIGNMENT_BYTES = 64


def tiny_machine(
    *,
    device: int = 1 << 20,
    host: int | None = None,
    nvme: int = 1 << 20,
    max_array_bytes: int = 1 << 30,
    nvme_bytes_per_s: float = 1e6,
    host_bytes_per_s: float = 4e6,
    flops_per_s: float = 1e6,
) -> Machine:
    """A machine of these capacities; without `host` it computes in main memory, in two tiers."""
    capacities = {DEVICE: device} | ({} if host is None else {HOST: host}) | {NVME: nvme}
    tiers = tuple(
        Tier(name, capacity, max_array_bytes, ALIGNMENT_BYTES)
        for name, capacity in capacities.items()
    )
    rates = {(NVME, DEVICE): nvme_bytes_per_s}
    if host is not None:
        rates = {(NVME, HOST): nvme_bytes_per_s, (HOST, DEVICE): host_bytes_per_s}
    links = tuple(
        Link(*ends, bytes_per_s=rate, block_bytes=4096, queue_depth=2)
        for pair, rate in rates.items()
        for ends in (pair, pair[::-1])
    )
    return Machine("tiny", "cpu", tiers, links, Compute(flops_per_s=flops_per_s, bytes_per_s=1e9))


def array(name: str, kind: Kind, values: int, dtype: str = "float32") -> ArraySpec:
    """An array of one dimension."""
    return ArraySpec(name, (values,), dtype, kind)


def program(arrays: Sequence[ArraySpec], steps: Sequence[Step], outputs: Sequence[str]) -> Program:
    """A program, its arrays keyed by their names."""
    return Program({spec.name: spec for spec in arrays}, tuple(steps), tuple(outputs))


def chain(layers: int = 4, values: int = 64) -> Program:
    """`h[i+1] = layer(h[i], w[i])`: 256 B each; one kernel for all layers."""
    states = ["x", *(f"h{i}" for i in range(layers))]
    arrays = [array("x", "input", values)]
    arrays += [array(f"w{i}", "weight", values) for i in range(layers)]
    arrays += [array(name, "activation", values) for name in states[1:]]
    steps = [
        Step(f"layer{i}", "layer", (before, f"w{i}"), (after,), flops=1000)
        for i, (before, after) in enumerate(itertools.pairwise(states))
    ]
    return program(arrays, steps, states[-1:])


def decode(layers: int = 3) -> Program:
    """A decode step: a table that is read first and last, a cache per layer, workspace."""
    states = [f"h{i}" for i in range(layers + 1)]
    arrays = [
        array("token", "input", 1, "uint8"),
        array("table", "weight", 200, "bfloat16"),
        *(array(f"layer{i}.weight", "weight", 100 + 10 * i) for i in range(layers)),
        *(array(f"layer{i}.scale", "weight", 3) for i in range(layers)),
        *(array(f"layer{i}.cache", "cache", 50) for i in range(layers)),
        *(array(name, "activation", 20) for name in states),
        array("logits", "activation", 100),
    ]
    steps = [
        Step("embed", "embed", ("token", "table"), ("h0",), flops=10),
        *(
            Step(
                f"layer{i}",
                f"layer{i}",
                (f"h{i}", f"layer{i}.weight", f"layer{i}.scale"),
                (f"h{i + 1}",),
                (f"layer{i}.cache",),
                flops=500,
                workspace_bytes=100,
            )
            for i in range(layers)
        ),
        Step("head", "head", (f"h{layers}", "table"), ("logits",), flops=2000),
    ]
    return program(arrays, steps, ["logits", *(f"layer{i}.cache" for i in range(layers))])


def prefill() -> Program:
    """Text embeddings that are updated in place, a feature that stays, a mask that nobody reads."""
    arrays = [
        array("embedding", "embedding", 96, "bfloat16"),
        array("feature", "feature", 48, "bfloat16"),
        array("mask", "input", 10, "uint8"),
        array("positions", "input", 12),
        array("merge.weight", "weight", 48, "bfloat16"),
        array("layer.weight", "weight", 150, "bfloat16"),
        array("norm.weight", "weight", 5),
        array("cache", "cache", 80, "bfloat16"),
        array("angles", "activation", 24),
        array("hidden", "activation", 96, "bfloat16"),
        array("last", "activation", 7),
    ]
    steps = [
        Step("rotate", "rotate", ("positions",), ("angles",), flops=50),
        Step("merge", "merge", ("feature", "merge.weight"), (), ("embedding",), flops=100),
        Step(
            "layer",
            "layer",
            ("embedding", "layer.weight", "angles"),
            ("hidden",),
            ("cache",),
            flops=4000,
            workspace_bytes=300,
        ),
        Step("norm", "norm", ("norm.weight",), (), ("hidden",), flops=100),
        Step("pick", "pick", ("hidden",), ("last",), flops=10),
    ]
    return program(arrays, steps, ["last", "cache"])


def training(layers: int = 3) -> Program:
    """Forward and backward: each activation waits long for its second reader."""
    arrays = [array("x", "input", 40), array("gradient", "activation", 40)]
    arrays += [array(f"w{i}", "weight", 60) for i in range(layers)]
    arrays += [array(f"h{i}", "activation", 100) for i in range(layers)]
    arrays += [array(f"dw{i}", "activation", 60) for i in range(layers)]
    before = ["x", *(f"h{i}" for i in range(layers))]
    steps = [
        Step(f"forward{i}", f"forward{min(i, 1)}", (before[i], f"w{i}"), (f"h{i}",), flops=500)
        for i in range(layers)
    ]
    steps.append(Step("loss", "loss", (before[-1],), ("gradient",), flops=10))
    steps += [
        Step(
            f"backward{i}",
            f"backward{min(i, 1)}",
            (before[i], f"w{i}"),
            (f"dw{i}",),
            ("gradient",),
            flops=1000,
            workspace_bytes=64,
        )
        for i in reversed(range(layers))
    ]
    return program(arrays, steps, [f"dw{i}" for i in range(layers)])


def blocks(count: int = 4) -> Program:
    """One product in row blocks, joined; two outputs, one of them made in the middle."""
    arrays = [array("x", "input", 30), array("h", "activation", 30)]
    arrays += [array("norm", "weight", 30), array("tail", "weight", 16)]
    arrays += [array(f"block{i}", "weight", 128) for i in range(count)]
    arrays += [array(f"part{i}", "activation", 25) for i in range(count)]
    arrays += [array("joined", "activation", 25 * count), array("score", "activation", 1)]
    parts = tuple(f"part{i}" for i in range(count))
    steps = [Step("norm", "norm", ("x", "norm"), ("h",), flops=30)]
    steps += [
        Step(f"block{i}", "block", ("h", f"block{i}"), (part,), flops=800)
        for i, part in enumerate(parts)
    ]
    steps.append(Step("join", "join", parts, ("joined",)))
    steps.append(Step("score", "score", ("joined", "tail"), ("score",), flops=16))
    return program(arrays, steps, ["joined", "score"])


TINY: Mapping[str, Callable[[], Program]] = {
    "blocks": blocks,
    "chain": chain,
    "decode": decode,
    "prefill": prefill,
    "training": training,
}


def random_program(
    rng: np.random.Generator, *, steps: int = 8, weights: int = 6, most_values: int = 100
) -> Program:
    """A random program with every kind of array, in-place updates, and arrays that nobody reads.

    Caches are updated at least once and are outputs; a weight may be read by several steps.
    """

    def some(name: str, kind: Kind) -> ArraySpec:
        dtype = str(rng.choice(["float32", "bfloat16", "uint8"]))
        return array(name, kind, int(rng.integers(1, most_values + 1)), dtype)

    counts: dict[Kind, int] = {"weight": weights, "cache": int(rng.integers(0, 3))}
    counts |= {"input": int(rng.integers(1, 3)), "embedding": int(rng.integers(0, 2))}
    counts |= {"feature": int(rng.integers(0, 2))}
    arrays = [some(f"{kind}{i}", kind) for kind, count in counts.items() for i in range(count)]
    caches = [spec.name for spec in arrays if spec.kind == "cache"]
    made: list[Step] = []
    for index in range(steps):
        free_to_read = [spec.name for spec in arrays if spec.kind != "cache"]
        changeable = [spec.name for spec in arrays if spec.kind not in ("weight", "feature")]
        chance = rng.random()
        if index < len(caches):
            updates = (caches[index],)
        else:
            updates = (str(rng.choice(changeable)),) if chance < 0.3 else ()
        count = min(len(free_to_read), int(rng.integers(1, 5)))
        reads = rng.choice(free_to_read + caches, count, replace=False)
        news = int(rng.integers(0 if updates else 1, 3))
        results = [some(f"step{index}.{i}", "activation") for i in range(news)]
        made.append(
            Step(
                f"step{index}",
                f"kernel{index}",
                tuple(str(name) for name in reads if name not in updates),
                tuple(spec.name for spec in results),
                updates,
                flops=int(rng.integers(0, 2000)),
                workspace_bytes=int(rng.integers(0, 200)),
            )
        )
        arrays += results
    last = [name for step in made for name in step.results if name not in caches]
    outputs = dict.fromkeys(last[-1:] + [name for name in last if rng.random() < 0.2])
    return program(arrays, made, [*outputs, *caches])


def random_layers(rng: np.random.Generator) -> Program:
    """Layers with weights alike, one to three each: little else is there, so memory decides."""
    count, values = int(rng.integers(16, 61)), rng.integers(16, 200, int(rng.integers(1, 4)))
    flops = rng.integers(100, 2000, int(rng.integers(1, 3)))
    states = [f"h{layer}" for layer in range(count + 1)]
    caches = [f"cache{layer}" for layer in range(count)] if rng.random() < 0.3 else []
    weights = [[f"w{layer}.{index}" for index in range(len(values))] for layer in range(count)]
    arrays = [array(states[0], "input", 8), *(array(name, "activation", 8) for name in states[1:])]
    arrays += [array(name, "cache", 16) for name in caches]
    arrays += [
        array(name, "weight", int(size))
        for names in weights
        for name, size in zip(names, values, strict=True)
    ]
    steps = [
        Step(
            f"layer{layer}",
            "layer",
            (before, *weights[layer]),
            (after,),
            tuple(caches[layer : layer + 1]),
            flops=int(flops[layer % len(flops)]),
            workspace_bytes=100,
        )
        for layer, (before, after) in enumerate(itertools.pairwise(states))
    ]
    return program(arrays, steps, [states[-1], *caches])


def naive_plan(program: Program, machine: Machine, pinned: Collection[str] = ()) -> Plan:
    """Fetches each weight right before the step that reads it and frees it right after.

    Only those `pinned` stay on the device, from offset 0. Nothing but weights ever moves. It is
    valid wherever it fits.
    """
    weights = dict.fromkeys(name for name in program.of_kind("weight") if name not in pinned)
    pins, ring_offset = _pins([program.arrays[name] for name in pinned], machine)
    rest = [*(Residence(name, NVME) for name in program.of_kind("weight")), *pins]
    given = [name for name in program.given if program.arrays[name].kind != "weight"]
    last = {name: index for index, step in enumerate(program.steps) for name in step.inputs}
    last |= {
        name: index
        for index, step in enumerate(program.steps)
        for name in step.writes
        if name not in last
    }
    left = {*program.outputs, *program.of_kind("cache", "feature")}
    stays = {*left, *pinned}
    actions: list[Action] = [
        Free(name, DEVICE) for name in given if name not in last and name not in stays
    ]
    slots: dict[int, int] = {}
    for index, step in enumerate(program.steps):
        reads = dict.fromkeys(name for name in step.reads if name in weights)
        _fetch(actions, slots, [program.arrays[name] for name in reads], machine, ring_offset)
        actions.append(Run(step.name))
        actions += [Free(name, DEVICE) for name in reads]
        done = [name for name in dict.fromkeys(step.inputs + step.writes) if last[name] == index]
        actions += [Free(name, DEVICE) for name in done if name not in stays | reads.keys()]
    kept = [name for name in program.arrays if name in left]
    return Plan(
        program.digest,
        machine.digest,
        (*rest, *(Residence(name, DEVICE) for name in given)),
        tuple(actions),
        (*rest, *(Residence(name, DEVICE) for name in kept)),
        slots,
    )


def _pins(weights: Sequence[ArraySpec], machine: Machine) -> tuple[list[Residence], int]:
    """Weights side by side on the device, and where the room of the others starts."""
    pins, end = [], 0
    for spec in weights:
        pins.append(Residence(spec.name, DEVICE, offset=end if machine.device_is_host else None))
        if machine.device_is_host:
            end += rounded(spec.nbytes, machine.tier(DEVICE).alignment_bytes)
    return pins, end


def _fetch(
    actions: list[Action],
    slots: dict[int, int],
    weights: Sequence[ArraySpec],
    machine: Machine,
    offset: int,
) -> None:
    """Appends the Copies of some weights to the device, side by side from an offset."""
    for spec in weights:
        slots[len(actions)] = offset
        if machine.device_is_host:
            actions.append(Copy(spec.name, NVME, DEVICE))
            offset += rounded(spec.nbytes, machine.tier(DEVICE).alignment_bytes)
        else:
            actions.append(Copy(spec.name, NVME, HOST))
            actions.append(Copy(spec.name, HOST, DEVICE))
            actions.append(Free(spec.name, HOST))
