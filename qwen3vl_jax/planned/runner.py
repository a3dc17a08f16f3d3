"""A `Runner` whose weights rest wherever the plans say, and move when they say it."""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memsched.cost import CostModel, Roofline, Span
from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, NVME, Machine
from memsched.passes.bridge import bridge
from memsched.passes.compile import compile_phases
from memsched.plan import Plan, Residence
from memsched.program import Program, Step
from memsched.runtime import Executor
from memsched.runtime.schedule import arena_tier
from memsched.stores.blocks import StoredArray
from memsched.tracing.steps import Known
from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.cache import SMALLEST_CAPACITY, CacheForm
from qwen3vl_jax.cache_rows import Blocks, row_dtype
from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.layer_steps import WHOLE_LAYERS, Granularity
from qwen3vl_jax.long_cache import block_shape, blocks_for
from qwen3vl_jax.long_phases import long_phases
from qwen3vl_jax.network import Features, Qwen3VLNetwork
from qwen3vl_jax.phases import PREFILL_CHUNK, Phase, phases
from qwen3vl_jax.planned.programs import Traced, trace_phase, weight_specs
from qwen3vl_jax.planned.replanning import Watcher, alone, refusal, staying
from qwen3vl_jax.planned.rows import EmbeddingRows
from qwen3vl_jax.planned.saved import SavedPlans
from qwen3vl_jax.planned.sealed import Living, Sealed, Shelf
from qwen3vl_jax.planned.shapes import CacheShapes, scores_shapes, within_context
from qwen3vl_jax.planned.tally import MOVING, Tally
from qwen3vl_jax.planned.turns import Key, Planned, in_order, key_of, programs_of
from qwen3vl_jax.planned.while_reading import WhileReading
from qwen3vl_jax.weights import Entry

MOST_TRACED = MOST_TALLIES = 64
MOST_ALIKE = 2  # shapes of a phase that are planned together: whole chunks of a prompt, the rest
FEATURE_SHARE = 16  # image features that take more of the device than one such part rest on disk
RUN_PLAN_S = 1.0  # too short for SciPy's optimisers, which take 33 MB of memory that is short
ANSWERING = ("scores", "verify", "decode")  # what an answer needs until it ends


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
        nvme_space_bytes: int | None = None,
        chunk_tokens: int = PREFILL_CHUNK,
        max_context: int | None = None,
        granularity: Granularity = WHOLE_LAYERS,
        encodings: Encodings = NOTHING_ENCODED,
        plan_seconds: float | None = None,
        kv: str = "raw",
    ) -> None:
        """Opens the tiers; nothing is read yet. `network` is shapes; `entries` are its weights."""
        self.chunk_tokens = chunk_tokens
        self.machine = machine
        self._network = network
        self.config = config
        self._rows, self.kv = rows, kv
        self.cost = cost or Roofline()
        self.plan_seconds = RUN_PLAN_S if plan_seconds is None else plan_seconds
        self._cut(granularity)
        self._expected: tuple[CacheShapes, int] | None = None
        self.others_bytes = 0  # of caches that wait for their next turn
        self._known, self._living = Known(), Living()
        self._nvme_dir, self._max_context = nvme_dir, max_context
        self._group: dict[Key, Traced] = {}
        self._plans: dict[Key, Planned] = {}
        self._bridges: dict[tuple[Any, ...], tuple[Program, Plan]] = {}
        self.cache_bytes = 0
        self._latest: Key | None = None
        self._adopted: SavedPlans | None = None
        self.tallies: dict[int, Tally] = {}  # by the identity of plans, which it keeps
        self.watcher: Watcher | None = None
        self.passing = threading.RLock()  # held during a pass; budgets change between two
        self.encodings = encodings
        self.specs = weight_specs(entries, encodings, self.dtype)
        self.owned = contextlib.ExitStack()  # what is closed with this
        self.spans: dict[str, tuple[Span, ...]] = {}
        self.executor = Executor(
            machine, sources, nvme_dir=nvme_dir, nvme_space_bytes=nvme_space_bytes
        )
        self._shelf = Shelf(self.executor, self.specs)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of all raw weights."""
        return np.dtype(self._network.language_model.norm.weight.get_value().dtype)

    @property
    def plans(self) -> dict[str, Planned]:
        """The newest plan of every phase."""
        return {planned.traced.name: planned for planned in self._plans.values()}

    @alone
    def limit(self, machine: Machine) -> None:
        """Other budgets from the next pass on; what no longer fits is given back at once.

        The phases of a prompt wait for the next one if they do not fit. May be called from any
        thread: it waits until the pass that is under way has ended.

        Raises:
            DoesNotFitError: an answer cannot go on with them; it has the least that would do, and
                everything is as it was.
            StoreError: no address space for so much; the old budgets stay.
        """
        self.check_replannable()
        group, plans = self._replanned(machine)
        grows = machine.tier(arena_tier(machine)).capacity_bytes > self.executor.arena_bytes
        moving = arena_tier(machine) if grows else None
        entries = [planned.entry for planned in plans.values()]
        self.move(staying(self.executor.held, entries, self.specs, moving), ())
        self.executor.limit(machine)
        self.machine, self._group, self._plans = machine, group, plans
        self._bridges = {}

    def check_replannable(self) -> None:
        """Raises UsageError if plans come from a file: those are for one budget."""
        if self._adopted is not None:
            raise UsageError(
                f"the plans of {self._adopted.path} are for the budgets that they were made for; "
                "leave --plan away, or make others with --dry-run --save-plan"
            )

    @alone
    def expect(self, batch: int, capacity: int) -> CacheForm:
        """A cache of this size is about to be used: what is planned from now on leaves room.

        It is to be in blocks where a plain one does not fit, and full blocks have a place on disk.

        Raises:
            UsageError: more than max_context.
            DoesNotFitError: there is no room for blocks either, or not on disk.
        """
        capacity = within_context(capacity, self._max_context)
        self._forget_dropped()
        kind = self.config, self.dtype, row_dtype(self.kv, self.dtype), batch
        shapes = CacheShapes(*kind, bucket(capacity, SMALLEST_CAPACITY))
        block = block_shape(self.config.text, batch, shapes.row_dtype)
        chooses = self._nvme_dir is not None and self._adopted is None
        if chooses and shapes.slots > block[2] and not self._fits(shapes):
            count = blocks_for(capacity, block[2])
            shapes = CacheShapes(*kind, count * block[2], block[2])
            self._rehearse(shapes.with_one_block())
            self.executor.reserve((count - 1) * shapes.block_bytes)
        self._take_turns(shapes, self._living.nbytes_beside(()))
        if self.executor.held and self._adopted is None:
            key = next(key for key in self._group if key[0] == "decode")
            self._bring(self._plans.get(key) or self._plan_group()[key])
        return CacheForm(batch, shapes.slots, shapes.row_dtype, shapes.block_slots)

    @alone
    def seal(self, name: str, block: Blocks) -> tuple[Any, Blocks]:
        """Writes the block to disk, from where plans bring it as they do weights.

        Raises:
            UsageError: there is no directory for that.
            StoreError: the disk has no space left.
        """
        return self._shelf.seal(name, block), block

    @alone
    def adopt(self, phase: str, arrays: tuple[Any, ...], saved: SavedPlans) -> None:
        """Takes the plan of a phase for arrays of these shapes from a file, and from now on no
        other plans than such.

        Raises:
            UsageError, DoesNotFitError, PlanError: as `SavedPlans.plan_of` says.
        """
        if self._adopted is not saved:
            self._adopted = saved
            self._cut(saved.granularity)
        key = self._join(self.phases[phase], arrays)
        traced = self._group[key].knowing(saved.known(self.specs))
        plan = saved.plan_of(phase, arrays, traced.program, self.machine)
        self._plans[key] = Planned(traced, plan)
        self.executor.prepare(plan, traced.program, traced.kernels)

    @alone
    def settle(self, features: Features) -> Features:
        """Features that take a large part of the memory go to disk, and come as weights do."""
        if self._nvme_dir is None or self._adopted is not None:
            return features
        self._forget_dropped()
        most_bytes = self.machine.tier(DEVICE).capacity_bytes // FEATURE_SHARE
        return self._shelf.moved("features", features, most_bytes)

    @alone
    def embed(self, token_ids: Int[AnyArray, "B T"]) -> Float[Array, "B T H"]:
        """Rows of the table, from memory where its blocks lie there, or from disk."""
        near = self.executor.resident if self.machine.device_is_host else _nothing
        return jnp.array(self._rows(token_ids, near))

    @alone
    def run(self, phase: Phase, *arrays: Any) -> Any:
        """What the phase returns; updated arrays are consumed."""
        self._forget_dropped()
        leaves, tree = jax.tree.flatten(arrays)
        key = self._latest = key_of(phase, leaves, tree)
        self._turn_to(phase, arrays)
        planned = self._plans.get(key) or self._planned(key, phase, arrays)
        if self.watcher is not None:
            peaks = self.executor.peak_bytes(planned.plan, planned.traced.program)
            self.watcher.before_pass(phase.name, peaks)
            planned = self._plans.get(key) or self._planned(key, phase, arrays)
        self._bring(planned)
        traced = planned.traced
        given = {
            name: leaf
            for name, leaf in zip(traced.given, leaves, strict=True)
            if name is not None and not isinstance(leaf, Sealed)
        }
        before = self.executor.read_bytes, self.executor.written_bytes
        outcome = self.executor.run(planned.plan, traced.program, traced.kernels, given)
        self.spans[phase.name] = outcome.spans
        while len(self.tallies) >= MOST_TALLIES:
            del self.tallies[next(iter(self.tallies))]
        tally = Tally(phase.name, planned.plan, traced.program)
        self.tallies.setdefault(id(planned.plan), tally).add(self.executor, *before, outcome)
        self._living.note(outcome.outputs[name] for name in traced.program.of_kind("cache"))
        return jax.tree.unflatten(traced.tree, [outcome.outputs[name] for name in traced.results])

    def wait(self) -> None:
        """Weights rest in files; there is nothing to wait for."""

    def close(self) -> None:
        """Ends all threads and gives all memory back."""
        self.executor.close()
        self.owned.close()

    def _planned(self, key: Key, phase: Phase, arrays: tuple[Any, ...]) -> Planned:
        """Plans a phase that has not been seen with these shapes."""
        if self._adopted is not None:
            raise self._adopted.missing(phase.name)
        self._join(phase, arrays)
        try:
            return self._plan_group()[key]
        except DoesNotFitError as error:
            if self.watcher is None or not self.watcher.refused(error):
                if self._nvme_dir is None and self._expected is not None:
                    error = self._expected[0].with_a_way_out(error)
                raise error from None
            return self._plan_group()[key]

    def _turn_to(self, phase: Phase, arrays: tuple[Any, ...]) -> None:
        """What is planned from now on is for the cache among these arrays, if there is one."""
        given = dict(zip(phase.arrays, arrays, strict=True))
        if "cache" in given and self._adopted is None:
            shapes = CacheShapes.among(given, self.config, self.dtype)
            self._take_turns(shapes, self._living.nbytes_beside(jax.tree.leaves(given["cache"])))

    def _take_turns(self, shapes: CacheShapes, others_bytes: int) -> None:
        """Begins anew with a token of such a cache, while others take so many bytes."""
        if self._expected == (shapes, others_bytes):
            return
        self._expected, self.others_bytes = (shapes, others_bytes), others_bytes
        self.cache_bytes = shapes.cache_bytes
        self._group, self._plans, self._bridges = {}, {}, {}
        known = self.phases if shapes.block_slots is None else self.long_phases
        self._join(known["decode"], shapes.decode())
        self._join(self.phases["scores"], scores_shapes(self.config, shapes.batch, self.dtype))

    def _rehearse(self, shapes: CacheShapes) -> None:
        """Plans a whole chunk of a prompt, and a token; DoesNotFitError if there is no plan."""
        self._take_turns(shapes, self._living.nbytes_beside(()))
        known = self.phases if shapes.block_slots is None else self.long_phases
        tokens = min(self.chunk_tokens, shapes.block_slots or shapes.slots)
        self._join(known["prefill"], shapes.prefill(tokens))
        self._together(self._group, self.machine)

    def _fits(self, shapes: CacheShapes) -> bool:
        try:
            self._rehearse(shapes)
        except DoesNotFitError:
            return False
        return True

    def _forget_dropped(self) -> None:
        """Nothing is planned any more with blocks of caches that are gone."""
        gone = self._shelf.forget_dropped()
        if any(not gone.isdisjoint(traced.program.arrays) for traced in self._group.values()):
            self._expected = None
            self._group, self._plans, self._bridges = {}, {}, {}

    def _cut(self, granularity: Granularity) -> None:
        """Traces phases with layers cut into these steps from now on, whatever a caller's are."""
        self.phases = phases(self.config, granularity)
        self.long_phases = long_phases(self.config, granularity)
        self._traced: dict[Key, Traced] = {}

    def _join(self, phase: Phase, arrays: tuple[Any, ...]) -> Key:
        """Adds a phase to those that take turns; the oldest of as many shapes of it leaves."""
        leaves, tree = jax.tree.flatten(arrays)
        key = key_of(phase, leaves, tree)
        sealed = tuple(isinstance(leaf, Sealed) for leaf in leaves)
        alike = (*key[:-1], sealed)
        if alike not in self._traced:
            if len(self._traced) >= MOST_TRACED:
                del self._traced[next(iter(self._traced))]
            own = self.long_phases if "blocks" in phase.arrays else self.phases
            self._traced[alike] = trace_phase(own[phase.name], self._network, arrays, self._known)
        shapes = [other for other in self._group if other[0] == phase.name]
        if len(shapes) >= MOST_ALIKE:
            del self._group[shapes[0]]
        traced = self._traced[alike].calling(leaves)
        # The caches of a conversation lie there even while a phase does not touch them.
        idle_bytes = 0 if traced.program.of_kind("cache") else self.cache_bytes
        self._group[key] = traced.beside(idle_bytes + self.others_bytes)
        return key

    def _replanned(self, machine: Machine) -> tuple[dict[Key, Traced], dict[Key, Planned]]:
        """All phases that take turns, or those that an answer needs, planned for other budgets."""
        group = self._group
        needed = {
            key: traced
            for key, traced in group.items()
            if key[0] in ANSWERING or key == self._latest
        }
        try:
            return group, self._together(group, machine)
        except DoesNotFitError:
            if len(needed) == len(group):
                raise self._refusal(needed, machine) from None
        try:
            return needed, self._together(needed, machine)
        except DoesNotFitError:
            raise self._refusal(needed, machine) from None

    def _refusal(self, group: Mapping[Key, Traced], machine: Machine) -> DoesNotFitError:
        programs = programs_of(in_order(group))
        return refusal(programs, machine, WhileReading(self.cost), self.machine)

    def _together(self, group: Mapping[Key, Traced], machine: Machine) -> dict[Key, Planned]:
        """Plans of phases that take turns."""
        ordered = in_order(group)
        programs = programs_of(ordered)
        cost, most_s = WhileReading(self.cost), self.plan_seconds
        plans = compile_phases(programs, machine, cost, plan_seconds=most_s) if programs else {}
        named = zip(programs, ordered.items(), strict=True)
        return {key: Planned(traced, plans[name]) for name, (key, traced) in named}

    def _plan_group(self) -> dict[Key, Planned]:
        """Plans all phases that take turns, together."""
        made = self._together(self._group, self.machine)
        self._plans |= made
        for planned in made.values():
            self.executor.prepare(planned.plan, planned.traced.program, planned.traced.kernels)
        return made

    def _bring(self, planned: Planned) -> None:
        """Moves weights to where the plan wants them; reading goes on in the background."""
        self.move(planned.entry, planned.traced.program.steps)

    def move(self, wanted: tuple[Residence, ...], steps: Sequence[Step]) -> None:
        """Frees weights that lie elsewhere, and brings those missing in the order of use."""
        held = self.executor.held
        if set(held) == set(wanted):
            return
        if (held, wanted) not in self._bridges:
            order = [name for step in steps for name in step.reads]
            home = [Residence(name, NVME) for name in self.specs]
            self._bridges[held, wanted] = bridge(
                [*home, *held], [*home, *wanted], self.specs, self.machine, order
            )
        program, plan = self._bridges[held, wanted]
        before = self.executor.read_bytes, self.executor.written_bytes
        self.executor.run(plan, program, {}, {})
        moves = self.tallies.setdefault(id(plan), Tally(MOVING, plan, program))
        moves.add(self.executor, *before, outcome=None)


def _nothing(name: str) -> None:
    """Weights on an accelerator are not looked into."""
