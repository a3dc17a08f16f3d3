"""A `Runner` whose weights rest wherever the plans say, and move when they say it."""

import contextlib
import dataclasses
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
from memsched.machine import DEVICE, Machine
from memsched.plan import Residence
from memsched.program import Step
from memsched.runtime import Executor
from memsched.runtime.schedule import arena_tier
from memsched.stores.blocks import StoredArray
from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.buckets import PREFILL_CHUNK, bucket
from qwen3vl_jax.cache import SMALLEST_CAPACITY, CacheForm
from qwen3vl_jax.cache_rows import Blocks, row_dtype
from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings
from qwen3vl_jax.config import Config
from qwen3vl_jax.layer_steps import WHOLE_LAYERS, Granularity
from qwen3vl_jax.long_cache import block_shape, blocks_for
from qwen3vl_jax.network import Features, Qwen3VLNetwork
from qwen3vl_jax.phases import Phase
from qwen3vl_jax.planned.forms import Setting, choose
from qwen3vl_jax.planned.options import NEEDED, NEVER
from qwen3vl_jax.planned.programs import weight_specs
from qwen3vl_jax.planned.replanning import Watcher, alone, staying
from qwen3vl_jax.planned.request import Request, cache_request
from qwen3vl_jax.planned.rows import EmbeddingRows
from qwen3vl_jax.planned.saved import SavedPlans
from qwen3vl_jax.planned.sealed import Living, Sealed, Shelf
from qwen3vl_jax.planned.shapes import CacheShapes, within_context
from qwen3vl_jax.planned.tally import MOVING, Tally
from qwen3vl_jax.planned.timetable import Timetable
from qwen3vl_jax.planned.turns import Key, Planned, key_of
from qwen3vl_jax.weights import Entry

MOST_TALLIES = 64
FEATURE_SHARE = 16  # image features that take more of the device than one such part rest on disk
RUN_PLAN_S = 1.0  # too short for SciPy's optimisers, which take 33 MB of memory that is short


class PlannedRunner:
    """Carries out phases by the plans of its timetable, on the tiers that its executor owns."""

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
        chunk: int | str = PREFILL_CHUNK,
        kv_blocks: str = NEEDED,
        max_context: int | None = None,
        granularity: Granularity = WHOLE_LAYERS,
        encodings: Encodings = NOTHING_ENCODED,
        plan_seconds: float | None = None,
        kv: str = "raw",
    ) -> None:
        """Opens the tiers; nothing is read yet. `network` is shapes; `entries` are its weights."""
        self.chunk_tokens = PREFILL_CHUNK if isinstance(chunk, str) else chunk
        self.allowed = kv_blocks, chunk
        self.config, self.kv, self.encodings = config, kv, encodings
        self.dtype = np.dtype(network.language_model.norm.weight.get_value().dtype)
        self.cost = cost or Roofline()
        self.plan_seconds = RUN_PLAN_S if plan_seconds is None else plan_seconds
        self.timetable = Timetable(
            network,
            config,
            machine,
            cost=self.cost,
            granularity=granularity,
            plan_seconds=self.plan_seconds,
        )
        self._rows, self._living = rows, Living()
        self._nvme_dir, self.max_context = nvme_dir, max_context
        self._latest: Key | None = None
        self.tallies: dict[int, Tally] = {}  # by the identity of plans, which it keeps
        self.spans: dict[str, tuple[Span, ...]] = {}
        self.watcher: Watcher | None = None
        self.passing = threading.RLock()  # held during a pass; budgets change between two
        self.specs = weight_specs(entries, encodings, self.dtype)
        self.owned = contextlib.ExitStack()  # what is closed with this
        self.executor = Executor(
            machine, sources, nvme_dir=nvme_dir, nvme_space_bytes=nvme_space_bytes
        )
        self._shelf = Shelf(self.executor, self.specs)

    @property
    def machine(self) -> Machine:
        """With the budgets that are in force."""
        return self.timetable.machine

    @property
    def plans(self) -> dict[str, Planned]:
        """The newest plan of every phase."""
        return {planned.traced.name: planned for planned in self.timetable.turns.plans.values()}

    @alone
    def limit(self, machine: Machine) -> None:
        """Other budgets from the next pass on; what no longer fits is given back at once.

        The phases of a prompt wait for the next one if they do not fit. May be called from any
        thread: it waits until the pass that is under way has ended.

        Raises:
            UsageError: the plans are from a file.
            DoesNotFitError: an answer cannot go on with them; it has the least that would do, and
                everything is as it was.
            StoreError: no address space for so much; the old budgets stay.
        """
        self.timetable.check_replannable()
        turns = self.timetable.replanned(machine, self._latest)
        grows = machine.tier(arena_tier(machine)).capacity_bytes > self.executor.arena_bytes
        moving = arena_tier(machine) if grows else None
        entries = [planned.entry for planned in turns.plans.values()]
        self.move(staying(self.executor.held, entries, self.specs, moving), ())
        self.executor.limit(machine)
        self.timetable.take(turns)

    @alone
    def expect(self, batch: int, capacity: int, prompt_tokens: int | None = None) -> CacheForm:
        """A cache of this size is about to be used: what is planned from now on leaves room.

        What is open is chosen as a dry run does (`forms.choose`), for a cache that this prompt and
        its answer fill; of an unknown prompt, for `usual_split`. It is to be in blocks, too, where
        a plain one does not fit, if that is allowed and full blocks have a place on disk.

        Raises:
            UsageError: more than max_context.
            DoesNotFitError: there is no room for blocks either, or not on disk.
        """
        room = within_context(capacity, self.max_context)
        self._forget_dropped()
        chosen = self._chosen(batch, capacity, prompt_tokens)
        if chosen is not None:
            self.chunk_tokens = chosen.chunk_tokens
        kind = self.config, self.dtype, row_dtype(self.kv, self.dtype), batch
        shapes = CacheShapes(*kind, bucket(room, SMALLEST_CAPACITY))
        usual = block_shape(self.config.text, batch, shapes.row_dtype)[2]
        slots = None if chosen is None else chosen.block_slots
        if slots is None and shapes.slots > usual and self._cuts and not self._fits(shapes):
            slots = usual
        if slots is not None:
            count = blocks_for(room, slots)
            shapes = CacheShapes(*kind, count * slots, slots)
            self._rehearse(shapes.with_one_block())
            self.executor.reserve((count - 1) * shapes.block_bytes)
        self.timetable.turn_to(shapes, self._living.nbytes_beside(()))
        if self.executor.held and self.timetable.adopted is None:
            turns = self.timetable.turns
            key = next(key for key in turns.group if key[0] == "decode")
            self._bring(turns.plans.get(key) or self._plan_in_all_room()[key])
        chunk_tokens = None if chosen is None else chosen.chunk_tokens
        return CacheForm(batch, shapes.slots, shapes.row_dtype, shapes.block_slots, chunk_tokens)

    @alone
    def seal(self, name: str, block: Blocks) -> tuple[Any, Blocks]:
        """Writes the block to disk, from where plans bring it as they do weights.

        Raises:
            UsageError: there is no directory for that.
            StoreError: the disk has no space left.
        """
        return self._shelf.seal(name, block), block

    def follow(self, chunk_tokens: int) -> None:
        """Leaves nothing open from now on: caches in one piece, prompts in such chunks."""
        self.allowed, self.chunk_tokens = (NEVER, chunk_tokens), chunk_tokens

    @alone
    def adopt(self, phase: str, arrays: tuple[Any, ...], saved: SavedPlans) -> None:
        """Takes the plan of a phase for arrays of these shapes from a file, and from now on no
        other plans than such.

        Raises:
            UsageError, DoesNotFitError, PlanError: as `SavedPlans.plan_of` says.
        """
        planned = self.timetable.adopt(phase, arrays, saved, self.specs)
        self.executor.prepare(planned.plan, planned.traced.program, planned.traced.kernels)

    @alone
    def settle(self, features: Features) -> Features:
        """Features that take a large part of the memory go to disk, and come as weights do."""
        if self._nvme_dir is None or self.timetable.adopted is not None:
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
        planned = self._planned(key, phase, arrays)
        if self.watcher is not None:
            peaks = self.executor.peak_bytes(planned.plan, planned.traced.program)
            self.watcher.before_pass(phase.name, peaks)
            planned = self._planned(key, phase, arrays)
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

    @property
    def _cuts(self) -> bool:
        """Whether a cache that does not fit may be cut into blocks."""
        possible = self._nvme_dir is not None and self.timetable.adopted is None
        return possible and self.allowed[0] != NEVER

    def _chosen(self, batch: int, capacity: int, prompt_tokens: int | None) -> Request | None:
        """What `choose` says of a cache; None where nothing is open, or plans of a file say it."""
        asked = cache_request(batch, capacity, prompt_tokens, self.max_context)
        asked = dataclasses.replace(
            asked, kv=self.kv, kv_blocks=self.allowed[0], chunk=self.allowed[1]
        )
        if asked.decided or self.timetable.adopted is not None:
            return None
        setting = Setting(self.config, self.machine, self.dtype, self.cost, self.encodings)
        return choose(setting, asked)

    def _planned(self, key: Key, phase: Phase, arrays: tuple[Any, ...]) -> Planned:
        """The plan of a phase; it is made now if the phase has not been seen with these shapes."""
        known, saved = self.timetable.turns.plans.get(key), self.timetable.adopted
        if known is not None:
            return known
        if saved is not None:
            raise saved.missing(phase.name)
        self.timetable.join(phase, arrays)
        try:
            return self._plan_in_all_room()[key]
        except DoesNotFitError as error:
            self.timetable.leave(key)
            if not self._cuts and self.timetable.cache is not None:
                ways = (
                    ("with --nvme-dir", self._nvme_dir is None),
                    (
                        "without --kv-blocks never",
                        self.allowed[0] == NEVER,
                    ),
                )
                option = " and ".join(way for way, lacks in ways if lacks)
                error = self.timetable.cache.with_a_way_out(error, option)
            raise error from None

    def _plan_in_all_room(self) -> Mapping[Key, Planned]:
        """As `_plan`; if need be with the user's budget, of which a watcher has taken a part."""
        try:
            return self._plan()
        except DoesNotFitError as error:
            if self.watcher is None or not self.watcher.refused(error):
                raise
        return self._plan()

    def _plan(self) -> Mapping[Key, Planned]:
        """Plans all phases that take turns, and compiles them before weights are in the way."""
        made = self.timetable.plan()
        for planned in made.values():
            self.executor.prepare(planned.plan, planned.traced.program, planned.traced.kernels)
        return made

    def _turn_to(self, phase: Phase, arrays: tuple[Any, ...]) -> None:
        """What is planned from now on is for the cache among these arrays, if there is one."""
        given = dict(zip(phase.arrays, arrays, strict=True))
        if "cache" in given and self.timetable.adopted is None:
            shapes = CacheShapes.among(given, self.config, self.dtype)
            others_bytes = self._living.nbytes_beside(jax.tree.leaves(given["cache"]))
            self.timetable.turn_to(shapes, others_bytes)

    def _rehearse(self, shapes: CacheShapes) -> None:
        """DoesNotFitError if there is no plan for a prompt with such a cache, and a token."""
        self.timetable.rehearse(shapes, self._living.nbytes_beside(()), self.chunk_tokens)

    def _fits(self, shapes: CacheShapes) -> bool:
        try:
            self._rehearse(shapes)
        except DoesNotFitError:
            return False
        return True

    def _forget_dropped(self) -> None:
        """Nothing is planned any more with blocks of caches that are gone."""
        gone = self._shelf.forget_dropped()
        group = self.timetable.turns.group
        if any(not gone.isdisjoint(traced.program.arrays) for traced in group.values()):
            self.timetable.forget()

    def _bring(self, planned: Planned) -> None:
        """Moves weights to where the plan wants them; reading goes on in the background."""
        self.move(planned.entry, planned.traced.program.steps)

    def move(self, wanted: tuple[Residence, ...], steps: Sequence[Step]) -> None:
        """Frees weights that lie elsewhere, and brings those missing in the order of use."""
        held = self.executor.held
        if set(held) == set(wanted):
            return
        program, plan = self.timetable.moves(held, wanted, self.specs, steps)
        before = self.executor.read_bytes, self.executor.written_bytes
        self.executor.run(plan, program, {}, {})
        moves = self.tallies.setdefault(id(plan), Tally(MOVING, plan, program))
        moves.add(self.executor, *before, outcome=None)


def _nothing(name: str) -> None:
    """Weights on an accelerator are not looked into."""
