"""How far values may be changed to save memory, as TOML files with these keys, the last optional.

    error_budget = 0.03           of the output, relative, as memsched.codecs.choice predicts it
    smallest_saving = 0.1         an encoding that saves a smaller share of an array is not used
    codecs = ["int8", "int4:32"]  what may be used
    kv = "int8"                   how rows of a KV cache are stored: raw (the default) or int8

Whatever is unknown, missing or out of range is refused with the name of its key.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memsched.codecs.names import parse_codec
from memsched.errors import ProgramError
from memsched.toml_file import read_toml, refuse_unknown

LARGEST_BUDGET = 10.0
KV_CODECS = ("raw", "int8")


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """A budget of error, and what it may be spent on; `kv` is how a KV cache is stored."""

    name: str
    error_budget: float
    smallest_saving: float
    codecs: tuple[str, ...]
    kv: str = "raw"

    def with_budget(self, error_budget: float) -> "Level":
        """The same with another budget.

        Raises:
            ProgramError: it is no number from 0 to 10.
        """
        return dataclasses.replace(
            self, error_budget=_number("error budget", error_budget, LARGEST_BUDGET)
        )


def load_level(path: Path) -> Level:
    """The level that a file describes; its name is the file's.

    Raises:
        ProgramError: the file cannot be read, is no TOML, or breaks a rule.
    """
    values = read_toml(path, "level")
    try:
        return _level(path.stem, values)
    except ProgramError as error:
        raise ProgramError(f"level {path}: {error}") from error


def _level(name: str, values: Mapping[str, Any]) -> Level:
    known = [field.name for field in dataclasses.fields(Level) if field.name != "name"]
    refuse_unknown("", values, known)
    for key in known:
        if key not in values and key != "kv":
            raise ProgramError(f"{key} is missing")
    return Level(
        name,
        _number("error_budget", values["error_budget"], LARGEST_BUDGET),
        _number("smallest_saving", values["smallest_saving"], 0.99),
        _codecs(values["codecs"]),
        _kv(values.get("kv", "raw")),
    )


def _number(key: str, value: Any, most: float) -> float:
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise ProgramError(f"{key} must be a number from 0 to {most:g}, found {str(value)[:40]}")
    return float(value)


def _kv(value: Any) -> str:
    if value not in KV_CODECS:
        raise ProgramError(f"kv must be raw or int8, found {str(value)[:40]}")
    return str(value)


def _codecs(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ProgramError(f"codecs must be a list of names, found {str(names)[:40]}")
    full = tuple(parse_codec(name).name for name in names)
    if len(set(full)) < len(full) or "raw" in full:
        raise ProgramError("codecs must each be named once, and raw, which needs no name, never")
    return full
