"""What a program asks of a machine, read once: sizes in each tier, who reads what when, seconds."""

import dataclasses
import functools
from collections.abc import Mapping

from memsched.cost import CostModel, plan_seconds
from memsched.errors import ProgramError
from memsched.machine import DEVICE, HOST, NVME, Machine, rounded
from memsched.passes.judge import Judge
from memsched.plan import Action, Copy, Plan, Residence, Run
from memsched.program import Program


@dataclasses.dataclass(frozen=True)
class Needs:
    """A program on a machine.

    `device_bytes`, `host_bytes` and `nvme_bytes` are what each array takes there, `uses` the steps
    that read or update it, in order. `judge` is who predicts plans in the end, if it is not `cost`,
    by which they are made. `weights` are those that a step reads, in order of first use,
    `all_weights` all of them. `step_s` and `step_weights` go step by step.
    """

    program: Program
    machine: Machine
    cost: CostModel
    device_bytes: Mapping[str, int]
    host_bytes: Mapping[str, int]
    nvme_bytes: Mapping[str, int]
    uses: Mapping[str, tuple[int, ...]]
    weights: tuple[str, ...]
    all_weights: tuple[str, ...]
    arrival_s: Mapping[str, float]
    staging_s: Mapping[str, float]
    step_s: tuple[float, ...]
    step_weights: tuple[tuple[str, ...], ...]
    judge: Judge | None = None

    def seconds(self, plan: Plan) -> float:
        """One round of a plan, as it is predicted in the end."""
        if self.judge is not None:
            return self.judge.seconds(plan)
        return plan_seconds(plan, self.program, self.machine, self.cost)

    def one_by_one_s(self, plan: Plan) -> float:
        """All actions of a plan, one after another, as they are predicted in the end."""
        if self.judge is not None:
            return self.judge.one_by_one_s(plan)
        return sum(self.cost.seconds(one, self.program, self.machine) for one in plan.actions)

    @property
    def device_capacity_bytes(self) -> int:
        """The budget of the device tier."""
        return self.machine.tier(DEVICE).capacity_bytes

    @property
    def source(self) -> str:
        """The tier from which weights come to the device."""
        return NVME if self.machine.device_is_host else HOST

    @functools.cached_property
    def home(self) -> tuple[Residence, ...]:
        """All weights in their files."""
        return tuple(Residence(name, NVME) for name in self.all_weights)

    @functools.cached_property
    def given(self) -> tuple[Residence, ...]:
        """Everything else that is there before the first step."""
        arrays = self.program.arrays
        names = (name for name in self.program.given if arrays[name].kind != "weight")
        return tuple(Residence(name, DEVICE) for name in names)

    @functools.cached_property
    def left(self) -> tuple[Residence, ...]:
        """Everything but weights that is there after the last step."""
        arrays = self.program.arrays
        stays = {*self.program.outputs, *self.program.of_kind("cache", "feature")}
        names = (name for name in arrays if name in stays and arrays[name].kind != "weight")
        return tuple(Residence(name, DEVICE) for name in names)

    @property
    def weights_bytes(self) -> int:
        """What all weights that are read take on the device."""
        return sum(self.device_bytes[name] for name in self.weights)

    @property
    def largest_step_bytes(self) -> int:
        """The most that the weights of one step take on the device: no ring can be smaller."""
        return max((self.step_bytes(names) for names in self.step_weights), default=0)

    def step_bytes(self, names: tuple[str, ...]) -> int:
        """What some arrays take on the device."""
        return sum(self.device_bytes[name] for name in names)


def read_needs(
    program: Program, machine: Machine, cost: CostModel, judge: Judge | None = None
) -> Needs:
    """Reads a program.

    Raises:
        ProgramError: an array is larger than the largest that a tier takes.
    """
    uses: dict[str, list[int]] = {name: [] for name in program.arrays}
    step_weights = []
    for index, step in enumerate(program.steps):
        names = tuple(dict.fromkeys(step.inputs))
        for name in names:
            uses[name].append(index)
        step_weights.append(tuple(name for name in names if _is_weight(program, name)))
    host = HOST if machine.has_tier(HOST) else DEVICE
    sizes = [
        {
            # A weight of no bytes has a place of its own, too.
            name: rounded(max(array.kind == "weight", array.nbytes), tier.alignment_bytes)
            for name, array in program.arrays.items()
        }
        for tier in (machine.tier(DEVICE), machine.tier(host), machine.tier(NVME))
    ]
    weights = tuple(dict.fromkeys(name for names in step_weights for name in names))
    source = NVME if machine.device_is_host else HOST

    def seconds(action: Action) -> float:
        return cost.seconds(action, program, machine)

    needs = Needs(
        program=program,
        machine=machine,
        cost=cost,
        device_bytes=sizes[0],
        host_bytes=sizes[1],
        nvme_bytes=sizes[2],
        uses={name: tuple(steps) for name, steps in uses.items()},
        weights=weights,
        all_weights=program.of_kind("weight"),
        arrival_s={name: seconds(Copy(name, source, DEVICE)) for name in weights},
        staging_s={name: seconds(Copy(name, NVME, HOST)) for name in weights if source == HOST},
        step_s=tuple(seconds(Run(step.name)) for step in program.steps),
        step_weights=tuple(step_weights),
        judge=judge,
    )
    _check_sizes(needs)
    return needs


def _is_weight(program: Program, name: str) -> bool:
    return program.arrays[name].kind == "weight"


def _check_sizes(needs: Needs) -> None:
    """No array that must come to the device is larger than a tier's largest."""
    for tier in needs.machine.tiers:
        if tier.name == NVME:
            continue
        for name, array in needs.program.arrays.items():
            unread = array.kind == "weight" and not needs.uses[name]
            on_the_way = tier.name == DEVICE or array.kind == "weight"
            if on_the_way and not unread and array.nbytes > tier.max_array_bytes:
                # What is no weight grows with what is asked.
                smaller = "split it into row blocks"
                if array.kind != "weight":
                    smaller = "lower the batch or the context"
                raise ProgramError(
                    f"array {name!r} has {array.nbytes:,} B, tier {tier.name!r} takes at most "
                    f"{tier.max_array_bytes:,} B in one array; {smaller}"
                )
