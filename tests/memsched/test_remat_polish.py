"""What orders with repeated runs need, against a count of what is wanted at every place."""

import numpy as np
import pytest
from remat_chains import needs_of, there_and_back

from memsched.passes.remat_order import Order
from memsched.passes.remat_polish import read_lives, read_runs, repeated
from memsched.program import Program


def wanted_bytes(program: Program, nbytes: dict[str, int], order: Order) -> int:
    """The most that lies there at once, if it is what somebody reads before it is made again."""
    steps, most = [program.steps[index] for index in order], 0
    for place, step in enumerate(steps):
        lies = set(step.writes)
        wanted = set(program.outputs)
        for later in reversed(steps[place + 1 :]):
            wanted = wanted - set(later.writes) | set(later.inputs)
        lies |= wanted | set(step.inputs)
        most = max(most, sum(nbytes[name] for name in lies) + step.workspace_bytes)
    return max(most, sum(nbytes[name] for name in program.given))


@pytest.mark.parametrize("seed", range(8))
def test_what_an_order_takes_without_a_run_is_known_before_it_is_left_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    program = there_and_back(seed, 4, reads_result=bool(seed % 2))
    needs = needs_of(program)
    nbytes = {name: needs.device_bytes[name] for name in program.arrays}
    runs = read_runs(program, nbytes, needs.step_s)
    order = list(range(len(program.steps)))
    for index in rng.choice(sorted(runs.again), 5):
        order.insert(int(rng.integers(order.index(index) + 1, len(order) + 1)), int(index))
    lives = read_lives(runs, tuple(order))
    assert lives.peak_bytes() == wanted_bytes(program, nbytes, tuple(order))
    places = repeated(tuple(order))
    assert len(places) == 5
    for place in places:
        fewer = tuple(order[:place] + order[place + 1 :])
        assert lives.peak_without(place) == wanted_bytes(program, nbytes, fewer)
