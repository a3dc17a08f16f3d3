"""Phases that take turns: what identifies them, and what they are planned as."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from memsched.cost import CostModel
from memsched.cost import plan_seconds as seconds_of
from memsched.cost.contention import BesideCopies
from memsched.machine import NVME, Machine
from memsched.passes.bridge import bridge
from memsched.passes.compile import compile_phases
from memsched.plan import Plan, Residence
from memsched.program import Program
from qwen3vl_jax.phases import Phase
from qwen3vl_jax.planned.programs import Traced
from qwen3vl_jax.planned.sealed import sealed_names

Key = tuple[Any, ...]
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


def key_of(phase: Phase, leaves: list[Any], tree: Any) -> Key:
    """What decides the plan of a phase: its arrays' shapes, and which of them are on disk."""
    shapes = tuple((leaf.shape, np.dtype(leaf.dtype).num) for leaf in leaves)
    return phase.name, tree, shapes, sealed_names(leaves)


def in_order(group: Mapping[Key, Traced]) -> dict[Key, Traced]:
    """As they are planned together: all know the weights of all.

    What is repeated most comes last: it chooses first what stays.
    """
    shared = {
        name: spec
        for traced in group.values()
        for name, spec in traced.program.arrays.items()
        if spec.kind == "weight"
    }
    order = sorted(group, key=lambda key: PHASE_ORDER.index(key[0]))
    return {key: group[key].knowing(shared) for key in order}


def planned_together(
    programs: Mapping[str, Program], machine: Machine, cost: CostModel, plan_seconds: float | None
) -> Mapping[str, Plan]:
    """Plans of phases that take turns: made for steps beside copies, judged by the cost model.

    Raises:
        DoesNotFitError: a phase has no plan within the budgets.
    """
    beside = BesideCopies(cost)
    return compile_phases(programs, machine, beside, predicted_by=cost, plan_seconds=plan_seconds)


def moving_s(
    before: Iterable[Residence], program: Program, plan: Plan, machine: Machine, cost: CostModel
) -> float:
    """Seconds to bring weights from where a pass leaves them to where a plan expects them."""
    weights = {name: spec for name, spec in program.arrays.items() if spec.kind == "weight"}
    home = [Residence(name, NVME) for name in weights]
    now, then = (
        [rest for rest in rests if rest.tier != NVME and rest.array in weights]
        for rests in (before, plan.entry)
    )
    order = list(dict.fromkeys(itertools.chain(*(s.reads for s in program.steps))))
    bridged, moves = bridge([*home, *now], [*home, *then], weights, machine, order)
    return seconds_of(moves, bridged, machine, cost)


def programs_of(ordered: Mapping[Key, Traced]) -> dict[str, Program]:
    """Their programs, by names of their own."""
    return {
        f"{index} {traced.name}": traced.program for index, traced in enumerate(ordered.values())
    }
