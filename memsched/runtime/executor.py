"""Carries out plans on the tiers of a machine, one after the other."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from memsched.cost.span import Span
from memsched.errors import DoesNotFitError, PlanError, ProgramError
from memsched.machine import DEVICE, NVME, Machine, rounded
from memsched.plan import Plan, Residence
from memsched.program import ArraySpec, Program
from memsched.referee import verify
from memsched.runtime.admission import Admission, admit
from memsched.runtime.flight import Flight
from memsched.runtime.fuse import Kernel, Programs
from memsched.runtime.given import Given, check_given
from memsched.runtime.ledger import Ledger
from memsched.runtime.loop import Loop, carry_out
from memsched.runtime.operations import CopyOp, RunOp, Schedule
from memsched.runtime.ranges import union
from memsched.runtime.record import Record
from memsched.runtime.schedule import arena_tier, schedule
from memsched.runtime.tiers import Sources, Tiers
from memsched.stores.blocks import StoredArray
from memsched.stores.device import Sharding
from memsched.stores.heap import give_back

# Plans kept ready: one per phase and bucket of lengths, and the bridges between them.
_MOST_PLANS = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave: arrays on the device, and when each action was busy.

    `outputs` are the program's outputs and every cache and feature that was given. A Copy that was
    still under way at the end has a span up to the end. In the first `carried_s` seconds those of
    the plan before went on.
    """

    outputs: dict[str, jax.Array]
    spans: tuple[Span, ...]
    carried_s: float


class Executor:
    """The tiers of a machine, and what of the weights lies where: it stays from plan to plan.

    Args:
        sources: where the bytes of each weight lie. More than a plan needs is fine.
        nvme_dir: where arrays are moved out to, if a plan does that; `nvme_space_bytes` are
            reserved there at once. None: as plans need it, up to the budget of "nvme".
        device: what computes; JAX's default if None.

    Raises:
        DamagedError: a file of `sources` is missing or cut.
        StoreError: the system has no memory or disk space left.
        ProgramError: the machine computes in main memory, but the device does not.
    """

    def __init__(
        self,
        machine: Machine,
        sources: Mapping[str, StoredArray],
        *,
        nvme_dir: Path | None = None,
        nvme_space_bytes: int | None = 0,
        device: jax.Device | None = None,
    ) -> None:
        device = jax.local_devices()[0] if device is None else device
        if machine.device_is_host and device.platform != "cpu":
            raise ProgramError(
                f"machine {machine.name!r} computes in main memory, but {device} does not: "
                "describe it with a tier 'host'"
            )
        self.machine = machine
        self._sources: Sources = dict(sources)
        self._ledger = Ledger(tuple(tier.name for tier in machine.tiers))
        self._plans: dict[tuple[int, bool], _Ready] = {}
        self._programs = Programs()
        self._weights: Mapping[tuple[str, str], Residence] = {}
        self._closed = False
        self._tiers = Tiers(machine, self._sources, device, nvme_dir, nvme_space_bytes)

    def __enter__(self) -> "Executor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def held(self) -> tuple[Residence, ...]:
        """Where weights lie now, other than in "nvme": what the next plan's entry must have."""
        return tuple(self._weights[key] for key in sorted(self._weights))

    def resident(self, name: str) -> jax.Array | None:
        """A weight that rests on the device now; None if it does not, or is still on its way."""
        arriving, values = self._tiers.arriving[DEVICE], self._tiers.values[DEVICE]
        if (name, DEVICE) not in self._weights or name in arriving:
            return None
        return values.get(name)

    @property
    def ledger_peak_bytes(self) -> dict[str, int]:
        """The most that was in use in each tier so far."""
        return dict(self._ledger.peak_bytes)

    @property
    def read_bytes(self) -> int:
        """Bytes that the system read from disk so far."""
        return self._tiers.read_bytes

    @property
    def written_bytes(self) -> int:
        """Bytes that the system wrote to disk so far."""
        return self._tiers.written_bytes

    @property
    def spilled_bytes(self) -> int:
        """What lies on disk now of what was moved out and sealed."""
        return self._tiers.spilled_bytes

    @property
    def used_bytes(self) -> dict[str, int]:
        """What is in use in each tier since the last run: weights, what it returned, its ring."""
        return dict(self._ledger.used_bytes)

    @property
    def arena_bytes(self) -> int:
        """The largest budget of the tier that has the arena for which weights can stay in it."""
        return self._tiers.arena_bytes

    def peak_bytes(self, plan: Plan, program: Program) -> dict[str, int]:
        """The most that a plan takes in each tier, by `verify` (once per plan).

        Raises:
            PlanError: the plan is wrong.
        """
        return dict(self._ready(plan, program, fuse=False).peak_bytes)

    def reserve(self, nbytes: int) -> None:
        """Make sure that so many bytes can be sealed.

        Raises:
            DoesNotFitError: the budget of "nvme" is smaller.
            StoreError: the disk is.
        """
        if (free_bytes := self._tiers.reserve(nbytes)) < nbytes:
            needed_bytes = self.spilled_bytes + nbytes
            raise DoesNotFitError(
                f"{nbytes:,} B have to be moved out to disk, where {free_bytes:,} B are left of "
                f"what is allowed: raise the nvme space to {needed_bytes:,} B",
                {NVME: needed_bytes},
            )

    def seal(self, name: str, array: jax.Array) -> None:
        """Write an array to disk once: from then on it is a weight, which plans bring as they like.

        The array itself may be changed or deleted when this returns. Plans are made anew.

        Raises:
            PlanError: there is a weight of this name, or no nvme_dir to write to.
            StoreError: the disk refused, or has no space left.
        """
        self._tiers.seal(name, array)
        self._plans.clear()

    def release(self, name: str) -> None:
        """Forget a sealed array; its space is used again. No plan with it may run any more."""
        self._weights = {key: rest for key, rest in self._weights.items() if key[0] != name}
        self._tiers.release(name)

    def limit(self, machine: Machine) -> None:
        """Other budgets from the next plan on. Pages in which no weight lies are given back.

        Weights stay where they are. A bridge, carried out before, frees those that no longer fit,
        and all in the arena's tier if its new budget is above `arena_bytes`.

        Raises:
            PlanError: more than the budgets differ; the executor is closed; weights are in the way.
            StoreError: the system has no address space left; the old budgets stay.
        """
        if self._closed:
            raise PlanError("the executor is closed: open a new one")
        budgets = {tier.name: tier.capacity_bytes for tier in machine.tiers}
        if self.machine.with_capacities(budgets).digest != machine.digest:
            raise PlanError(
                f"machine {machine.name!r} differs from {self.machine.name!r} in more than its "
                "budgets: open another executor"
            )
        tier = machine.tier(arena_tier(machine))
        places = [
            (rest.offset, rest.offset + rounded(self._sources[name].nbytes, tier.alignment_bytes))
            for (name, _), rest in self._weights.items()
            if rest.offset is not None
        ]
        self._tiers.limit(tier.capacity_bytes, union(places))
        self._plans.clear()
        self.machine = machine
        give_back()

    def run(
        self,
        plan: Plan,
        program: Program,
        kernels: Mapping[str, Kernel],
        given: Given,
        *,
        fuse: bool = False,
    ) -> Outcome:
        """Carry out a plan, after `verify` has accepted it (once per plan).

        Args:
            given: all given arrays but the weights. They are taken over: JAX arrays among them are
                deleted when the plan frees or updates them.
            fuse: compile neighbouring Runs as one XLA program, each step's bits unchanged.

        Raises:
            PlanError: the plan is wrong, or weights do not lie where it expects them.
            Exception: whatever a step or transfer raised, with a note of the action that failed.
                The executor then holds no weights outside "nvme" and can be used on.
        """
        if self._closed:
            raise PlanError("the executor is closed: open a new one")
        ready = self._ready(plan, program, fuse)
        admission = self._admit(ready)
        check_given(ready.schedule.given, given)
        callables = self._callables(ready, kernels)
        try:
            return self._carry_out(ready, admission, callables, given)
        except Exception:
            self._tiers.abandon()
            self._weights = {}
            raise
        except BaseException:
            # Ctrl-C: nothing that has not begun is worth waiting for.
            self.close()
            raise

    def prepare(self, plan: Plan, program: Program, kernels: Mapping[str, Any]) -> None:
        """Do now what the first run of a plan would do: check it, and compile its steps.

        Compiling takes memory that nobody plans; it is less in the way before weights are there.
        What it leaves behind is given back.

        Args:
            kernels: jitted functions, or anything else with their `lower`.

        Raises:
            PlanError: the plan is wrong.
        """
        ready = self._ready(plan, program, fuse=False)
        place = self._tiers.device_sharding
        self._callables(ready, kernels)
        wanted = {}
        for op in ready.schedule.ops:
            if isinstance(op, RunOp):
                shapes = tuple(_shape(program.arrays[name], place) for name in op.inputs)
                wanted[op.calls[0].kernel, shapes] = kernels[op.calls[0].kernel]
        for (_, shapes), kernel in wanted.items():
            kernel.lower(*shapes).compile()
        give_back()

    def close(self) -> None:
        """End all threads, remove what is on disk, give the memory back. May be called twice."""
        if not self._closed:
            self._closed = True
            self._weights = {}
            self._plans.clear()
            self._tiers.close()

    def _ready(self, plan: Plan, program: Program, fuse: bool) -> "_Ready":
        key = (id(plan), fuse)
        ready = self._plans.get(key)
        if ready is None or ready.program.digest != program.digest:
            peaks = verify(plan, program, self.machine)
            made = schedule(plan, program, self.machine, fuse=fuse)
            self._check_sources(made)
            if len(self._plans) >= _MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            ready = self._plans[key] = _Ready(plan, program, made, peaks)
        return ready

    def _check_sources(self, made: Schedule) -> None:
        """Everything that the plan brings from disk is there, in the right size."""
        for op in made.ops:
            if not isinstance(op, CopyOp) or NVME not in (op.action.source, op.action.target):
                continue
            name = op.action.array
            if op.spec.kind != "weight":
                if not self._tiers.can_spill:
                    raise PlanError(
                        f"action {op.index} {op.action} moves {name!r} by way of a file: give the "
                        "executor an nvme_dir and nvme_space_bytes"
                    )
            elif name not in self._sources:
                raise PlanError(
                    f"weight {name!r} is not among the {len(self._sources)} sources; add it"
                )
            elif (found := self._sources[name].nbytes) != op.spec.nbytes:
                raise PlanError(
                    f"weight {name!r}: its source has {found:,} B, wanted {op.spec.nbytes:,} B; "
                    "it belongs to another model"
                )

    def _admit(self, ready: "_Ready") -> Admission:
        """Once for each state in which a plan begins: a steady one always begins in the same."""
        if ready.admission is None or ready.admission.held is not self._weights:
            ready.admission = admit(
                self._weights,
                {name: stored.nbytes for name, stored in self._sources.items()},
                ready.schedule,
                ready.program,
                ready.peak_bytes,
                self.machine,
            )
        return ready.admission

    def _callables(self, ready: "_Ready", kernels: Mapping[str, Kernel]) -> list[Kernel]:
        """One for each dispatch, in order; looked up once as long as `kernels` is the same."""
        if ready.kernels is kernels:
            return ready.callables
        runs = [op for op in ready.schedule.ops if isinstance(op, RunOp)]
        for call in (call for op in runs for call in op.calls):
            if call.kernel not in kernels:
                raise PlanError(
                    f"kernel {call.kernel!r} is not among the {len(kernels)} given ones; pass "
                    "those that were traced with the program"
                )
        ready.callables = [self._programs.kernel(op, kernels) for op in runs]
        ready.kernels = kernels
        return ready.callables

    def _carry_out(
        self,
        ready: "_Ready",
        admission: Admission,
        callables: list[Kernel],
        given: Given,
    ) -> Outcome:
        made, tiers = ready.schedule, self._tiers
        if made.weights_after is not made.weights_before:
            # Another phase begins: what the last one left in the heap is as much as 100 MB.
            give_back()
        if ready.peak_bytes[NVME]:
            tiers.reserve(ready.peak_bytes[NVME])
        record = Record(made.actions)
        tiers.use(admission.ranges)
        self._ledger.start(admission.start_bytes)
        for spec in made.given:
            tiers.take_over(DEVICE, spec.name, given[spec.name])
        checked = {} if ready.checked else ready.program.arrays
        carried = tiers.under_way()
        loop = Loop(tiers, self._ledger, record, Flight(record), callables, checked, carried)
        carry_out(loop, made.ops)
        ready.checked = True
        if made.weights_after is not made.weights_before:
            self._weights = {**admission.idle, **made.weights_after}
        for name in made.returned:
            if name in tiers.arriving[DEVICE]:
                tiers.arrive(DEVICE, name)
            tiers.leave(DEVICE, name)
        outputs = {name: tiers.values[DEVICE].pop(name) for name in made.returned}
        return Outcome(outputs, record.spans(), record.carried_s)


def _shape(spec: ArraySpec, place: Sharding) -> Any:
    struct: Any = jax.ShapeDtypeStruct  # untyped
    return struct(spec.shape, np.dtype(spec.dtype), sharding=place)


@dataclasses.dataclass(slots=True)
class _Ready:
    """A plan that was accepted, and what was made of it."""

    plan: Plan
    program: Program
    schedule: Schedule
    peak_bytes: Mapping[str, int]
    admission: Admission | None = None
    kernels: Mapping[str, Kernel] | None = None
    callables: list[Kernel] = dataclasses.field(default_factory=list)
    checked: bool = False
