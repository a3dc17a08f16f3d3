"""How far predictions are off: one step and one transfer, in two rounds of known times."""

import dataclasses
import json

import programs
import pytest

from memsched.calibration.evaluation import Score, peaks, scores, scores_text
from memsched.calibration.resident import PROCESS_BYTES
from memsched.calibration.trials import Measured, Trial
from memsched.cost import Span
from memsched.cost.features import RunFeatures
from memsched.cost.learned import LearnedCost
from memsched.cost.observations import RunObservation, observe
from memsched.machine import Machine
from memsched.plan import Action, Copy, Plan, Residence, Run
from memsched.program import Program

PROGRAM, MACHINE = programs.chain(1), programs.tiny_machine()
PLAN = programs.naive_plan(PROGRAM, MACHINE)
TRIAL = Trial("one layer", "256", 1.0, PROGRAM, {}, MACHINE, PLAN, {})
COPY_S = 1.0


class Known(LearnedCost):
    """A cost model that says 2.5 s for every step and 1 s for transfers, a fifth more at 90 %."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def at(self, quantile: float) -> "Known":
        assert quantile == 0.9
        return Known(1.2)

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        return self.factor * {Run: 2.5, Copy: COPY_S}.get(type(action), 0.0)

    def slowdown(self, action: Action, program: Program, machine: Machine) -> float:
        return 1.0

    def run_s(self, features: RunFeatures, machine: Machine | None = None) -> float:
        return 2.5 * self.factor

    def run_slowdown(self, features: RunFeatures) -> float:
        return 1.0

    def copies_s(
        self, link: str, copies: int, blocks: int, nbytes: int, scale: float = 1.0
    ) -> float:
        return COPY_S * self.factor

    def copy_slowdown(self, link: str) -> float:
        return 1.0


def a_pass(run_s: float, resident_bytes: int) -> Measured:
    """The transfer from 0 to 1, then the step."""
    end_s, spans = COPY_S + run_s, []
    for index, action in enumerate(PLAN.actions):
        match action:
            case Copy():
                spans.append(Span(index, 0.0, COPY_S))
            case Run():
                spans.append(Span(index, COPY_S, end_s))
            case _:
                spans.append(Span(index, end_s, end_s))
    return Measured((tuple(spans),), (0.0,), (end_s,), {"device": 700}, resident_bytes)


ROUNDS = {TRIAL.name: [a_pass(2.0, 9000), a_pass(4.0, 5000)]}


@pytest.fixture(scope="module")
def found() -> dict[str, Score]:
    return {one.what: one for one in scores([TRIAL], ROUNDS, Known())}


def test_errors_are_those_of_each_round_and_noise_is_what_the_round_before_says(
    found: dict[str, Score],
) -> None:
    def numbers(what: str) -> list[float]:
        one = found[what]
        assert one.cases == 1
        return [one.median, one.worst, one.noise, one.worst_noise, one.worst_case, one.covered]

    # 2.5 s said, 2 and 4 s measured, 3 in the middle.
    assert numbers("steps") == pytest.approx([(0.25 + 0.375) / 2, 0.375, 0.5, 0.5, 1 / 6, 0.5])
    assert numbers("transfers") == pytest.approx([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    # 3.5 s said, 3 and 5 s measured, 4 in the middle.
    assert numbers("whole passes") == pytest.approx([(1 / 6 + 0.3) / 2, 0.3, 0.4, 0.4, 1 / 8, 0.5])
    assert "small steps" not in found


def test_what_nothing_says_is_none_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Known, "copies_s", lambda *_: None)  # as of a link that was not measured
    one_round = {TRIAL.name: ROUNDS[TRIAL.name][:1]}
    found = {one.what: one for one in scores([TRIAL], one_round, Known())}
    assert (found["steps"].noise, found["steps"].worst_noise) == (None, None)
    assert (found["transfers"].median, found["transfers"].worst) == (None, None)
    json.dumps([dataclasses.asdict(one) for one in found.values()], allow_nan=False)
    (transfers,) = (
        line for line in scores_text(tuple(found.values())).splitlines() if "transfers" in line
    )
    assert transfers.split() == ["transfers", "1", *"-----", "100.0%"]


def test_equal_steps_are_one_case_whatever_is_copied_beside_them() -> None:
    three = programs.chain(3)
    rest = [Residence(name, "device") for name in ("x", "w0", "w1")]
    home = (*rest, Residence("w2", "nvme"))
    actions = (Run("layer0"), Copy("w2", "nvme", "device"), Run("layer1"), Run("layer2"))
    plan = Plan(three.digest, MACHINE.digest, home, actions, home)
    times = [(0, 2), (2, 4), (2, 5), (5, 7)]
    spans = tuple(Span(index, float(a), float(b)) for index, (a, b) in enumerate(times))
    # The first step ran alone, the second beside the copy for two of its three seconds.
    runs = [one for one in observe(plan, three, MACHINE, spans) if isinstance(one, RunObservation)]
    assert [one.beside for one in runs] == [0.0, 0.7, 1.0]
    trial = Trial("three layers", "256", 1.0, three, {}, MACHINE, plan, {})
    measured = Measured((spans,), (0.0,), (7.0,), {"device": 700}, None)
    found = {one.what: one for one in scores([trial], {trial.name: [measured]}, Known())}
    # 2.5 s said, 2, 3 and 2 s measured; 3 s at 90 %.
    assert (found["steps"].cases, found["steps"].median) == (1, pytest.approx(0.25))
    assert found["steps"].covered == 1.0


def test_the_table_has_a_row_for_each_of_them(found: dict[str, Score]) -> None:
    lines = scores_text(tuple(found.values())).splitlines()
    assert len({len(line) for line in lines}) == 1
    (steps,) = (line for line in lines if line.startswith("steps"))
    assert steps.split() == ["steps", "1", "31.2%", "50.0%", "37.5%", "50.0%", "16.7%", "50.0%"]


def test_the_first_round_compiles_and_says_nothing_of_memory() -> None:
    (peak,) = peaks([TRIAL], ROUNDS)
    assert peak.resident_bytes == 5000
    assert peak.ledger_bytes == 700
    assert peak.process_bytes == peak.predicted_bytes + PROCESS_BYTES
