"""Small programs, planned, beside the best that there is."""

import json

import numpy as np
from programs import array, program, tiny_machine
from streaming_bruteforce import best_of_all_orders, best_round_seconds

from memsched.cost import Roofline, plan_seconds
from memsched.passes.compile import compile_plan
from memsched.program import Program, Step
from memsched.referee import verify

PROGRAMS = 200


def chain(rng: np.random.Generator) -> tuple[Program, list[int], list[float]]:
    """Two to six steps that read a weight each: sizes and seconds, alike and very different."""
    count = int(rng.integers(2, 7))
    spread = rng.choice([0.3, 1.0])
    sizes = [64 * int(lines) for lines in np.ceil(8 * np.exp(rng.normal(0, spread, count)))]
    flops = [int(1e6 * seconds) for seconds in np.exp(rng.normal(0, 1, count))]
    states = [f"h{index}" for index in range(count + 1)]
    made = program(
        [array("h0", "input", 1), *(array(name, "activation", 1) for name in states[1:])]
        + [array(f"w{index}", "weight", sizes[index] // 4) for index in range(count)],
        [
            Step(f"s{i}", "k", (states[i], f"w{i}"), (states[i + 1],), flops=flops[i])
            for i in range(count)
        ],
        [states[-1]],
    )
    return made, sizes, [one / 1e6 for one in flops]


def ratios() -> dict[str, list[float]]:
    """Seconds over those of the best of all choices: of plans, and of the best in order of use.

    On a machine whose host holds everything, so that one link counts and the device places weights
    itself; there is room for 35 to 80 % of them. Plans "in an arena" are for a machine without a
    host, where each weight has an offset, which the best of all choices does without.
    """
    found: dict[str, list[float]] = {"plans": [], "in an arena": [], "in order of use": []}
    for seed in range(PROGRAMS):
        rng = np.random.default_rng(seed)
        made, sizes, step_s = chain(rng)
        room = max(int(sum(sizes) * rng.uniform(0.35, 0.8)), int(1.5 * max(sizes))) // 64 * 64
        rate = sum(sizes) / (sum(step_s) * rng.uniform(0.5, 3))
        # Two states of one line each lie beside the weights.
        device = room + 2 * 64
        best = best_of_all_orders(sizes, step_s, rate, room)
        for key, machine in (
            ("plans", tiny_machine(device=device, host=1 << 20, host_bytes_per_s=rate)),
            ("in an arena", tiny_machine(device=device, nvme_bytes_per_s=rate)),
        ):
            plan = compile_plan(made, machine)
            verify(plan, made, machine)
            found[key].append(plan_seconds(plan, made, machine, Roofline()) / best)
        found["in order of use"].append(best_round_seconds(sizes, step_s, rate, room) / best)
    return found


if __name__ == "__main__":
    print(json.dumps(ratios()))
