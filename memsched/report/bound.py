"""Seconds that no schedule can beat, and what more memory would be worth.

Every step must run once, and the weights that no tier can keep from one pass to the next must cross
a link in every pass. Whatever is kept counts as kept in the best way that there could be.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from memsched.cost import CostModel, is_steady
from memsched.machine import DEVICE, HOST, NVME, Machine, rounded
from memsched.plan import Plan, Residence, Run
from memsched.program import Program

COMPUTE = "compute"
PRICED_BYTES = 10**9


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """Each lane is busy for at least so many seconds; the slowest of them bounds the pass."""

    lane_s: Mapping[str, float]

    @property
    def lane(self) -> str:
        """The lane that sets the bound."""
        return max(self.lane_s, key=lambda lane: self.lane_s[lane])

    @property
    def seconds(self) -> float:
        """What no schedule can beat."""
        return self.lane_s[self.lane]


def lower_bound(plan: Plan, program: Program, machine: Machine, cost: CostModel) -> Bound:
    """The bound of all plans that could stand in the place of this one.

    If it can follow itself, they may keep anything that fits; else they have its entry and exit.
    """
    lanes = {COMPUTE: sum(cost.seconds(Run(step.name), program, machine) for step in program.steps)}
    for (source, target), nbytes in _crossing_bytes(plan, program, machine).items():
        link = machine.link(source, target)
        if link is not None:
            lanes[f"{source}->{target}"] = nbytes / link.bytes_per_s
    return Bound(lanes)


def prices_s_per_gb(
    plan: Plan, program: Program, machine: Machine, cost: CostModel
) -> dict[str, float]:
    """By how many seconds the bound falls with 1 GB more of a tier; none for the disk."""
    now = lower_bound(plan, program, machine, cost).seconds
    prices = {}
    for tier in machine.tiers:
        if tier.name != NVME:
            more = machine.with_capacities({tier.name: tier.capacity_bytes + PRICED_BYTES})
            prices[tier.name] = now - lower_bound(plan, program, more, cost).seconds
    return prices


def _crossing_bytes(plan: Plan, program: Program, machine: Machine) -> dict[tuple[str, str], int]:
    """Weight bytes that must cross each link on the way to the device."""
    near = DEVICE if machine.device_is_host else HOST
    weights = set(program.of_kind("weight"))
    wanted = {name for step in program.steps for name in step.reads} & weights
    if is_steady(plan, program):
        missing = _bytes(wanted, program) - _room_bytes(program, machine)
        crossing = {(NVME, near): missing - machine.tier(near).capacity_bytes * (near == HOST)}
        if near == HOST:
            crossing[HOST, DEVICE] = missing
    else:
        to_device = (wanted | _in(DEVICE, plan.exit)) & weights - _in(DEVICE, plan.entry)
        in_memory = _in(DEVICE, plan.entry) | _in(HOST, plan.entry)
        from_disk = (to_device | _in(HOST, plan.exit)) & weights - in_memory
        crossing = {(NVME, near): _bytes(from_disk, program)}
        if near == HOST:
            crossing[HOST, DEVICE] = _bytes(to_device, program)
    return {link: max(0, nbytes) for link, nbytes in crossing.items()}


def _room_bytes(program: Program, machine: Machine) -> int:
    """The most that can be kept on the device between passes: caches and features stay too."""
    tier = machine.tier(DEVICE)
    stays = {*program.given} & {*program.of_kind("cache", "feature")}
    kept = sum(rounded(program.arrays[name].nbytes, tier.alignment_bytes) for name in stays)
    return max(0, tier.capacity_bytes - kept)


def _in(tier: str, rests: Iterable[Residence]) -> set[str]:
    return {rest.array for rest in rests if rest.tier == tier}


def _bytes(names: Iterable[str], program: Program) -> int:
    return sum(program.arrays[name].nbytes for name in names)
