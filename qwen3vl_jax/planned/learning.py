"""Adds what a run measured to its machine's calibration, and says whether that still holds."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from memsched.cost.drift import Drift, drifts
from memsched.cost.learned import LearnedCost
from memsched.cost.observation_file import append
from memsched.detection.calibrated import observation_file, user_profile
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.planned.loading import planned_runner
from qwen3vl_jax.planned.runner import PlannedRunner
from qwen3vl_jax.planned.tally import MOVING


@dataclasses.dataclass(frozen=True, slots=True)
class Learned:
    """How many observations were added, and by phase the lanes that left their band."""

    observations: int
    file: Path
    drifted: tuple[tuple[str, Drift], ...]

    def text(self) -> str:
        """One line, and one more for every lane that is not as it was calibrated."""
        lines = [
            f"learned {self.observations} observations; scripts/calibrate.py --from-runs fits them"
            if self.observations
            else f"learned nothing: {self.file} is full; scripts/calibrate.py --from-runs fits it"
        ]
        lines += [
            f"{phase}: {one.lane} took {one.ratio:.2f} times what was predicted, and up to "
            f"{one.most:.2f} was expected; run scripts/calibrate.py again"
            for phase, one in self.drifted
        ]
        return "\n".join(lines)


def check_learning(machine_file: Path | None) -> None:
    """Raises UsageError if the machine was not calibrated: rates found anew differ every time."""
    profile = machine_file or user_profile()
    if not profile.exists():
        raise UsageError(
            f"--learn adds to a calibration, and there is none in {profile}; run "
            "scripts/calibrate.py first"
        )


def learn(model: Qwen3VL, machine_file: Path | None) -> Learned:
    """Adds the newest pass of every plan that a model has carried out.

    Raises:
        UsageError: the model has no plans, or nothing was learned of its machine before.
        StoreError: the file cannot be written.
    """
    runner, file = planned_runner(model), observation_file(machine_file or user_profile())
    if not isinstance(runner.cost, LearnedCost):
        raise UsageError(
            "--learn: the calibration is of another processor or of other tiers; run "
            "scripts/calibrate.py here first"
        )
    added = sum(
        append(file, tally.plan, tally.program, runner.machine, tally.spans, tally.carried_s)
        for tally in runner.tallies.values()
    )
    return Learned(added, file, tuple(_drifted(runner, runner.cost)))


def _drifted(runner: PlannedRunner, cost: LearnedCost) -> Iterator[tuple[str, Drift]]:
    for tally in runner.tallies.values():
        if tally.phase != MOVING and tally.spans:
            found = drifts(
                tally.plan, tally.program, runner.machine, cost, tally.spans, tally.carried_s
            )
            yield from ((tally.phase, one) for one in found if one.out)
