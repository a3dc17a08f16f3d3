"""What a plan does, as numbers: a pure function of plan, program, machine and cost model."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

from memsched.cost import CostModel, is_steady, lane_of, plan_seconds
from memsched.cost.contention import Contending
from memsched.cost.learned import at_quantile
from memsched.machine import DEVICE, HOST, NVME, Machine
from memsched.plan import Copy, Plan, Run
from memsched.program import Program
from memsched.report.bound import Bound, Prices, bound_and_prices
from memsched.report.occupancy import Occupancy, occupancy
from memsched.report.reasons import Role, of_one, reasons


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayUse:
    """An array, the slowest tier that it comes from or goes to, its part in the plan, and why.

    `reason` is a clause of `reasons`. `moves` counts its copies to the device in one pass.
    `codec_reason` is why it has its codec, where one was chosen.
    """

    name: str
    nbytes: int
    kind: str
    tier: str
    codec: str
    role: Role
    reason: str
    moves: int = 0
    codec_reason: str = ""

    @property
    def why(self) -> str:
        """Its part and the reason for it; after that, the reason for its codec."""
        often = "" if self.moves < 2 else f", {self.moves} times a pass"
        moved = f"; comes from {self.tier}{often}" if self.moves else ""
        codec = f"; {self.codec_reason}" if self.codec_reason else ""
        return f"{self.role}: {of_one(self.reason)}{moved}{codec}"


@dataclasses.dataclass(frozen=True, slots=True)
class LaneUse:
    """A link, or "compute": actions on it, bytes over it (0 for compute), predicted seconds."""

    actions: int
    nbytes: int
    busy_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """A plan in numbers.

    `seconds` is one pass of a plan that can follow itself (`repeated`), else the whole plan;
    `seconds_p90` are enough nine of ten times, None where the cost model knows no quantiles.
    `baselines` are predictions for other ways, None where one does not fit. `prices` are
    None of a plan that cannot follow itself. `contended` says that steps and copies slow each other
    down in these seconds; in those of the bound they never do.
    """

    steps: int
    runs: int
    actions: int
    repeated: bool
    seconds: float
    seconds_p90: float | None
    bound: Bound
    occupancy: Mapping[str, Occupancy]
    lanes: Mapping[str, LaneUse]
    arrays: tuple[ArrayUse, ...]
    baselines: Mapping[str, float | None]
    prices: Prices | None
    contended: bool

    @property
    def gap(self) -> float | None:
        """How much longer than the bound the plan takes, 0.03 for 3 %; None without a bound."""
        return max(0.0, self.seconds / self.bound.seconds - 1) if self.bound.seconds else None

    @property
    def link_bytes(self) -> dict[str, int]:
        """Bytes over each link in one pass."""
        return {lane: use.nbytes for lane, use in self.lanes.items() if lane != "compute"}

    def is_no_faster_than(self, name: str) -> bool:
        """Whether this baseline takes as long: then nothing better was found, or can be."""
        other = self.baselines.get(name)
        return other is not None and math.isclose(self.seconds, other, rel_tol=1e-9)

    def of_role(self, role: Role) -> tuple[ArrayUse, ...]:
        """Arrays with this part, the largest first."""
        found = [use for use in self.arrays if use.role == role]
        return tuple(sorted(found, key=lambda use: (-use.nbytes, use.name)))


def summarize(
    plan: Plan,
    program: Program,
    machine: Machine,
    cost: CostModel,
    baselines: Mapping[str, float | None] | None = None,
) -> Summary:
    """What a plan that is right does. `baselines` are passed on."""
    bound, prices = bound_and_prices(plan, program, machine, cost)
    fullest = occupancy(plan, program, machine)
    high = at_quantile(cost, 0.9)
    return Summary(
        steps=len(program.steps),
        runs=sum(isinstance(action, Run) for action in plan.actions),
        actions=len(plan.actions),
        repeated=is_steady(plan, program),
        seconds=plan_seconds(plan, program, machine, cost),
        seconds_p90=None if high is None else plan_seconds(plan, program, machine, high),
        bound=bound,
        occupancy=fullest,
        lanes=_lanes(plan, program, machine, cost),
        arrays=_arrays(plan, program, machine, fullest[DEVICE]),
        baselines=dict(baselines or {}),
        prices=prices,
        contended=isinstance(cost, Contending),
    )


def _lanes(plan: Plan, program: Program, machine: Machine, cost: CostModel) -> dict[str, LaneUse]:
    """Every lane of the machine, used or not: compute, then the links in the machine's order."""
    actions: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    busy_s: dict[str, float] = {}
    for action in plan.actions:
        if isinstance(action, Copy | Run):
            lane = lane_of(action)
            actions[lane] += 1
            nbytes[lane] += program.arrays[action.array].nbytes if isinstance(action, Copy) else 0
            busy_s[lane] = busy_s.get(lane, 0.0) + cost.seconds(action, program, machine)
    lanes = ["compute", *(f"{link.source}->{link.target}" for link in machine.links)]
    return {lane: LaneUse(actions[lane], nbytes[lane], busy_s.get(lane, 0.0)) for lane in lanes}


def _arrays(
    plan: Plan, program: Program, machine: Machine, device: Occupancy
) -> tuple[ArrayUse, ...]:
    """Every array of the program, in its order."""
    moves: dict[str, list[Copy]] = {name: [] for name in program.arrays}
    for action in plan.actions:
        if isinstance(action, Copy):
            moves[action.array].append(action)
    pinned = {rest.array for rest in plan.entry if rest.tier == DEVICE}
    stays = {rest.array for rest in plan.exit if rest.tier == DEVICE}
    parts = {
        name: (
            _weight_role(moves[name], pinned=name in pinned and name in stays)
            if array.kind == "weight"
            else _other_role(moves[name], stays=name in stays)
        )
        for name, array in program.arrays.items()
    }
    roles = {name: role for name, (role, _) in parts.items()}
    why = reasons(plan, program, machine, roles, device)
    uses = []
    for name, array in program.arrays.items():
        role, tier = parts[name]
        codec = next((move.codec for move in moves[name]), "raw")
        arrivals = sum(move.target == DEVICE for move in moves[name])
        uses.append(
            ArrayUse(name, array.nbytes, array.kind, tier, codec, role, why[name], arrivals)
        )
    return tuple(uses)


def _weight_role(moves: list[Copy], *, pinned: bool) -> tuple[Role, str]:
    if any(move.source == NVME for move in moves):
        return "streamed", NVME
    if moves:
        return "streamed", HOST
    return ("pinned", DEVICE) if pinned else ("unread", NVME)


def _other_role(moves: list[Copy], *, stays: bool) -> tuple[Role, str]:
    targets = {move.target for move in moves if move.target != DEVICE}
    if targets:
        return "spilled", NVME if NVME in targets else HOST
    return ("resident" if stays else "passing"), DEVICE
