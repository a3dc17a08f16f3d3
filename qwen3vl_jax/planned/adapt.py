"""A model that gives memory back when others need it, and takes it again when they do not.

    with adapting(model):
        model.generate(...)

Between two passes, at most every 50 ms, it looks at free memory, control groups and stalls
(`memsched.pressure`) and gives the runner another budget if that is better. No thread is needed:
while nothing is computed, nothing grows. The budget that the user gave is never exceeded, and no
request is refused that it would have been enough for.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from memsched.detection.memory_limits import ROOT
from memsched.errors import DoesNotFitError, StoreError
from memsched.pressure import Observation, Sensor, State, budget_for, following
from memsched.runtime.schedule import arena_tier
from memsched.sizes import format_size
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.planned.loading import planned_runner
from qwen3vl_jax.planned.runner import PlannedRunner

INTERVAL_S = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A budget that was changed, what was seen then, and how long it took to plan anew."""

    before_bytes: int
    after_bytes: int
    seen: Observation
    seconds: float

    def __str__(self) -> str:
        """One line for people."""
        sizes = f"{format_size(self.before_bytes)} to {format_size(self.after_bytes)}"
        stalls = self.seen.stalled_percent
        waited = "" if stalls is None else f", tasks waited {stalls:.0f} % of the time"
        return (
            f"budget from {sizes} in {self.seconds:.2f} s: {self.seen.limit}, "
            f"{self.seen.spare_bytes / 1e6:+,.0f} MB to its margin{waited}"
        )


@contextlib.contextmanager
def adapting(
    model: Qwen3VL,
    *,
    say: Callable[[str], None] | None = None,
    root: Path = ROOT,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator["Adaptation"]:
    """Lets a planned model adapt to memory pressure while the block runs.

    Args:
        say: gets a line for every change, and for what this system does not tell.
        root: where /proc and /sys are found.
        clock: seconds that never go back.

    Raises:
        UsageError: the model has no plans, has them from a file, or adapts already.
    """
    runner = planned_runner(model)
    runner.timetable.check_replannable()
    if runner.watcher is not None:
        raise UsageError("the model adapts already; leave the other `adapting` first")
    with Sensor(root, clock=clock) as sensor:
        if say is not None:
            for note in sensor.notes:
                say(note)
        runner.watcher = adaptation = Adaptation(runner, sensor, clock, say)
        try:
            yield adaptation
        finally:
            runner.watcher = None


class Adaptation:
    """The `Watcher` of a runner. `changes` has what it did so far."""

    def __init__(
        self,
        runner: PlannedRunner,
        sensor: Sensor,
        clock: Callable[[], float],
        say: Callable[[str], None] | None,
    ) -> None:
        self._runner, self._sensor, self._clock, self._say = runner, sensor, clock, say
        self._tier = arena_tier(runner.machine)
        self._state = State(ceiling_bytes=self.budget_bytes, budget_bytes=self.budget_bytes)
        self._floors: dict[str, int] = {}  # the least that works, by phase
        self._looked_s: float | None = None
        self.changes: list[Change] = []

    @property
    def budget_bytes(self) -> int:
        """The budget in force, of the memory that is watched."""
        return self._runner.machine.tier(self._tier).capacity_bytes

    def before_pass(self, phase: str, peak_bytes: Mapping[str, int]) -> None:
        """Looks, if it is time to, and changes the budget if that is better."""
        now_s = self._clock()
        if self._looked_s is not None and now_s - self._looked_s < INTERVAL_S:
            return
        self._looked_s = now_s
        if self._changed_by_user():
            return  # what is in use is counted anew after the next pass
        state = dataclasses.replace(
            self._state,
            floor_bytes=self._floors.get(phase, 0),
            used_bytes=self._runner.executor.used_bytes[self._tier],
            needed_bytes=peak_bytes[self._tier],
        )
        seen = self._sensor.observe()
        wanted = budget_for(seen, state)
        changed = None if wanted is None else self._change(wanted, seen, phase)
        if wanted is not None and changed is None:
            state = dataclasses.replace(state, calm_since_s=None)  # not again at the next look
        self._state = following(seen, state, changed)

    def refused(self, error: DoesNotFitError) -> bool:
        """Goes back to the user's budget: a new phase has no plan with the one in force."""
        ceiling = self._state.ceiling_bytes
        if self._changed_by_user() or self.budget_bytes >= ceiling:
            return False
        if self._limit(ceiling, self._sensor.observe()) is not None:
            return False
        self._state = State(ceiling_bytes=ceiling, budget_bytes=ceiling)
        return True

    def _changed_by_user(self) -> bool:
        """Whether somebody else has changed the budget: then that is the most from now on."""
        budget = self.budget_bytes
        changed = budget != self._state.budget_bytes
        if changed:
            self._state = State(ceiling_bytes=budget, budget_bytes=budget)
        return changed

    def _change(self, wanted_bytes: int, seen: Observation, phase: str) -> int | None:
        """Changes to a budget, or to the least that works; returns the new one if there is one."""
        failed = self._limit(wanted_bytes, seen)
        if isinstance(failed, DoesNotFitError):
            least = failed.smallest.get(self._tier, self.budget_bytes)
            failed = self._limit(least, seen) if least < self.budget_bytes else failed
            # What does not work though it should is not tried at every look.
            self._floors[phase] = least if failed is None else max(least, self.budget_bytes)
        return self.budget_bytes if failed is None else None

    def _limit(self, nbytes: int, seen: Observation) -> DoesNotFitError | StoreError | None:
        """Another budget, or why that in force stays: with it the answer can go on."""
        before, started_s = self.budget_bytes, time.perf_counter()
        try:
            self._runner.limit(self._runner.machine.with_capacities({self._tier: nbytes}))
        except (DoesNotFitError, StoreError) as error:
            return error
        change = Change(before, nbytes, seen, time.perf_counter() - started_s)
        self.changes.append(change)
        if self._say is not None:
            self._say(str(change))
        return None
