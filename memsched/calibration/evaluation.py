"""How far predictions are off, for programs that nothing was fitted to.

Beside every error stands the noise floor: the error of predicting a case by its own measurement of
the round before. No model can do better than that on a machine that changes its speed.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from memsched.calibration.resident import PROCESS_BYTES
from memsched.calibration.spills import leads_out
from memsched.calibration.trials import Measured, Trial, observations
from memsched.cost.coefficients import stretched
from memsched.cost.learned import LearnedCost
from memsched.cost.observations import CopyObservation, Observation, RunObservation
from memsched.cost.simulate import plan_seconds
from memsched.machine import DEVICE
from memsched.referee import verify

QUANTILE = 0.9
# A step is small that takes less than this part of its pass: hardly more than its dispatch.
SMALL = 0.01
Rounds = Mapping[str, Sequence[Measured]]


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Errors of one class of cases: of all medians in each round.

    `noise` and `worst_noise` are those of predicting by the round before. `worst_case` is the worst
    error of the medians over all rounds of each case. `covered` is the part of single measurements
    below the 90 % quantile. None is what nothing says: in one round there is no noise, and of a
    link that nothing was fitted to no error.
    """

    what: str
    cases: int
    median: float | None
    worst: float | None
    noise: float | None
    worst_noise: float | None
    worst_case: float | None
    covered: float


@dataclasses.dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that a trial took on the device, predicted and measured.

    `ledger_bytes` by the runtime's count, `resident_bytes` by the system's, None where it has none.
    `process_bytes` is predicted of the latter, where the device computes in main memory.
    """

    name: str
    predicted_bytes: int
    process_bytes: int
    ledger_bytes: int
    resident_bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Single:
    """One duration: measured, predicted, and the predicted quantile."""

    measured_s: float
    predicted_s: float
    high_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Sample:
    """A case in one round: equal steps of a trial, or equal rows of transfers.

    What ran beside them belongs to each single one: predictions are made for that.
    """

    key: tuple[object, ...]
    singles: tuple[_Single, ...]

    @property
    def measured_s(self) -> float:
        """The median."""
        return statistics.median(one.measured_s for one in self.singles)

    @property
    def predicted_s(self) -> float:
        """The median."""
        return statistics.median(one.predicted_s for one in self.singles)

    @property
    def error(self) -> float:
        """Of the one by the other."""
        return abs(self.predicted_s / self.measured_s - 1.0)


def scores(trials: Sequence[Trial], rounds: Rounds, cost: LearnedCost) -> tuple[Score, ...]:
    """Steps, transfers and whole passes of some trials, measured in several rounds each."""
    high = cost.at(QUANTILE)
    whats = ("steps", "small steps", "transfers", "whole passes")
    found: dict[str, list[list[_Sample]]] = {what: [] for what in whats}
    for trial in trials:
        for measured in rounds[trial.name]:
            steps, transfers = _samples(trial, observations(trial, measured), cost, high)
            least_s = SMALL * statistics.median(measured.seconds)
            large = [one for one in steps if one.measured_s >= least_s]
            found["steps"].append(large)
            found["small steps"].append([one for one in steps if one not in large])
            found["transfers"].append(transfers)
            found["whole passes"].append([_pass(trial, measured, cost, high)])
    return tuple(_score(what, some) for what, some in found.items() if any(some))


def moves_score(trials: Sequence[Trial], rounds: Rounds, cost: LearnedCost) -> tuple[Score, ...]:
    """Values moved out, by trials that do that; none if nothing was."""
    high, found = cost.at(QUANTILE), []
    for trial in trials:
        for measured in rounds[trial.name]:
            some = observations(trial, measured)
            away = [one for one in some if leads_out(one, trial.machine)]
            found.append(_samples(trial, away, cost, high)[1])
    return (_score("moved out", found),) if any(found) else ()


def peaks(trials: Sequence[Trial], rounds: Rounds) -> tuple[Peak, ...]:
    """Memory of all trials; of the rounds after the first, which also compiled."""
    return tuple(
        Peak(
            trial.name,
            planned,
            planned + PROCESS_BYTES,
            max(one.ledger_bytes[DEVICE] for one in rounds[trial.name]),
            max((one.resident_bytes for one in later if one.resident_bytes), default=None),
        )
        for trial in trials
        for later in [rounds[trial.name][1:]]
        for planned in [verify(trial.plan, trial.program, trial.machine)[DEVICE]]
    )


def _samples(
    trial: Trial, found: Iterable[Observation], cost: LearnedCost, high: LearnedCost
) -> tuple[list[_Sample], list[_Sample]]:
    """Steps and rows of transfers of one round, those with equal features together."""
    steps: dict[tuple[object, ...], list[_Single]] = {}
    copies: dict[tuple[object, ...], list[_Single]] = {}
    for one in found:
        if isinstance(one, RunObservation):
            steps.setdefault((trial.name, one.features), []).extend(_steps(one, cost, high))
        else:
            key = (trial.name, one.link, one.copies, one.nbytes)
            copies.setdefault(key, []).append(_transfer(one, cost, high))
    return (
        [_Sample(key, tuple(some)) for key, some in steps.items()],
        [_Sample(key, tuple(some)) for key, some in copies.items()],
    )


def _steps(one: RunObservation, cost: LearnedCost, high: LearnedCost) -> Iterator[_Single]:
    factor = stretched(one.beside, cost.run_slowdown(one.features))
    middle_s, most_s = (model.run_s(one.features) * factor for model in (cost, high))
    for seconds in one.seconds:
        yield _Single(seconds, middle_s, most_s)


def _transfer(one: CopyObservation, cost: LearnedCost, high: LearnedCost) -> _Single:
    factor = stretched(one.beside, cost.copy_slowdown(one.link))
    middle_s, most_s = (
        model.copies_s(one.link, one.copies, one.blocks, one.nbytes) for model in (cost, high)
    )
    unknown = float("inf")
    return _Single(one.seconds, (middle_s or unknown) * factor, (most_s or unknown) * factor)


def _pass(trial: Trial, measured: Measured, cost: LearnedCost, high: LearnedCost) -> _Sample:
    predicted_s, high_s = (
        plan_seconds(trial.plan, trial.program, trial.machine, model) for model in (cost, high)
    )
    singles = tuple(_Single(seconds, predicted_s, high_s) for seconds in measured.seconds)
    return _Sample((trial.name,), singles)


def _score(what: str, rounds: Iterable[Sequence[_Sample]]) -> Score:
    earlier: dict[tuple[object, ...], float] = {}
    cases: dict[tuple[object, ...], list[_Single]] = {}
    errors, noise, covered = [], [], []
    for samples in rounds:
        for one in samples:
            middle = one.measured_s
            errors.append(one.error)
            cases.setdefault(one.key, []).extend(one.singles)
            covered += [single.measured_s <= single.high_s for single in one.singles]
            if one.key in earlier:
                noise.append(abs(earlier[one.key] / middle - 1.0))
            earlier[one.key] = middle
    return Score(
        what,
        len(earlier),
        _finite(statistics.median(errors)),
        _finite(max(errors)),
        statistics.median(noise) if noise else None,
        max(noise, default=None),
        _finite(max(_Sample(key, tuple(some)).error for key, some in cases.items())),
        statistics.fmean(covered),
    )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def scores_text(found: Sequence[Score]) -> str:
    """A table: the worst in a single round, and the worst of the medians over all rounds."""
    heads = f"{'median':>9}{'noise':>9}{'worst':>9}{'noise':>9}{'all rounds':>12}{'below p90':>11}"
    rows = [f"{'held out':<14}{'cases':>7}{heads}"]
    rows += [
        f"{one.what:<14}{one.cases:>7}{_part(one.median)}{_part(one.noise)}{_part(one.worst)}"
        f"{_part(one.worst_noise)}   {_part(one.worst_case)}{one.covered:>11.1%}"
        for one in found
    ]
    return "\n".join(rows) + "\n"


def _part(number: float | None) -> str:
    return f"{'-':>9}" if number is None else f"{number:>9.1%}"


def peaks_text(found: Sequence[Peak]) -> str:
    """A table of megabytes."""
    heading = f"{'planned':>9}{'ledger':>9}{'predicted':>11}{'resident':>10}"
    rows = [f"{'peak memory, MB':<48}{heading}"]
    for one in found:
        resident = "-" if one.resident_bytes is None else f"{one.resident_bytes / 1e6:,.0f}"
        rows.append(
            f"{one.name:<48}{one.predicted_bytes / 1e6:>9,.0f}{one.ledger_bytes / 1e6:>9,.0f}"
            f"{one.process_bytes / 1e6:>11,.0f}{resident:>10}"
        )
    return "\n".join(rows) + "\n"


def passes_text(trials: Sequence[Trial], rounds: Rounds, cost: LearnedCost) -> str:
    """A table of whole passes, predicted and measured."""
    rows = [f"{'a pass, ms':<48}{'predicted':>11}{'measured':>10}{'ratio':>8}"]
    for trial in trials:
        predicted = plan_seconds(trial.plan, trial.program, trial.machine, cost)
        seconds = [value for one in rounds[trial.name] for value in one.seconds]
        middle = statistics.median(seconds)
        rows.append(
            f"{trial.name:<48}{1e3 * predicted:>11.1f}{1e3 * middle:>10.1f}"
            f"{predicted / middle:>8.2f}"
        )
    return "\n".join(rows) + "\n"
