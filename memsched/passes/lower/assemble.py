"""One plan from the actions of weights and those of everything else."""

from memsched.passes.lower.moves import Moves
from memsched.passes.lower.values import Values
from memsched.passes.needs import Needs
from memsched.plan import Action, Plan, Run


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
    return Plan(
        program.digest,
        needs.machine.digest,
        (*needs.home, *moves.entry, *needs.given),
        tuple(actions),
        (*needs.home, *moves.exit, *needs.left),
        slots,
    )
