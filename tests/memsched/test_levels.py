"""Levels in TOML files: the three that come along, and every rule for writing another."""

from pathlib import Path

import pytest

from memsched.codecs import CODECS
from memsched.codecs.levels import Level, load_level
from memsched.errors import ProgramError

LEVELS = Path(__file__).parents[2] / "configs" / "levels"
TINY = 'error_budget = 0.5\nsmallest_saving = 0.25\ncodecs = ["int8", "int4:32"]\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def test_a_level_is_what_its_file_says(tmp_path: Path) -> None:
    found = load_level(written(tmp_path, TINY))
    assert found == Level("tiny", 0.5, 0.25, ("int8", "int4:32"))
    assert found.with_budget(0.125) == Level("tiny", 0.125, 0.25, ("int8", "int4:32"))


def test_a_level_may_say_how_caches_are_stored(tmp_path: Path) -> None:
    assert load_level(written(tmp_path, TINY + 'kv = "int8"\n')).kv == "int8"
    assert load_level(written(tmp_path, TINY)).kv == "raw"


def test_three_levels_come_along_each_with_a_larger_budget() -> None:
    minimal, balanced, aggressive = (
        load_level(LEVELS / f"{name}.toml") for name in ("minimal", "balanced", "aggressive")
    )
    assert (minimal.error_budget, minimal.codecs) == (0.0, ())
    assert 0 < balanced.error_budget < aggressive.error_budget
    assert (minimal.kv, balanced.kv, aggressive.kv) == ("raw", "raw", "int8")
    assert set(balanced.codecs) | set(aggressive.codecs) <= CODECS.keys()
    assert {path.stem for path in LEVELS.iterdir()} == {"minimal", "balanced", "aggressive"}


@pytest.mark.parametrize("path", sorted(LEVELS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_level_that_comes_along_says_what_it_means(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("error_budget", "eror_budget", "eror_budget is unknown; did you mean 'error_budget'"),
        ("smallest_saving = 0.25\n", "", "smallest_saving is missing"),
        ("0.5", "-0.5", "error_budget must be a number from 0 to 10, found -0.5"),
        ("0.5", "nan", "error_budget must be a number"),
        ("0.5", "true", "error_budget must be a number from 0 to 10, found True"),
        ("0.25", "1.0", "smallest_saving must be a number from 0 to 0.99"),
        ('["int8", "int4:32"]', '"int8"', "codecs must be a list of names"),
        ("int4:32", "int5", "codec 'int5' is unknown; did you mean"),
        ("int4:32", "int8", "codecs must each be named once"),
        ("int4:32", "raw", "raw, which needs no name"),
        ("codecs", 'kv = "int4"\ncodecs', "kv must be raw or int8, found int4"),
        ("=", ":", "not TOML"),
    ],
)
def test_a_level_that_breaks_a_rule_is_refused_with_its_file(
    tmp_path: Path, before: str, after: str, says: str
) -> None:
    path = written(tmp_path, TINY.replace(before, after, 1))
    with pytest.raises(ProgramError, match=says) as refused:
        load_level(path)
    assert str(refused.value).startswith(f"level {path}: ")
    assert "\n" not in str(refused.value)


def test_a_level_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"level .*none.toml: No such file"):
        load_level(tmp_path / "none.toml")


@pytest.mark.parametrize("budget", [-1.0, 11.0, float("nan")])
def test_another_budget_keeps_the_rules_too(budget: float) -> None:
    with pytest.raises(ProgramError, match="error budget must be a number from 0 to 10"):
        load_level(LEVELS / "balanced.toml").with_budget(budget)
