"""Values of JSON that others may have written: checked before they are used."""

from collections.abc import Mapping, Sequence
from typing import Any

from memsched.errors import DamagedError

LONGEST_WORD = 200
# What weights consist of. Of the names that numpy knows, others are no numbers, or no names.
DTYPES = (
    *("uint8", "float8_e4m3fn", "float8_e5m2"),
    *("float16", "bfloat16", "float32", "float64"),
)


def record(value: Any, keys: Sequence[str], where: str) -> Mapping[str, Any]:
    """An object with exactly these keys.

    Raises:
        DamagedError: it is none, or has others.
    """
    if not isinstance(value, dict):
        raise DamagedError(f"{where} must be an object, found {type(value).__name__}")
    if set(value) != set(keys):
        odd = sorted(map(str, set(value) ^ set(keys)))[0][:40]
        raise DamagedError(
            f"{where} must have the keys {', '.join(keys)}; {odd!r} is one too many or missing"
        )
    return value


def number(value: Any, low: float, high: float, where: str) -> float:
    """A number within a range of finite ones.

    Raises:
        DamagedError: it is none, or lies outside.
    """
    if type(value) not in (int, float) or not low <= value <= high:
        raise DamagedError(
            f"{where} must be a number from {low:g} to {high:g}, found {str(value)[:40]}"
        )
    return float(value)


def whole(value: Any, high: int, where: str) -> int:
    """A whole number from 0.

    Raises:
        DamagedError: it is none, or too large.
    """
    if type(value) is not int or not 0 <= value <= high:
        raise DamagedError(
            f"{where} must be a whole number up to {high:,}, found {str(value)[:40]}"
        )
    return value


def word(value: Any, where: str) -> str:
    """A short text in one line.

    Raises:
        DamagedError: it is none.
    """
    if not isinstance(value, str) or len(value) > LONGEST_WORD or not value.isprintable():
        raise DamagedError(f"{where} must be a short text, found {str(value)[:40]!r}")
    return value


def dtype(value: Any, where: str) -> str:
    """The name of what weights consist of.

    Raises:
        DamagedError: it is none.
    """
    if word(value, where) not in DTYPES:
        raise DamagedError(f"{where} {value!r} is unknown; there are {', '.join(DTYPES)}")
    return str(value)


def items(value: Any, most: int, where: str) -> Sequence[Any]:
    """A list.

    Raises:
        DamagedError: it is none, or too long.
    """
    if not isinstance(value, list) or len(value) > most:
        raise DamagedError(f"{where} must be a list of at most {most} entries")
    return value
