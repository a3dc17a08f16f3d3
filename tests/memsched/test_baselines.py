"""Plain ways to run a program: valid, and never faster than the plan that is chosen."""

import numpy as np
import pytest
from decoders import computer, decoder
from programs import random_program, tiny_machine

from memsched.cost import Roofline, plan_seconds
from memsched.errors import DoesNotFitError
from memsched.passes.baselines import baselines
from memsched.passes.compile import compile_plan
from memsched.referee import verify

CACHES = {"lru", "clock", "adaptive"}


@pytest.mark.parametrize("seed", range(12))
def test_no_plain_way_is_faster_than_the_plan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = random_program(rng, steps=int(rng.integers(2, 10)), weights=int(rng.integers(3, 9)))
    host = [None, int(rng.integers(600, 4000))][seed % 2]
    machine = tiny_machine(device=int(rng.integers(900, 2500)), host=host)
    try:
        found = baselines(made, machine)
    except DoesNotFitError as error:
        found = baselines(made, machine.with_capacities(error.smallest))
        machine = machine.with_capacities(error.smallest)
    chosen = plan_seconds(compile_plan(made, machine), made, machine, Roofline())
    assert found
    for name, one in found.items():
        assert one.plan is not None
        verify(one.plan, made, machine)
        assert one.seconds >= chosen * (1 - 1e-9), name


def test_a_decoder_streams_several_times_faster_than_a_cache() -> None:
    made, machine = decoder(), computer(device=2_000_000_000)
    found = baselines(made, machine)
    names = {"tail spill"} | CACHES | {f"{name} + prefetch" for name in CACHES}
    assert found.keys() == names
    chosen = plan_seconds(compile_plan(made, machine), made, machine, Roofline())
    assert all(one.seconds >= chosen for one in found.values())
    model_bytes = sum(spec.nbytes for spec in made.arrays.values() if spec.kind == "weight")
    # A cycle larger than the cache: every weight is read from disk for every token.
    for name in ("lru", "clock"):
        assert found[name].seconds > model_bytes / 1e9
        assert found[f"{name} + prefetch"].seconds > 1.8 * chosen
    for name in CACHES:
        assert found[f"{name} + prefetch"].seconds < found[name].seconds


def test_what_fits_has_one_way() -> None:
    made, machine = decoder(layers=2), computer(device=2_000_000_000)
    found = baselines(made, machine)
    assert found.keys() == {"resident"}
    assert found["resident"].plan == compile_plan(made, machine)
