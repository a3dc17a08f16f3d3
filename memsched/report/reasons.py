"""Why an array is where it is: a clause that text, data and page say alike.

A clause follows from the plan itself. `{it}` and `{its}` stand for one array or for several.
"""

from collections.abc import Mapping
from typing import Literal

from memsched.cost import is_steady
from memsched.machine import DEVICE, Machine
from memsched.plan import Plan
from memsched.program import Program
from memsched.report.occupancy import IDLE, Occupancy

# pinned: a weight that stays on the device. streamed: one that is copied there, from the tier that
# keeps it. spilled: leaves the device and comes back. resident: given and stays. passing: given or
# made, and freed. unread: a weight that no step of this program reads.
Role = Literal["pinned", "streamed", "spilled", "resident", "passing", "unread"]

EVERY_PASS = "every pass reads {it}"
OTHER_PLAN = "another plan reads {it}"
NEXT_NEEDS = "what comes next needs {it}"
NEXT_FINDS = "the next plan finds {it} on the device"
GIVES_UP = "the plan before kept {it}, this one does not"
NO_ROOM = "there is no room to keep {it}"
ROOM_FOR_NEXT = "{its} room is kept for the next plan"
COULD_STAY = "nothing keeps {it}, though all weights that are read would fit"
MEANWHILE = "others need {its} room meanwhile"
FREED = "others get {its} room"
UNREAD = "no step of this plan reads {it}"


def reasons(
    plan: Plan, program: Program, machine: Machine, roles: Mapping[str, Role], device: Occupancy
) -> dict[str, str]:
    """A clause for each array. `device` is the device's fullest moment."""
    read = {name for step in program.steps for name in step.inputs}
    repeated = is_steady(plan, program)
    before, after = (
        {rest.array for rest in rests if rest.tier == DEVICE} for rests in (plan.entry, plan.exit)
    )
    not_kept = _why_not_kept(program, machine, roles, read, device)

    def streamed(name: str) -> str:
        if name not in read:
            return OTHER_PLAN
        if name in after and name not in before:
            return NEXT_FINDS
        if name in before and name not in after and not repeated:
            return GIVES_UP
        return not_kept

    def reason(name: str, role: Role) -> str:
        match role:
            case "pinned" if name not in read:
                return OTHER_PLAN
            case "pinned":
                return EVERY_PASS if repeated else NEXT_NEEDS
            case "streamed":
                return streamed(name)
            case "spilled":
                return MEANWHILE
            case "resident":
                return NEXT_NEEDS
            case "passing":
                return FREED
            case "unread":
                return UNREAD

    return {name: reason(name, role) for name, role in roles.items()}


def of_one(reason: str) -> str:
    """A clause about one array."""
    return reason.format(it="it", its="its")


def of_many(reason: str) -> str:
    """A clause about several."""
    return reason.format(it="them", its="their")


def _why_not_kept(
    program: Program,
    machine: Machine,
    roles: Mapping[str, Role],
    read: set[str],
    device: Occupancy,
) -> str:
    """Of weights that are brought in every pass: what has the room that they would need."""
    weights = program.of_kind("weight")
    wanted_bytes = sum(program.arrays[name].nbytes for name in weights if name in read)
    for_next_bytes = sum(
        program.arrays[name].nbytes
        for name in weights
        if roles[name] == "pinned" and name not in read
    )
    rest_bytes = sum(n for part, n in device.parts.items() if part not in ("weight", IDLE))
    room_bytes = machine.tier(DEVICE).capacity_bytes - rest_bytes - wanted_bytes
    if room_bytes < 0:
        return NO_ROOM
    return ROOM_FOR_NEXT if room_bytes < for_next_bytes else COULD_STAY
