"""Choosing codecs under a budget of error, against every possible choice and by hand."""

import itertools
import math
import random

import pytest

from memsched.codecs.choice import Candidate, Choice, Subject, choose
from memsched.errors import ProgramError

CODECS = ("int8", "int4:64", "int4:32")


def random_subjects(seed: int) -> tuple[list[Subject], float]:
    """Up to six arrays of many sizes; some of their errors fit in the budget, some do not."""
    chosen = random.Random(seed)
    subjects = []
    for number in range(chosen.randint(1, 6)):
        nbytes = chosen.choice((100, 1_000, chosen.randint(1, 100_000)))
        candidates = tuple(
            Candidate(codec, int(nbytes * chosen.uniform(0.1, 1.05)), chosen.uniform(0.02, 0.2))
            for codec in CODECS[: chosen.choice((0, 2, 3, 3))]
        )
        subjects.append(Subject(f"array{number}", nbytes, chosen.uniform(0.5, 2), candidates))
    return subjects, chosen.choice((0.0, 1.0, 1.0, 1.0)) * chosen.uniform(0, 0.4)


def fewest_bytes(subjects: list[Subject], budget: float, saving: float) -> int:
    """By trying every combination."""
    options = [
        [(0.0, one.nbytes)]
        + [
            ((one.sensitivity * candidate.error) ** 2, candidate.nbytes)
            for candidate in one.candidates
            if candidate.nbytes <= (1 - saving) * one.nbytes
        ]
        for one in subjects
    ]
    return min(
        sum(nbytes for _, nbytes in combination)
        for combination in itertools.product(*options)
        if sum(square for square, _ in combination) <= budget**2
    )


def largest_step(subjects: list[Subject]) -> int:
    """The most that one array can save."""
    return max(s.nbytes - c.nbytes for s in subjects for c in (*s.candidates, s))


@pytest.mark.parametrize("seed", range(120))
def test_a_choice_is_at_most_one_array_above_the_best_of_all(seed: int) -> None:
    subjects, budget = random_subjects(seed)
    found = choose(subjects, error_budget=budget, smallest_saving=0.1)
    best = fewest_bytes(subjects, budget, 0.1)
    assert found.predicted_error <= budget
    assert found.bound_bytes <= best <= found.nbytes <= found.bound_bytes + largest_step(subjects)


def test_most_choices_are_the_best_of_all() -> None:
    exact = 0
    for seed in range(120, 220):
        subjects, budget = random_subjects(seed)
        found = choose(subjects, error_budget=budget, smallest_saving=0.1)
        exact += found.nbytes == fewest_bytes(subjects, budget, 0.1)
    # Most of these; the others are less than one array above it.
    assert exact >= 90


def layers(count: int) -> list[Subject]:
    """Equal arrays that halve, or become a quarter for ten times the error."""
    pair = (Candidate("int8", 500, 0.01), Candidate("int4:32", 250, 0.1))
    return [Subject(f"layer{number}", 1000, 1.0, pair) for number in range(count)]


@pytest.mark.parametrize(
    ("budget", "codecs"),
    [
        (0.0, {"raw": 100}),
        (0.05, {"raw": 75, "int8": 25}),  # 25 squares of 0.01 are one of 0.05
        (0.1, {"int8": 100}),  # 100 of 0.01
        (math.sqrt(0.01 + 4 * (0.01 - 0.0001)), {"int8": 96, "int4:32": 4}),
        (1.0, {"int4:32": 100}),
    ],
)
def test_equal_arrays_are_shared_out_as_squares_add_up(
    budget: float, codecs: dict[str, int]
) -> None:
    # The budgets are met exactly; a millionth more leaves room for rounding.
    found = choose(layers(100), error_budget=budget * 1.000001, smallest_saving=0.1)
    names = [one.codec for one in found.arrays]
    assert {name: names.count(name) for name in set(names)} == codecs


def test_thousands_of_arrays_are_chosen_for_close_to_the_bound() -> None:
    chosen = random.Random(1)
    subjects = [
        Subject(
            f"expert{number}",
            10_000_000,
            chosen.uniform(0.001, 0.01),
            (
                Candidate("int8", 5_000_000, chosen.uniform(0.005, 0.01)),
                Candidate("int4:32", 2_800_000, chosen.uniform(0.07, 0.09)),
            ),
        )
        for number in range(20_000)
    ]
    found = choose(subjects, error_budget=0.05, smallest_saving=0.1)
    assert 0.04999 < found.predicted_error <= 0.05
    assert found.bound_bytes <= found.nbytes < found.bound_bytes * 1.0001


def test_what_changes_nothing_is_taken_without_a_budget() -> None:
    pair = (Candidate("bf16", 500, 0.0), Candidate("int8", 250, 0.01))
    exact = Subject("exact", 1000, 1.0, pair)
    unheard = Subject("unheard", 1000, 0.0, pair)
    found = choose([exact, unheard], error_budget=0.0, smallest_saving=0.1)
    assert [one.codec for one in found.arrays] == ["bf16", "int8"]
    assert found.predicted_error == 0.0


INT8, INT4 = Candidate("int8", 500, 0.01), Candidate("int4:32", 280, 0.081)


@pytest.mark.parametrize(
    ("candidates", "budget", "saving", "reason"),
    [
        ((INT8, INT4), 1.0, 0.1, "int4:32: saves 72 %, error 0.081 x 0.4"),
        (
            (INT8, INT4),
            0.02,
            0.1,
            "int8: saves 50 %, error 0.01 x 0.4; int4:32 needs 0.032 of the budget, 0.02 are left",
        ),
        (
            (INT8, INT4),
            0.001,
            0.1,
            "raw: budget spent; int8 needs 0.004 of the budget, 0.001 are left",
        ),
        ((Candidate("int8", 950, 0.01),), 1.0, 0.1, "raw: int8 saves less than 10 %"),
        ((INT8, INT4), 1.0, 0.75, "raw: int4:32 saves less than 75 %"),
        ((), 1.0, 0.1, "raw: there is no codec for it"),
    ],
)
def test_every_choice_has_its_reason(
    candidates: tuple[Candidate, ...], budget: float, saving: float, reason: str
) -> None:
    (found,) = choose(
        [Subject("w", 1000, 0.4, candidates)], error_budget=budget, smallest_saving=saving
    ).arrays
    assert found.reason == reason
    assert found.reason.startswith(found.codec)


def test_nothing_to_choose_is_a_choice() -> None:
    assert choose([], error_budget=0.1, smallest_saving=0.1) == Choice((), 0)


@pytest.mark.parametrize(
    ("subjects", "budget", "saving", "says"),
    [
        ([], -0.1, 0.1, r"error budget -0.1 is not a finite number"),
        ([], math.nan, 0.1, "error budget nan"),
        ([], math.inf, 0.1, "error budget inf"),
        ([], 0.1, 1.0, r"smallest saving 1.0 is not a share"),
        ([Subject("w", 8, 1.0, ())] * 2, 0.1, 0.1, "'w' is to get 2 codecs"),
        ([Subject("w", 8, math.nan, ())], 0.1, 0.1, "'w': sensitivity and errors .* nan"),
        ([Subject("w", 8, 1.0, (Candidate("int8", 4, -1.0),))], 0.1, 0.1, "found 1, -1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_in_one_line(
    subjects: list[Subject], budget: float, saving: float, says: str
) -> None:
    with pytest.raises(ProgramError, match=says) as refused:
        choose(subjects, error_budget=budget, smallest_saving=saving)
    assert "\n" not in str(refused.value)
