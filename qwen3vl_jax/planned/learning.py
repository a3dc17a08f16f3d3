"""Adds what a run measured to its machine's calibration, and says whether that still holds."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax

from memsched.cost.coefficients_file import cost_beside, cost_file
from memsched.cost.drift import Drift, drifts
from memsched.cost.learned import LearnedCost
from memsched.cost.observation_file import check_writable, write
from memsched.cost.observations import Observation, observe
from memsched.cost.rates import rates_digest
from memsched.detection.calibrated import check_hardware, observation_file, user_profile
from memsched.profiles import load_machine
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.planned.loading import planned_runner
from qwen3vl_jax.planned.runner import PlannedRunner
from qwen3vl_jax.planned.tally import MOVING


@dataclasses.dataclass(frozen=True, slots=True)
class Learned:
    """How many observations a run made, how many of them were added (all or none), and by phase
    the lanes that left their band.
    """

    found: int
    added: int
    file: Path
    drifted: tuple[tuple[str, Drift], ...]

    def text(self) -> str:
        """One line, and one more for every lane that is not as it was calibrated."""
        if not self.found:
            first = (
                "learned nothing: no plan was carried out twice, and the first pass is cold; ask "
                "for a longer answer"
            )
        elif not self.added:
            first = (
                f"learned nothing: {self.file} has no room for {self.found} observations; "
                "scripts/calibrate.py --from-runs fits those in it, and makes room"
            )
        else:
            first = f"learned {self.added} observations; scripts/calibrate.py --from-runs fits them"
        again = "run scripts/calibrate.py again"
        return "\n".join([first, *(f"{phase}: {one}; {again}" for phase, one in self.drifted)])


def check_learning(machine_file: Path | None) -> None:
    """Whether a run can add to a machine's calibration, before anything is loaded.

    Raises:
        UsageError: there is none, for rates found anew differ every time; or it is of a platform
            that JAX does not compute on here.
        ProgramError: it is of other hardware, or its TOML breaks a rule.
        DamagedError: its cost model is damaged, or of other rates.
        StoreError: nothing can be written there.
    """
    profile = machine_file or user_profile()
    if not profile.exists():
        raise UsageError(
            f"--learn adds to a calibration, and there is none in {profile}; run "
            "scripts/calibrate.py first"
        )
    machine = load_machine(profile)
    cost = cost_beside(profile, machine)
    if not isinstance(cost, LearnedCost):
        raise UsageError(
            f"--learn adds to a calibration, and {profile} has no cost model beside it in "
            f"{cost_file(profile).name}; run scripts/calibrate.py first"
        )
    check_hardware(cost, profile)
    platform = jax.local_devices()[0].platform
    if machine.platform != platform:
        raise UsageError(
            f"--learn: {profile} is of platform {machine.platform!r}, and JAX computes on "
            f"{platform!r}; run scripts/calibrate.py here, with another --out"
        )
    check_writable(observation_file(profile))


def learn(model: Qwen3VL, machine_file: Path | None) -> Learned:
    """Adds the newest pass of every plan that a model has carried out more than once.

    Raises:
        UsageError: the model has no plans, or nothing was learned of its machine before.
        StoreError: the file cannot be written.
    """
    runner, file = planned_runner(model), observation_file(machine_file or user_profile())
    if not isinstance(runner.cost, LearnedCost):
        raise UsageError(
            "--learn: nothing was learned of this machine before; run scripts/calibrate.py first"
        )
    found = tuple(_observations(runner))
    added = write(file, rates_digest(runner.machine), found)
    return Learned(len(found), added, file, tuple(_drifted(runner, runner.cost)))


def _observations(runner: PlannedRunner) -> Iterator[Observation]:
    for one in runner.tallies.values():
        yield from observe(
            one.plan, one.program, runner.machine, one.spans, carried_s=one.carried_s
        )


def _drifted(runner: PlannedRunner, cost: LearnedCost) -> Iterator[tuple[str, Drift]]:
    for tally in runner.tallies.values():
        if tally.phase != MOVING:
            found = drifts(
                tally.plan, tally.program, runner.machine, cost, tally.spans, tally.carried_s
            )
            yield from ((tally.phase, one) for one in found if one.out)
