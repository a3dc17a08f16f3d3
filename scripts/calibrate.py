"""Measure this machine, and learn from it how long steps and transfers take.

Small models of random weights are carried out by plans, as real ones are; what every action took is
fitted to a cost model of some hundred numbers. By default it is written to the user's settings,
where every script finds it; with --out beside that file, for --machine.

python scripts/calibrate.py
python scripts/calibrate.py --out laptop.toml --minutes 5
python scripts/calibrate.py --evaluate --minutes 5
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_jax import console
from qwen3vl_jax.interrupts import Guard

if TYPE_CHECKING:
    from memsched.calibration.trials import Measured, Trial
    from memsched.cost.coefficients import Coefficients
    from memsched.cost.observations import Observation
    from memsched.machine import Machine

# Of the time, what is spent on tracing, compiling and a first round.
PREPARING = 0.6
# And on requests to the disk of several sizes.
REQUESTS = 0.03
MINUTES = 2
PASSES = 4
LONGEST_TRIAL_S = 1.5
LONGEST_SPILL_S = 0.6
MEASURE_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate. Returns an exit code of `console.run`."""
    return console.main(_parse, calibrate, argv)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.described(__doc__)
    add = parser.add_argument
    add("--out", type=Path, metavar="TOML", help="write the profile here, its cost model beside it")
    add("--minutes", type=_minutes, metavar="N", help=f"how long to measure ({MINUTES})")
    add("--nvme-dir", type=Path, metavar="DIR", help="the disk to measure; that of temporary files")
    add("--evaluate", action="store_true", help="also measure models that nothing is fitted to")
    add("--from-runs", action="store_true", help="measure nothing: fit to what runs have added")
    add("--json", action="store_true", help="write one JSON object as the last line of stdout")
    options = parser.parse_args(argv)
    given = {
        "--minutes": options.minutes is not None,
        "--nvme-dir": options.nvme_dir is not None,
        "--evaluate": options.evaluate,
    }
    found = [flag for flag, is_given in given.items() if is_given]
    if options.from_runs and found:
        parser.error(f"--from-runs measures nothing; leave out {', '.join(found)}")
    return options


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:60]} is not a number") from None
    if not 0.05 <= minutes <= 600:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.05 to 600")
    return minutes


def calibrate(options: argparse.Namespace, guard: Guard) -> int:
    """Measures, fits and writes what the options ask for."""
    from memsched.calibration.scratch import Scratch
    from memsched.calibration.spills import TESTED_ROWS, leads_out, spill_trials
    from memsched.detection.calibrated import user_profile
    from memsched.detection.this_machine import detect
    from memsched.stores import heap

    profile = options.out or user_profile()
    if options.from_runs:
        return _learn_from_runs(profile, as_json=options.json)
    if options.out is None:
        profile.parent.mkdir(parents=True, exist_ok=True)
    _check_targets(profile)
    seconds = 60.0 * (options.minutes or MINUTES)
    heap.share()
    console.say("measuring processor and disk")
    machine = detect(options.nvme_dir, measure_s=MEASURE_S)
    with Scratch(options.nvme_dir) as scratch:
        machine, requests = _requests(machine, scratch, seconds)
        trials, tested = _trials(machine, seconds, evaluate=options.evaluate)
        spills = list(spill_trials(machine))
        held_out = list(spill_trials(machine, TESTED_ROWS)) if options.evaluate else []
        moves: dict[str, list[Measured]] = {}
        console.say("measuring values that leave the device")
        _once((*spills, *held_out), scratch, moves, seconds=LONGEST_SPILL_S)
        rounds = _rounds(trials, tested, scratch, seconds)
        _once((*spills, *held_out), scratch, moves, seconds=LONGEST_SPILL_S)
    fitted = [one for one in trials if one.name not in tested]
    moved = [found for found in _observations(spills, moves) if leads_out(found, machine)]
    observations = [*requests, *_observations(fitted, rounds), *moved]
    coefficients = _fitted(observations, machine)
    _write(profile, machine, coefficients, observations)
    result = _result(profile, coefficients)
    if options.evaluate:
        some = [one for one in trials if one.name in tested]
        result |= _evaluation(some, rounds, coefficients, held_out, moves)
    if options.json:
        print(json.dumps(result))
    return 0


def _check_targets(profile: Path) -> None:
    """Raises StoreError if what is found could not be written: known before it is measured."""
    from memsched.cost.coefficients_file import cost_file
    from memsched.detection.calibrated import observation_file
    from memsched.whole_file import check_target

    for file in (profile, cost_file(profile), observation_file(profile)):
        check_target(file)


def _trials(
    machine: "Machine", seconds: float, *, evaluate: bool
) -> tuple[list["Trial"], set[str]]:
    """As many trials as can be prepared in a part of the time, and the names of those for testing.

    Trials for fitting and for testing take turns, so that both see the machine at all times.
    """
    from memsched.errors import DoesNotFitError
    from qwen3vl_jax.planned.rehearsals import CALIBRATION, EVALUATION, trial_of

    end = time.perf_counter() + PREPARING * seconds / 2
    fitted, tested = list(CALIBRATION), list(EVALUATION) if evaluate else []
    trials, names = [], set()
    while fitted or tested:
        # Twice as many are fitted to as are tested.
        for source, count in ((fitted, 2), (tested, 1)):
            for one in [source.pop(0) for _ in range(min(count, len(source)))]:
                try:
                    trial = trial_of(one, machine)
                except DoesNotFitError as error:
                    console.say(f"left out {one.name}: {error}")
                    continue
                trials.append(trial)
                if source is tested:
                    names.add(trial.name)
        console.say(f"planned {len(trials)} programs")
        if time.perf_counter() > end and _are_enough(trials, names):
            break
    return trials, names


def _are_enough(trials: Iterable["Trial"], tested: Collection[str]) -> bool:
    """Whether there are as many cases as fitting takes and, of those for testing, one trial."""
    from memsched.calibration.fit import FEWEST_CASES

    cases, names = set(), set()
    for trial in trials:
        names.add(trial.name)
        if trial.name not in tested:
            cases.add(trial.case)
    return len(cases) >= FEWEST_CASES and (not tested or not names.isdisjoint(tested))


def _requests(
    machine: "Machine", scratch: Any, seconds: float
) -> tuple["Machine", list["Observation"]]:
    """The machine with the size and number of requests that suit its disk, and what shows it."""
    from memsched.calibration.requests import (
        best_of,
        measure_requests,
        observations_of,
        requests_text,
        with_requests,
    )

    readings = measure_requests(scratch, seconds=REQUESTS * seconds)
    chosen = best_of(readings)
    console.say(requests_text(readings, chosen))
    return with_requests(machine, chosen), list(observations_of(readings, machine, chosen))


def _once(
    trials: Iterable["Trial"],
    scratch: Any,
    found: dict[str, list["Measured"]],
    *,
    seconds: float = LONGEST_TRIAL_S,
) -> None:
    """Measures trials, and adds that to what was found of them."""
    from memsched.calibration.trials import measure

    for trial in trials:
        measured = measure(trial, scratch, passes=PASSES, seconds=seconds)
        found.setdefault(trial.name, []).append(measured)


def _rounds(
    trials: list["Trial"], tested: Collection[str], scratch: Any, seconds: float
) -> dict[str, list["Measured"]]:
    """All trials in turn until the time is over, at least two rounds; the first one compiles.

    Trials that there is no time for in the first round are left out, once there are enough.
    """
    start = time.perf_counter()
    found: dict[str, list[Measured]] = {}
    begun: list[Trial] = []
    number = 0
    while number < 2 or time.perf_counter() - start < seconds:
        for trial in list(trials):
            late = time.perf_counter() - start > PREPARING * seconds
            if number == 0 and late and _are_enough(begun, tested):
                trials.remove(trial)
                continue
            begun.append(trial)
            _once([trial], scratch, found)
            if number > 1 and time.perf_counter() - start > seconds:
                break
        number += 1
        console.say(f"round {number}: {len(found)} programs, {time.perf_counter() - start:.0f} s")
    return found


def _observations(
    trials: list["Trial"], rounds: dict[str, list["Measured"]]
) -> list["Observation"]:
    from memsched.calibration.trials import observations

    return [
        observation
        for trial in trials
        for measured in rounds[trial.name]
        for observation in observations(trial, measured)
    ]


def _fitted(observations: Sequence["Observation"], machine: "Machine") -> "Coefficients":
    from memsched.calibration.fit import fit
    from memsched.detection.calibrated import hardware_identity

    console.say(f"fitting {len(observations)} observations")
    return fit(observations, machine, hardware_identity())


def _write(
    profile: Path,
    machine: "Machine",
    coefficients: "Coefficients",
    observations: Sequence["Observation"],
) -> None:
    """The cost model together with the profile it belongs to; what was measured starts anew.

    A kill between the two leaves a pair whose digests differ, which nobody takes for calibrated.
    """
    from memsched.cost.coefficients_file import cost_file, to_json
    from memsched.cost.observation_file import replace
    from memsched.detection.calibrated import observation_file
    from memsched.profiles import to_toml
    from memsched.whole_file import write_together

    write_together({cost_file(profile): to_json(coefficients), profile: to_toml(machine)})
    replace(observation_file(profile), coefficients.machine, observations)
    console.say(f"wrote {profile}")


def _learn_from_runs(profile: Path, *, as_json: bool) -> int:
    from memsched.cost.coefficients_file import cost_beside, write_cost
    from memsched.cost.observation_file import read, shrink
    from memsched.cost.rates import rates_digest
    from memsched.detection.calibrated import check_hardware, observation_file
    from memsched.profiles import load_machine

    machine = load_machine(profile)
    check_hardware(cost_beside(profile, machine), profile)
    file, rates = observation_file(profile), rates_digest(machine)
    coefficients = _fitted(read(file, rates), machine)
    write_cost(coefficients, profile)
    shrink(file, rates)
    console.say(f"wrote {profile}")
    if as_json:
        print(json.dumps(_result(profile, coefficients)))
    return 0


def _result(profile: Path, coefficients: "Coefficients") -> dict[str, Any]:
    from memsched.cost.coefficients_file import cost_file

    return {
        "profile": str(profile),
        "cost_model": str(cost_file(profile)),
        "cases": coefficients.cases,
        "kinds": list(coefficients.kinds),
        "links": {name: dataclasses.asdict(link) for name, link in coefficients.links.items()},
    }


def _evaluation(
    trials: list["Trial"],
    rounds: dict[str, list["Measured"]],
    coefficients: "Coefficients",
    spills: list["Trial"],
    moves: dict[str, list["Measured"]],
) -> dict[str, Any]:
    from memsched.calibration.evaluation import (
        moves_score,
        passes_text,
        peaks,
        peaks_text,
        scores,
        scores_text,
    )
    from memsched.cost.learned import LearnedCost

    cost = LearnedCost(coefficients)
    found, memory = scores(trials, rounds, cost), peaks(trials, rounds)
    found = (*found, *moves_score(spills, moves, cost))
    print(scores_text(found))
    print(passes_text(trials, rounds, cost))
    print(peaks_text(memory))
    return {
        "held_out": [dataclasses.asdict(one) for one in found],
        "peaks": [dataclasses.asdict(one) for one in memory],
    }


if __name__ == "__main__":
    console.leave(main())
