"""memsched.calibration.spills: values that really leave the device, and come back unchanged."""

import itertools

import jax
import numpy as np
import pytest
from programs import tiny_machine

from memsched.calibration import spills
from memsched.calibration.scratch import Scratch
from memsched.calibration.spills import LAGS, ROWS, STAGES, TESTED_ROWS, leads_out, spill_trials
from memsched.calibration.trials import measure, observations
from memsched.cost.observations import CopyObservation
from memsched.machine import DEVICE, NVME, Machine
from memsched.plan import Action, Copy, Free, Run
from memsched.referee import verify
from memsched.runtime import Executor

MIB = 1 << 20
HERE = tiny_machine(device=256 * MIB, nvme=256 * MIB)
ACCELERATOR = tiny_machine(device=256 * MIB, host=256 * MIB, nvme=256 * MIB)


@pytest.mark.parametrize("machine", [HERE, ACCELERATOR], ids=["main memory", "accelerator"])
def test_every_value_takes_every_link_out_and_back(machine: Machine) -> None:
    trials = list(spill_trials(machine))
    assert len(trials) == len(ROWS) * len(LAGS)
    outwards = list(itertools.pairwise([tier.name for tier in machine.tiers]))
    for trial in trials:
        verify(trial.plan, trial.program, machine)
        copies = [action for action in trial.plan.actions if isinstance(action, Copy)]
        for source, target in outwards:
            for ends in ((source, target), (target, source)):
                moved = [one.array for one in copies if (one.source, one.target) == ends]
                assert len(set(moved)) == len(moved) == STAGES


def test_with_a_lag_values_move_while_the_next_stage_runs() -> None:
    waiting, ahead = itertools.islice(spill_trials(HERE), 2)

    def runs_before_free(actions: tuple[Action, ...]) -> int:
        """Stages that are issued between a value's way out and the end of its stay."""
        first, name = next((i, a.array) for i, a in enumerate(actions) if isinstance(a, Copy))
        last = actions.index(Free(name, DEVICE))
        return sum(isinstance(one, Run) for one in actions[first:last])

    assert runs_before_free(waiting.plan.actions) == 0
    assert runs_before_free(ahead.plan.actions) == LAGS[1]


def test_a_machine_without_room_for_them_has_none() -> None:
    assert not list(spill_trials(tiny_machine(device=64 * MIB, nvme=MIB // 4), TESTED_ROWS))


def test_what_comes_back_is_what_left() -> None:
    with Scratch() as scratch:
        for trial in spill_trials(HERE, (64,)):
            given = {
                name: np.full(trial.program.arrays[name].shape, value, np.float32)
                for name, value in (("x", 0.5), ("matrix", 0.01))
            }
            with Executor(HERE, {}, nvme_dir=scratch.directory, nvme_space_bytes=None) as executor:
                found = executor.run(trial.plan, trial.program, trial.kernels, given)
            wanted = jax.jit(spills._there_and_back)(given["x"], given["matrix"])
            (output,) = trial.program.outputs
            np.testing.assert_allclose(found.outputs[output], wanted, rtol=1e-6)


@pytest.mark.parametrize("lag", LAGS)
def test_only_the_way_out_is_learned(lag: int) -> None:
    trial = list(spill_trials(HERE, (64,)))[LAGS.index(lag)]
    with Scratch() as scratch:
        measured = measure(trial, scratch, passes=2, seconds=5.0)
    # The last step reads the last value that came back: no transfer goes on in the next pass.
    assert measured.carried_s == (0.0, 0.0)
    found = list(observations(trial, measured))
    links = {one.link for one in found if isinstance(one, CopyObservation)}
    assert links == {f"{DEVICE}->{NVME}", f"{NVME}->{DEVICE}"}
    kept = [one for one in found if leads_out(one, HERE)]
    assert {one.link for one in kept} == {f"{DEVICE}->{NVME}"}
    # Transfers that followed one another are one observation, but each of them is counted.
    assert sum(one.copies for one in kept) == 2 * STAGES
