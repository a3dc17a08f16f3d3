"""Seconds that no schedule can beat, and what more memory would be worth.

Every step must run once, and the weights that no tier can keep from one pass to the next must cross
a link in every pass. Whatever is kept counts as kept in the best way that there could be.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from memsched.bound import Masses, least_busy_s, read_masses, solve
from memsched.cost import CostModel, is_steady
from memsched.machine import DEVICE, HOST, NVME, Machine
from memsched.plan import Copy, Plan, Residence, Run
from memsched.program import Program

COMPUTE = "compute"
PRICED_BYTES = 10**9


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """Each lane is busy for at least so many seconds; the slowest of them bounds the pass.

    `together_s` bounds it, too: what spares one lane need not spare another.
    """

    lane_s: Mapping[str, float]
    together_s: float = 0.0

    @property
    def lane(self) -> str:
        """The lane that sets the bound."""
        return max(self.lane_s, key=lambda lane: self.lane_s[lane])

    @property
    def seconds(self) -> float:
        """What no schedule can beat."""
        return max(self.lane_s[self.lane], self.together_s)


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """By how many seconds a steady plan's bound falls with more of something.

    `with_gb_more_s` is for 1 GB more of each tier but the disk, solved again. The others are the
    dual values of `memsched.bound.Solution`, for a little more: `seconds_per_gb` of such a tier,
    `seconds_of_lane` of each lane. Where the bound has a kink, these lie between what less would
    cost and what more would bring.
    """

    with_gb_more_s: Mapping[str, float]
    seconds_per_gb: Mapping[str, float]
    seconds_of_lane: Mapping[str, float]


def lower_bound(plan: Plan, program: Program, machine: Machine, cost: CostModel) -> Bound:
    """The bound of all plans that could stand in the place of this one.

    If it can follow itself, they may keep anything that fits; else they have its entry and exit.
    """
    if is_steady(plan, program):
        masses = read_masses(program, machine, cost)
        return Bound(least_busy_s(masses), solve(masses).seconds)
    lanes = {COMPUTE: sum(cost.seconds(Run(step.name), program, machine) for step in program.steps)}
    for (source, target), names in _crossing(plan, program, machine).items():
        if machine.link(source, target) is not None:
            copies = (Copy(name, source, target) for name in sorted(names))
            lane = f"{source}->{target}"
            lanes[lane] = sum(cost.seconds(copy, program, machine) for copy in copies)
    return Bound(lanes)


def bound_and_prices(
    plan: Plan, program: Program, machine: Machine, cost: CostModel
) -> tuple[Bound, Prices | None]:
    """`lower_bound` and prices of a program that is read once; no prices of a plan that is not
    steady: its bound comes from no optimum.
    """
    if not is_steady(plan, program):
        return lower_bound(plan, program, machine, cost), None
    masses = read_masses(program, machine, cost)
    found = solve(masses)
    tiers = [tier.name for tier in machine.tiers if tier.name != NVME]
    more_s = dict.fromkeys(tiers, 0.0)
    if found.seconds > masses.compute_s:  # no pass is shorter than its steps, whatever the room
        more_s = {tier: found.seconds - solve(_with_more(masses, tier)).seconds for tier in tiers}
    prices = Prices(more_s, found.seconds_per_gb, found.seconds_of_lane)
    return Bound(least_busy_s(masses), found.seconds), prices


def _with_more(masses: Masses, tier: str) -> Masses:
    """The same with 1 GB more of a tier."""
    if tier == DEVICE:
        more = masses.device_capacity_bytes + PRICED_BYTES
        return dataclasses.replace(masses, device_capacity_bytes=more)
    more = (masses.host_capacity_bytes or 0) + PRICED_BYTES
    return dataclasses.replace(masses, host_capacity_bytes=more)


def _crossing(
    plan: Plan, program: Program, machine: Machine
) -> dict[tuple[str, str], frozenset[str]]:
    """Weights that must cross each link on the way to the device, in a plan that runs once."""
    near = DEVICE if machine.device_is_host else HOST
    weights = set(program.of_kind("weight"))
    wanted = {name for step in program.steps for name in step.reads} & weights
    to_device = (wanted | _in(DEVICE, plan.exit)) & weights - _in(DEVICE, plan.entry)
    in_memory = _in(DEVICE, plan.entry) | _in(HOST, plan.entry)
    from_disk = (to_device | _in(HOST, plan.exit)) & weights - in_memory
    crossing = {(NVME, near): frozenset(from_disk)}
    if near == HOST:
        crossing[HOST, DEVICE] = frozenset(to_device)
    return crossing


def _in(tier: str, rests: Iterable[Residence]) -> set[str]:
    return {rest.array for rest in rests if rest.tier == tier}
