"""Chains there and back, as programs, for tests of what is computed again."""

from collections.abc import Sequence

import numpy as np
from programs import array, program, tiny_machine

from memsched.cost import Remembered, Roofline
from memsched.passes.lower.values import value_budgets
from memsched.passes.needs import Needs, read_needs
from memsched.program import Program, Step

UNIT = 64


def there_and_back(seed: int, layers: int, *, reads_result: bool, loose: bool = True) -> Program:
    """Layers with states, tapes, cotangents and gradients of random sizes, in units of 64 B."""
    rng = np.random.default_rng(seed)

    def some(low: int, high: int, count: int) -> list[int]:
        return [int(value) for value in rng.integers(low, high + 1, count)]

    state, tape = some(1, 4, layers), some(int(not loose), 4, layers)
    left = some(0, 1 if loose else 0, layers)
    cotangent = some(1, 3 if loose else 1, layers + 1)
    there, back = some(100, 1000, layers), some(200, 2000, layers)
    states = ["x", *(f"state{i + 1}" for i in range(layers))]
    arrays = [array("x", "input", 1)]
    arrays += [array(name, "activation", 16 * state[i]) for i, name in enumerate(states[1:])]
    arrays += [array(f"tape{i}", "activation", 16 * tape[i]) for i in range(layers)]
    arrays += [array(f"back{i}", "activation", 16 * cotangent[i]) for i in range(1, layers + 1)]
    arrays += [array(f"gradient{i}", "activation", 16 * left[i]) for i in range(layers)]
    steps = [
        Step(f"there{i}", "there", (states[i],), (states[i + 1], f"tape{i}"), flops=there[i])
        for i in range(layers)
    ]
    steps.append(Step("loss", "loss", (states[-1],), (f"back{layers}",), flops=1))
    for i in reversed(range(layers)):
        reads = [states[i], f"tape{i}", f"back{i + 1}", *([states[i + 1]] if reads_result else [])]
        writes = [f"gradient{i}", *([f"back{i}"] if i else [])]
        steps.append(Step(f"back{i}", "back", tuple(reads), tuple(writes), flops=back[i]))
    return program(arrays, steps, [f"gradient{i}" for i in range(layers)])


def needs_of(made: Program) -> Needs:
    return read_needs(made, tiny_machine(), Remembered(Roofline()))


def rooms(needs: Needs, shares: tuple[float, ...]) -> list[int]:
    """Memories between the least with everything moved out and the least with nothing."""
    budgets = value_budgets(needs)
    span = budgets.tight - budgets.spilled
    return [int(budgets.spilled + share * span) // UNIT * UNIT for share in shares]


def without_tapes(there: Sequence[int]) -> Program:
    """A chain whose ways back read one state each; all arrays take a unit.

    Its last stage turns round: what it computes is the first cotangent. The seed that it reads lies
    there until then, so the way there has no more room than the way back.
    """
    turn = len(there)
    states = ["x", *(f"state{i + 1}" for i in range(turn))]
    arrays = [array("x", "input", 16), array("seed", "input", 16)]
    arrays += [array(name, "activation", 16) for name in states[1:]]
    arrays += [array(f"back{i}", "activation", 16) for i in range(turn + 1)]
    steps = [
        Step(f"there{i}", "there", (states[i],), (states[i + 1],), flops=there[i])
        for i in range(turn)
    ]
    steps.append(Step("turn", "turn", (states[turn], "seed"), (f"back{turn}",), flops=1))
    for i in reversed(range(turn)):
        steps.append(Step(f"back{i}", "back", (states[i], f"back{i + 1}"), (f"back{i}",), flops=1))
    return program(arrays, steps, ["back0"])
