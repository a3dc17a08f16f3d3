"""A `Runner` whose weights rest wherever the plans say, and move when they say it."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memsched.cost import CostModel, Roofline, Span
from memsched.machine import NVME, Machine
from memsched.passes.bridge import bridge
from memsched.passes.compile import compile_phases
from memsched.plan import Plan, Residence
from memsched.program import ArraySpec, Program
from memsched.runtime import Executor
from memsched.stores.blocks import StoredArray
from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.cache import SMALLEST_CAPACITY
from qwen3vl_jax.config import Config
from qwen3vl_jax.network import Qwen3VLNetwork
from qwen3vl_jax.phases import PREFILL_CHUNK, Phase, phases
from qwen3vl_jax.planned.programs import Traced, trace_phase
from qwen3vl_jax.planned.rows import EmbeddingRows
from qwen3vl_jax.planned.shapes import cache_shapes, decode_shapes, scores_shapes
from qwen3vl_jax.planned.while_reading import WhileReading
from qwen3vl_jax.weights import Entry

Key = tuple[Any, ...]
MOST_TRACED = 64
MOST_ALIKE = (
    2  # shapes of one phase that are planned together: whole chunks of a prompt, and the rest
)
PHASE_ORDER = ("vision", "forward", "prefill", "scores", "verify", "decode")


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """A phase for certain shapes, its plan, and the weights it expects around it."""

    traced: Traced
    plan: Plan

    @property
    def entry(self) -> tuple[Residence, ...]:
        """Where the plan wants weights to lie before it, other than in files."""
        arrays = self.traced.program.arrays
        return tuple(
            rest
            for rest in self.plan.entry
            if rest.tier != NVME and arrays[rest.array].kind == "weight"
        )


class PlannedRunner:
    """Carries out phases by plans.

    A phase with new shapes is traced, and planned together with those it takes turns with, so that
    weights move as little as possible from one to the next.
    """

    def __init__(
        self,
        network: Qwen3VLNetwork,
        config: Config,
        entries: Sequence[Entry],
        machine: Machine,
        sources: Mapping[str, StoredArray],
        rows: EmbeddingRows,
        *,
        cost: CostModel | None = None,
        nvme_dir: Path | None = None,
        nvme_space_bytes: int = 0,
        chunk_tokens: int = PREFILL_CHUNK,
    ) -> None:
        """Opens the tiers; nothing is read yet. `network` is shapes; `entries` are its weights."""
        self.chunk_tokens = chunk_tokens
        self.machine = machine
        self._network = network
        self.config = config
        self._rows = rows
        self._cost = cost or Roofline()
        self._phases = phases(config)
        self._traced: dict[Key, Traced] = {}
        self._expected = (0, 0)
        self._group: dict[Key, Traced] = {}
        self._plans: dict[Key, Planned] = {}
        self._bridges: dict[tuple[Any, ...], tuple[Program, Plan]] = {}
        self._cache_bytes = 0
        self._specs = {
            entry.path: ArraySpec(entry.path, entry.shape, self.dtype.name, "weight")
            for entry in entries
        }
        self.owned = contextlib.ExitStack()  # what is closed with this
        self.spans: dict[str, tuple[Span, ...]] = {}
        self.executor = Executor(
            machine, sources, nvme_dir=nvme_dir, nvme_space_bytes=nvme_space_bytes
        )

    @property
    def dtype(self) -> np.dtype:
        """The dtype of all weights."""
        return np.dtype(self._network.language_model.norm.weight.get_value().dtype)

    @property
    def plans(self) -> dict[str, Planned]:
        """The newest plan of every phase."""
        return {planned.traced.name: planned for planned in self._plans.values()}

    def expect(self, batch: int, capacity: int) -> None:
        """A cache of this size is about to be used: what is planned from now on leaves room."""
        slots = bucket(capacity, SMALLEST_CAPACITY)
        if (batch, slots) == self._expected:
            return
        self._expected = (batch, slots)
        dtype = self.dtype
        cache = cache_shapes(self.config, batch, capacity, dtype)
        self._cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        self._group, self._plans = {}, {}
        for name, shapes in (
            ("decode", decode_shapes(self.config, batch, capacity, dtype)),
            ("scores", scores_shapes(self.config, batch, dtype)),
        ):
            self._join(self._phases[name], shapes)

    def embed(self, token_ids: Int[AnyArray, "B T"]) -> Float[Array, "B T H"]:
        """Rows of the table, from memory where its blocks lie there, or from disk."""
        near = self.executor.resident if self.machine.device_is_host else _nothing
        return jnp.array(self._rows(token_ids, near))

    def run(self, phase: Phase, *arrays: Any) -> Any:
        """What the phase returns; updated arrays are consumed."""
        leaves, tree = jax.tree.flatten(arrays)
        key = _key(phase, leaves, tree)
        planned = self._plans.get(key) or self._planned(key, phase, arrays)
        self._bring(planned)
        traced = planned.traced
        given = {
            name: leaf for name, leaf in zip(traced.given, leaves, strict=True) if name is not None
        }
        outcome = self.executor.run(planned.plan, traced.program, traced.kernels, given)
        self.spans[phase.name] = outcome.spans
        return jax.tree.unflatten(traced.tree, [outcome.outputs[name] for name in traced.results])

    def wait(self) -> None:
        """Weights rest in files; there is nothing to wait for."""

    def close(self) -> None:
        """Ends all threads and gives all memory back."""
        self.executor.close()
        self.owned.close()

    def _planned(self, key: Key, phase: Phase, arrays: tuple[Any, ...]) -> Planned:
        """Plans a phase that has not been seen with these shapes."""
        if phase.name == "prefill":
            # The cache may have grown since it was made.
            self.expect(*dict(zip(phase.arrays, arrays, strict=True))["valid"].shape)
        self._join(phase, arrays)
        return self._plan_group()[key]

    def _join(self, phase: Phase, arrays: tuple[Any, ...]) -> None:
        """Adds a phase to those that take turns; the oldest of as many shapes of it leaves."""
        key = _key(phase, *jax.tree.flatten(arrays))
        if key not in self._traced:
            if len(self._traced) >= MOST_TRACED:
                del self._traced[next(iter(self._traced))]
            self._traced[key] = trace_phase(phase, self._network, arrays)
        alike = [other for other in self._group if other[0] == phase.name]
        if len(alike) >= MOST_ALIKE:
            del self._group[alike[0]]
        traced = self._traced[key]
        # The caches of a conversation lie there even while a phase does not touch them.
        idle_bytes = 0 if traced.program.of_kind("cache") else self._cache_bytes
        self._group[key] = traced.beside(idle_bytes)

    def _plan_group(self) -> dict[Key, Planned]:
        """Plans all phases that take turns, together."""
        names = {key: f"{index} {key[0]}" for index, key in enumerate(self._group)}
        shared = {
            name: spec
            for traced in self._group.values()
            for name, spec in traced.program.arrays.items()
            if spec.kind == "weight"
        }
        group = {key: traced.knowing(shared) for key, traced in self._group.items()}
        # What is repeated most comes last: it chooses first what stays.
        order = sorted(group, key=lambda key: PHASE_ORDER.index(key[0]))
        programs = {names[key]: group[key].program for key in order}
        plans = compile_phases(programs, self.machine, WhileReading(self._cost))
        made = {key: Planned(traced, plans[names[key]]) for key, traced in group.items()}
        self._plans |= made
        for planned in made.values():
            self.executor.prepare(planned.plan, planned.traced.program, planned.traced.kernels)
        return made

    def _bring(self, planned: Planned) -> None:
        """Moves weights to where the plan wants them; reading goes on in the background."""
        held = self.executor.held
        wanted = planned.entry
        if set(held) == set(wanted):
            return
        if (held, wanted) not in self._bridges:
            order = [name for step in planned.traced.program.steps for name in step.reads]
            home = [Residence(name, NVME) for name in self._specs]
            self._bridges[held, wanted] = bridge(
                [*home, *held], [*home, *wanted], self._specs, self.machine, order
            )
        program, plan = self._bridges[held, wanted]
        self.executor.run(plan, program, {}, {})


def _nothing(name: str) -> None:
    """Weights on an accelerator are not looked into."""


def _key(phase: Phase, leaves: list[Any], tree: Any) -> Key:
    return phase.name, tree, tuple((leaf.shape, np.dtype(leaf.dtype).num) for leaf in leaves)
