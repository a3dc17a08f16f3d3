"""Typed and range-checked reading of a JSON object that somebody else wrote."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from qwen3vl_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """One JSON object, with its name for messages."""

    name: str
    values: Mapping[str, Any]

    def fail(self, key: str, rule: str) -> ConfigError:
        found = json.dumps(self.values.get(key), default=repr)[:80]
        return ConfigError(f"config: {self.name}{key} {rule}, found {found}")

    def integer(self, key: str, default: int | None, low: int, high: int) -> int:
        value = self.values.get(key, default)
        if value is None and default is not None:
            value = default
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, f"must be a whole number from {low:,} to {high:,}")
        return value

    def number(self, key: str, default: float | None, low: float, high: float) -> float:
        value = self.values.get(key, default)
        if value is None and default is not None:
            value = default
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.fail(key, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.fail(key, "must be true or false")
        return value

    def integers(self, key: str, default: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
        value = self.values.get(key, default)
        if value is None:
            value = default
        if not isinstance(value, list | tuple) or len(value) > 1024:
            raise self.fail(key, "must be a list of whole numbers")
        if any(type(entry) is not int or not low <= entry <= high for entry in value):
            raise self.fail(key, f"must hold whole numbers from {low:,} to {high:,}")
        return tuple(value)

    def exactly(self, key: str, *allowed: Any) -> None:
        """Refuses another value than ours: it would change the numbers."""
        if key in self.values and self.values[key] not in allowed:
            wanted = " or ".join(json.dumps(one) for one in allowed)
            raise self.fail(key, f"is computed here only as {wanted}")

    def section(self, key: str) -> "Section":
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, "must be an object")
        return Section(f"{self.name}{key}.", value)

    def refuse_unknown(self, known: frozenset[str]) -> None:
        """A key we never heard of is harmless only when it is private or switched off."""
        for key, value in self.values.items():
            if key in known or key.startswith("_") or value in (None, False, [], {}, ""):
                continue
            raise self.fail(key, "is a setting that is not computed here")
