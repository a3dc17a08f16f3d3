"""One plan from the actions of weights and those of everything else."""

from memsched.machine import DEVICE, NVME
from memsched.passes.lower.moves import Moves
from memsched.passes.lower.values import Values
from memsched.passes.needs import Needs
from memsched.plan import Action, Plan, Residence, Run


def assemble(needs: Needs, moves: Moves, values: Values) -> Plan:
    """Puts the actions of weights before those of other arrays, and both between the steps.

    Weights come first because a Free of theirs waits for a step that is further back.
    """
    program = needs.program
    actions: list[Action] = []
    slots: dict[int, int] = {}
    for index in range(len(program.steps) + 1):
        for move in moves.before[index]:
            if move.slot is not None:
                slots[len(actions)] = move.slot
            actions.append(move.action)
        actions += values.before[index]
        if index < len(program.steps):
            actions.append(Run(program.steps[index].name))
    home = tuple(Residence(name, NVME) for name in needs.all_weights)
    stays = {*program.outputs, *program.of_kind("cache", "feature")}
    given = tuple(Residence(name, DEVICE) for name in program.given if not _weight(needs, name))
    left = tuple(
        Residence(name, DEVICE)
        for name in program.arrays
        if name in stays and not _weight(needs, name)
    )
    return Plan(
        program.digest,
        needs.machine.digest,
        (*home, *moves.entry, *given),
        tuple(actions),
        (*home, *moves.exit, *left),
        slots,
    )


def _weight(needs: Needs, name: str) -> bool:
    return needs.program.arrays[name].kind == "weight"
