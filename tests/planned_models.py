"""Planned models of tests: machines to plan for, traces that are shared, what a model answers."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from memsched.machine import DEVICE, HOST, NVME, Compute, Link, Machine, Tier
from memsched.plan import Plan
from memsched.profiles import write_machine
from memsched.program import Program
from memsched.runtime import Executor
from qwen3vl_jax.checkpoints.conversion import to_store
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.planned import loading, timetable, works
from qwen3vl_jax.planned.loading import Budgets
from qwen3vl_jax.planned.runner import PlannedRunner
from qwen3vl_jax.planned.sealed import Sealed
from qwen3vl_jax.progress import Silent

ROOM_BYTES = 1 << 30
LARGEST_ARRAY_BYTES = 1 << 40
# Rates at which a tiny model's weights take about as long to arrive as to be read.
DISK = {"bytes_per_s": 1e9, "latency_s": 1e-4, "block_bytes": 4 << 20, "queue_depth": 4}
COMPUTE = Compute(1e11, 2e10, 5e-6)
_ROPE = {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"}
# A checkpoint of 67 MB in bfloat16, for `checkpoint_factory`.
SETTINGS: dict[str, Any] = {
    "text": {
        "head_dim": 64,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "max_position_embeddings": 4096,
        "num_attention_heads": 8,
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
        "rope_parameters": _ROPE | {"rope_theta": 5000000},
        "vocab_size": 8192,
    },
    "vision": {"out_hidden_size": 512},
}


def store_of(checkpoint: Path, destination: Path) -> Path:
    """The checkpoint as a converted store."""
    to_store(checkpoint, destination, dtype="keep", progress=Silent())
    return destination


def machine_file(folder: Path, tiers: int) -> Path:
    """A machine with room for everything. With three tiers the host one is emulated on the CPU."""
    path = folder / f"{tiers}tiers.toml"
    near = HOST if tiers == 3 else DEVICE
    links = [Link(NVME, near, **DISK), Link(near, NVME, **DISK)]
    names = [DEVICE, NVME]
    if tiers == 3:
        names.insert(1, HOST)
        links += [Link(HOST, DEVICE, 5e9, 1e-5), Link(DEVICE, HOST, 5e9, 1e-5)]
    found = tuple(Tier(name, ROOM_BYTES, LARGEST_ARRAY_BYTES, 4096) for name in names)
    write_machine(Machine("test", "cpu", found, tuple(links), COMPUTE), path)
    return path


def planned(path: Path | str, dtype: str | None = None, **budgets: Any) -> Qwen3VL:
    """A model that keeps within budgets; the caller closes it."""
    return loading.load(path, dtype=dtype, budgets=Budgets(**budgets))


def runner_of(model: Qwen3VL) -> PlannedRunner:
    """What carries out the phases of a planned model."""
    found = model._runner
    assert isinstance(found, PlannedRunner)
    return found


def share_traces(patch: pytest.MonkeyPatch) -> None:
    """Models and forecasts of one configuration trace and compile a phase once: budgets change no
    program."""
    networks: dict[Any, Any] = {}
    traces: dict[Any, Any] = {}
    make_network, make_trace = loading.shape_network, timetable.trace_phase

    def network(config: Any, *, dtype: Any, vocab_rows: int, encodings: Any) -> Any:
        key = config, dtype, vocab_rows, tuple(encodings.items())
        if key not in networks:
            networks[key] = make_network(
                config, dtype=dtype, vocab_rows=vocab_rows, encodings=encodings
            )
        return networks[key]

    def trace(phase: Any, network: Any, arrays: Any, known: Any = None) -> Any:
        leaves = jax.tree.leaves(arrays)
        shapes = str([(type(leaf) is Sealed, leaf.shape, leaf.dtype) for leaf in leaves])
        # The function's text tells into which steps it cuts layers.
        key = id(network), str(phase.function), shapes, jax.tree.structure(arrays)
        if key not in traces:
            traces[key] = make_trace(phase, network, arrays, known)
        return traces[key]

    for module in (loading, works):
        patch.setattr(module, "shape_network", network)
    for module in (timetable, works):
        patch.setattr(module, "trace_phase", trace)


def recorded(patch: pytest.MonkeyPatch) -> list[tuple[Plan, Program]]:
    """All plans that executors carry out from now on, each once."""
    ran: list[tuple[Plan, Program]] = []
    run = Executor.run

    def noted(self: Executor, plan: Plan, program: Program, *more: Any, **options: Any) -> Any:
        if not any(plan is other for other, _ in ran):
            ran.append((plan, program))
        return run(self, plan, program, *more, **options)

    patch.setattr(Executor, "run", noted)
    return ran


def answers(
    model: Qwen3VL, inputs: Mapping[str, np.ndarray], *, tokens: int = 3
) -> list[np.ndarray]:
    """Scores at every position, after the prompt, and after each of some tokens."""
    batch, length = inputs["input_ids"].shape
    cache = model.new_cache(batch=batch, capacity=length + tokens)
    scores, cache = model.prefill(inputs, cache)
    found = [np.asarray(scores)]
    for _ in range(tokens):
        scores, cache = model.decode(found[-1].argmax(-1).astype(np.int32), cache)
        found.append(np.asarray(scores))
    return found


def told(model: Qwen3VL, inputs: Mapping[str, np.ndarray], *, tokens: int = 3) -> np.ndarray:
    """Prompt and greedily chosen tokens, to the last one."""
    greedy = {"do_sample": False, "eos_token_id": ()}
    return model.generate(**inputs, max_new_tokens=tokens, **greedy)


def our_threads() -> list[str]:
    """Names of the threads of executors."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("memsched")]
