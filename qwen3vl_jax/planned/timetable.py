"""Which phases take turns, and the plans that they and the moves between them were given."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from memsched.cost import CostModel
from memsched.cost.contention import BesideCopies
from memsched.errors import DoesNotFitError
from memsched.machine import NVME, Machine
from memsched.passes.bridge import bridge
from memsched.plan import Plan, Residence
from memsched.program import ArraySpec, Program, Step
from memsched.tracing.steps import Known
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.layer_steps import Granularity
from qwen3vl_jax.long_phases import long_phases
from qwen3vl_jax.network import Qwen3VLNetwork
from qwen3vl_jax.phases import Phase, phases
from qwen3vl_jax.planned.programs import Traced, trace_phase
from qwen3vl_jax.planned.replanning import refusal
from qwen3vl_jax.planned.saved import SavedPlans
from qwen3vl_jax.planned.sealed import Sealed
from qwen3vl_jax.planned.shapes import CacheShapes, scores_shapes
from qwen3vl_jax.planned.turns import Key, Planned, in_order, key_of, planned_together, programs_of

MOST_TRACED = 64
MOST_ALIKE = 2  # shapes of a phase that are planned together: whole chunks of a prompt, the rest
ANSWERING = ("scores", "verify", "decode")  # what an answer needs until it ends


@dataclasses.dataclass(frozen=True, slots=True)
class Turns:
    """Phases that take turns on a machine, and the plans of some of them."""

    machine: Machine
    group: Mapping[Key, Traced]
    plans: Mapping[Key, Planned]


class Timetable:
    """Phases that take turns around one KV cache, planned together.

    So weights move as little as possible from one to the next. It knows shapes; what rests where
    is its caller's.
    """

    def __init__(
        self,
        network: Qwen3VLNetwork,
        config: Config,
        machine: Machine,
        *,
        cost: CostModel,
        granularity: Granularity,
        plan_seconds: float,
    ) -> None:
        self.turns = Turns(machine, {}, {})
        self.cache: CacheShapes | None = None
        self.cache_bytes = 0  # what plans leave room for: this cache between two passes,
        self.others_bytes = 0  # and caches that wait for their next turn
        self.adopted: SavedPlans | None = None
        self._network, self._config = network, config
        self._cost, self._plan_seconds = cost, plan_seconds
        self._known = Known()
        self._bridges: dict[tuple[Any, ...], tuple[Program, Plan]] = {}
        self._cut(granularity)

    @property
    def machine(self) -> Machine:
        """With the budgets that plans are for."""
        return self.turns.machine

    def known_phases(self, *, blocks: bool) -> Mapping[str, Phase]:
        """All phases, cut as they are planned; those of a cache in blocks, or of a plain one."""
        return self._long_phases if blocks else self._phases

    def check_replannable(self) -> None:
        """Raises UsageError if plans come from a file: those are for one budget."""
        if self.adopted is not None:
            raise UsageError(
                f"the plans of {self.adopted.path} are for the budgets that they were made for; "
                "leave --plan away, or make others with --dry-run --save-plan"
            )

    def turn_to(self, cache: CacheShapes, others_bytes: int) -> None:
        """Begins anew with a token of such a cache, while others take so many bytes."""
        if (self.cache, self.others_bytes) == (cache, others_bytes):
            return
        self.forget()
        self.cache, self.others_bytes = cache, others_bytes
        self.cache_bytes = cache.cache_bytes
        known = self.known_phases(blocks=cache.block_slots is not None)
        self.join(known["decode"], cache.decode())
        self.join(self._phases["scores"], scores_shapes(self._config, cache.batch, cache.dtype))

    def forget(self) -> None:
        """Forgets all plans, which begin anew at the next turn; what was traced stays."""
        self.cache = None
        self.turns = Turns(self.machine, {}, {})
        self._bridges = {}

    def join(self, phase: Phase, arrays: tuple[Any, ...]) -> Key:
        """Adds a phase to those that take turns; the oldest of as many shapes of it leaves."""
        leaves, tree = jax.tree.flatten(arrays)
        key = key_of(phase, leaves, tree)
        traced = self._traced_phase(phase, arrays, key).calling(leaves)
        # The caches of a conversation lie there even while a phase does not touch them.
        idle_bytes = 0 if traced.program.of_kind("cache") else self.cache_bytes
        alike = [other for other in self.turns.group if other[0] == phase.name]
        leaving = alike[0] if len(alike) >= MOST_ALIKE else None
        group = {other: one for other, one in self.turns.group.items() if other != leaving}
        group[key] = traced.beside(idle_bytes + self.others_bytes)
        self.turns = dataclasses.replace(self.turns, group=group)
        return key

    def leave(self, key: Key) -> None:
        """A phase that has no plan takes no turns: the others can be planned without it."""
        group = {other: one for other, one in self.turns.group.items() if other != key}
        self.turns = dataclasses.replace(self.turns, group=group)

    def rehearse(self, cache: CacheShapes, others_bytes: int, chunk_tokens: int) -> None:
        """Plans a whole chunk of a prompt, and a token; DoesNotFitError if there is no plan."""
        self.turn_to(cache, others_bytes)
        known = self.known_phases(blocks=cache.block_slots is not None)
        tokens = min(chunk_tokens, cache.block_slots or cache.slots)
        self.join(known["prefill"], cache.prefill(tokens))
        self._together(self.turns.group, self.machine)

    def plan(self) -> Mapping[Key, Planned]:
        """Plans all phases that take turns, together.

        Raises:
            DoesNotFitError: there is no plan within the budgets.
        """
        made = self._together(self.turns.group, self.machine)
        self.turns = dataclasses.replace(self.turns, plans={**self.turns.plans, **made})
        return made

    def replanned(self, machine: Machine, latest: Key | None) -> Turns:
        """All phases that take turns, or those that an answer needs, planned for other budgets.

        Nothing has changed until `take` is called with them.

        Raises:
            DoesNotFitError: an answer cannot go on with them; it has the least that would do.
        """
        group = self.turns.group
        needed = {
            key: traced for key, traced in group.items() if key[0] in ANSWERING or key == latest
        }
        for chosen in (group, needed) if len(needed) < len(group) else (group,):
            try:
                return Turns(machine, chosen, self._together(chosen, machine))
            except DoesNotFitError:
                continue
        programs, most_s = programs_of(in_order(needed)), self._plan_seconds
        cost = BesideCopies(self._cost)
        raise refusal(programs, machine, cost, self.machine, most_s) from None

    def take(self, turns: Turns) -> None:
        """These are in force from now on."""
        self.turns = turns
        self._bridges = {}

    def adopt(
        self,
        phase: str,
        arrays: tuple[Any, ...],
        saved: SavedPlans,
        weights: Mapping[str, ArraySpec],
    ) -> Planned:
        """Takes the plan of a phase for arrays of these shapes from a file.

        Raises:
            UsageError, DoesNotFitError, PlanError: as `SavedPlans.plan_of` says.
        """
        if self.adopted is not saved:
            self.adopted = saved
            self._cut(saved.granularity)
        key = self.join(self._phases[phase], arrays)
        traced = self.turns.group[key].knowing(saved.known(weights))
        planned = Planned(traced, saved.plan_of(phase, arrays, traced.program, self.machine))
        self.turns = dataclasses.replace(self.turns, plans={**self.turns.plans, key: planned})
        return planned

    def moves(
        self,
        held: tuple[Residence, ...],
        wanted: tuple[Residence, ...],
        weights: Mapping[str, ArraySpec],
        steps: Sequence[Step],
    ) -> tuple[Program, Plan]:
        """From where weights lie to where they are wanted, in the order in which steps use them."""
        if (held, wanted) not in self._bridges:
            order = [name for step in steps for name in step.reads]
            home = [Residence(name, NVME) for name in weights]
            self._bridges[held, wanted] = bridge(
                [*home, *held], [*home, *wanted], weights, self.machine, order
            )
        return self._bridges[held, wanted]

    def _cut(self, granularity: Granularity) -> None:
        """Traces phases with layers cut into these steps from now on, whatever a caller's are."""
        self._phases = phases(self._config, granularity)
        self._long_phases = long_phases(self._config, granularity)
        self._traced: dict[Key, Traced] = {}

    def _traced_phase(self, phase: Phase, arrays: tuple[Any, ...], key: Key) -> Traced:
        """Traced once for all arrays of these shapes, whatever the names of those on disk."""
        sealed = tuple(isinstance(leaf, Sealed) for leaf in jax.tree.leaves(arrays))
        alike = (*key[:-1], sealed)
        if alike not in self._traced:
            if len(self._traced) >= MOST_TRACED:
                del self._traced[next(iter(self._traced))]
            own = self.known_phases(blocks="blocks" in phase.arrays)[phase.name]
            self._traced[alike] = trace_phase(own, self._network, arrays, self._known)
        return self._traced[alike]

    def _together(self, group: Mapping[Key, Traced], machine: Machine) -> dict[Key, Planned]:
        ordered = in_order(group)
        programs = programs_of(ordered)
        if not programs:
            return {}
        plans = planned_together(programs, machine, self._cost, self._plan_seconds)
        named = zip(programs, ordered.items(), strict=True)
        return {key: Planned(traced, plans[name]) for name, (key, traced) in named}
