"""A learned cost model on disk: JSON of a few kB beside the machine's TOML. Strict, versioned."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memsched.cost.coefficients import DURATIONS_S, Coefficients, LinkCoefficients, shapes
from memsched.cost.learned import LearnedCost
from memsched.cost.rates import rates_digest
from memsched.cost.roofline import CostModel, Roofline
from memsched.cost.strict import dtype, items, number, record, whole, word
from memsched.errors import DamagedError, StoreError
from memsched.machine import Machine
from memsched.whole_file import write_whole

FORMAT = "memsched cost model"
VERSION = 1
MOST_BYTES = 256 << 10
MOST_NAMES = 200
# Logarithms of rates and of seconds.
LARGEST_LOG = 60.0
LARGEST_MARGIN = 10.0

_RATES = ("profile_flops_per_s", "profile_bytes_per_s")
_KEYS = ("format", "version", "machine", "identity", "cases", "dtypes", "kinds", "run", "margins")
_LINK_KEYS = tuple(field.name for field in dataclasses.fields(LinkCoefficients))
_DIGEST = re.compile(r"[0-9a-f]{16}")


def cost_file(machine_file: Path) -> Path:
    """Where the cost model of a machine's TOML lies: `laptop.toml` -> `laptop.cost.json`."""
    return machine_file.with_suffix(".cost.json")


def cost_beside(machine_file: Path, machine: Machine) -> CostModel:
    """The learned cost model beside a machine's TOML, or its rates where there is none.

    Raises:
        DamagedError: there is one, and it is damaged or of another machine.
        StoreError: it cannot be read.
    """
    file = cost_file(machine_file)
    try:
        with file.open("rb") as opened:
            body = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return Roofline()
    except OSError as error:
        raise StoreError(f"cost model {file}: {error.strerror}") from error
    try:
        found = from_json(body)
        if found.machine != rates_digest(machine):
            raise DamagedError(
                f"fitted for rates {found.machine}, {machine_file.name} has {rates_digest(machine)}"
            )
    except DamagedError as error:
        raise DamagedError(f"cost model {file}: {error}; calibrate again, or delete it") from None
    return LearnedCost(found)


def write_cost(coefficients: Coefficients, machine_file: Path) -> Path:
    """Writes a cost model beside a machine's TOML, all or nothing. Returns its file.

    Raises:
        StoreError: it cannot be written.
    """
    file = cost_file(machine_file)
    write_whole(file, to_json(coefficients))
    return file


def to_json(coefficients: Coefficients) -> str:
    """The text of a cost model; equal models have equal texts."""
    run = {
        name: np.round(np.asarray(v, np.float64), 5).tolist()
        for name, v in coefficients.run.items()
    }
    links = {
        name: dataclasses.asdict(link) | {"margins": dict(link.margins)}
        for name, link in coefficients.links.items()
    }
    body = {
        "format": FORMAT,
        "version": VERSION,
        **{key: getattr(coefficients, key) for key in ("machine", "identity", "cases", *_RATES)},
        "dtypes": coefficients.dtypes,
        "kinds": coefficients.kinds,
        "run": run,
        "margins": coefficients.margins,
        "links": links,
    }
    return json.dumps(body, indent=1, allow_nan=False) + "\n"


def from_json(body: bytes) -> Coefficients:
    """The cost model of a text.

    Raises:
        DamagedError: it is none, or a number of it makes no sense.
    """
    if len(body) > MOST_BYTES:
        raise DamagedError(f"larger than {MOST_BYTES:,} B")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise DamagedError("not JSON") from None
    record(values, (*_KEYS, *_RATES, "links"), "a cost model")
    if (values["format"], values["version"]) != (FORMAT, VERSION):
        raise DamagedError(
            f"format {str(values['format'])[:40]!r} version {str(values['version'])[:20]} is "
            f"unknown, wanted {FORMAT!r} version {VERSION}"
        )
    dtypes, kinds = (_names(values[key], key) for key in ("dtypes", "kinds"))
    if not dtypes:
        raise DamagedError("dtypes must not be empty")
    for name in dtypes:
        dtype(name, "dtype")
    return Coefficients(
        machine=_digest(values["machine"], "machine"),
        identity=_digest(values["identity"], "identity"),
        cases=whole(values["cases"], 1 << 30, "cases"),
        profile_flops_per_s=number(values[_RATES[0]], 1.0, 1e21, _RATES[0]),
        profile_bytes_per_s=number(values[_RATES[1]], 1.0, 1e18, _RATES[1]),
        dtypes=dtypes,
        kinds=kinds,
        run=_run(values["run"], shapes(len(dtypes), len(kinds))),
        margins=_margins(values["margins"]),
        links=_links(values["links"], tuple(values["margins"])),
    )


def _digest(value: Any, where: str) -> str:
    if not _DIGEST.fullmatch(word(value, where)):
        raise DamagedError(f"{where} must be 16 hexadecimal digits, found {value!r}")
    return str(value)


def _names(value: Any, where: str) -> tuple[str, ...]:
    names = tuple(word(one, where) for one in items(value, MOST_NAMES, where))
    if len(set(names)) != len(names):
        raise DamagedError(f"{where} must differ from each other")
    return names


def _run(values: Any, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    record(values, tuple(wanted), "run")
    return {name: _array(values[name], shape, f"run {name}") for name, shape in wanted.items()}


def _array(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Numbers nested as the shape says, and no others."""
    if not shape:
        return np.array(number(value, -LARGEST_LOG, LARGEST_LOG, where))
    rows = items(value, shape[0], where)
    if len(rows) != shape[0]:
        raise DamagedError(f"{where} must have {shape[0]} entries, found {len(rows)}")
    return np.array([_array(row, shape[1:], where) for row in rows]).reshape(shape)


def _margins(values: Any) -> dict[str, tuple[float, ...]]:
    if not isinstance(values, dict):
        raise DamagedError("margins must be an object")
    return {
        _quantile(name): tuple(
            number(one, 0.0, LARGEST_MARGIN, "margins")
            for one in _exactly(row, len(DURATIONS_S) + 1)
        )
        for name, row in values.items()
    }


def _exactly(row: Any, count: int) -> list[Any]:
    found = list(items(row, count, "margins"))
    if len(found) != count:
        raise DamagedError(f"margins must have {count} entries, found {len(found)}")
    return found


def _quantile(name: Any) -> str:
    try:
        value = number(float(name), 0.5, 0.999, "a quantile")
    except (TypeError, ValueError) as error:
        raise DamagedError(f"a quantile must be a number, found {str(name)[:20]!r}") from error
    if str(value) != name:
        raise DamagedError(f"a quantile is written {value}, found {name!r}")
    return str(name)


def _links(values: Any, quantiles: tuple[str, ...]) -> dict[str, LinkCoefficients]:
    if not isinstance(values, dict) or len(values) > MOST_NAMES:
        raise DamagedError("links must be an object")
    found = {}
    for name, link in values.items():
        where = f"link {word(name, 'links')!r}"
        record(link, _LINK_KEYS, where)
        record(link["margins"], quantiles, f"{where}: margins")
        found[name] = LinkCoefficients(
            number(link["profile_bytes_per_s"], 1.0, 1e18, f"{where}: profile_bytes_per_s"),
            number(link["latency_s"], 0.0, 10.0, f"{where}: latency_s"),
            number(link["block_s"], 0.0, 10.0, f"{where}: block_s"),
            number(link["bytes_per_s"], 1.0, 1e18, f"{where}: bytes_per_s"),
            number(link["slowdown"], 1.0, 100.0, f"{where}: slowdown"),
            {
                quantile: number(link["margins"][quantile], 1.0, math.exp(LARGEST_MARGIN), where)
                for quantile in quantiles
            },
        )
    return found
