"""Machines as TOML files: one table for the compute, one for each tier and each link.

Keys are the names of the fields in memsched/machine.py; a table [target] says what to compile for.
Bytes may be written as text ("1.5GiB"). Whatever is unknown, missing or out of range is refused
with the name of its key.
"""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memsched.errors import ProgramError
from memsched.machine import DEVICE, HOST, NVME, Compute, Link, Machine, Target, Tier
from memsched.sizes import LARGEST_BYTES, parse_size
from memsched.toml_file import read_toml, refuse_unknown
from memsched.whole_file import write_whole

PLATFORMS = ("cpu", "gpu", "tpu")
# Whoever has one of these has both ends of it as a tier, and nothing else.
LINKS = {
    (DEVICE, NVME): {(NVME, DEVICE), (DEVICE, NVME)},
    (DEVICE, HOST, NVME): {(NVME, HOST), (HOST, NVME), (HOST, DEVICE), (DEVICE, HOST)},
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")
# Lowest and highest value of every number; units are in the names.
_RANGES: dict[str, tuple[float, float]] = {
    "capacity_bytes": (0, LARGEST_BYTES),
    "max_array_bytes": (1, LARGEST_BYTES),
    "alignment_bytes": (1, 2 << 20),
    "bytes_per_s": (1, 1e18),
    "flops_per_s": (1, 1e21),
    "latency_s": (0, 10),
    "block_bytes": (4096, 1 << 30),
    "queue_depth": (1, 4096),
    "threads": (1, 65536),
    "threads_per_block": (0, 65536),
    "shared_bytes_per_block": (0, 1 << 30),
    "cores": (1, 65536),
    "clock_hz": (1, 1e11),
    "l2_cache_bytes": (1, 1 << 40),
    "threads_per_core": (1, 65536),
    "registers_per_core": (1, 1 << 30),
    "shared_bytes_per_core": (1, 1 << 30),
    "float32_units_per_core": (1, 65536),
}
_POWERS_OF_TWO = ("alignment_bytes", "block_bytes")


def load_machine(path: Path) -> Machine:
    """The machine that a TOML file describes.

    Raises:
        ProgramError: the file cannot be read, is no TOML, or breaks a rule.
    """
    values = read_toml(path, "machine")
    try:
        return _machine(values)
    except ProgramError as error:
        raise ProgramError(f"machine {path}: {error}") from error


def write_machine(machine: Machine, path: Path) -> None:
    """Writes a TOML file that `load_machine` reads back as the same machine, all or nothing.

    Raises:
        ProgramError: the machine breaks a rule of `load_machine`.
        StoreError: the file cannot be written.
    """
    write_whole(path, to_toml(machine))


def to_toml(machine: Machine) -> str:
    """The text that `load_machine` reads back as the same machine.

    Raises:
        ProgramError: the machine breaks a rule of `load_machine`.
    """
    text = "\n".join(_lines(machine)) + "\n"
    _machine(tomllib.loads(text))
    return text


def _machine(values: Mapping[str, Any]) -> Machine:
    refuse_unknown("", values, [field.name for field in dataclasses.fields(Machine)])
    tiers = tuple(
        _tier(f"tiers[{index}].", table) for index, table in enumerate(_tables(values, "tiers"))
    )
    links = tuple(
        _record(Link, f"links[{index}].", table)
        for index, table in enumerate(_tables(values, "links"))
    )
    compute, target = values.get("compute"), values.get("target")
    if not isinstance(compute, dict):
        raise ProgramError("compute must be a table: [compute]")
    if not isinstance(target, dict | None):
        raise ProgramError("target must be a table: [target]")
    machine = Machine(
        name=_word("name", values.get("name")),
        platform=_word("platform", values.get("platform")),
        tiers=tiers,
        links=links,
        compute=_record(Compute, "compute.", compute),
        target=None if target is None else _record(Target, "target.", target),
    )
    _check(machine)
    return machine


def _check(machine: Machine) -> None:
    """The rules between tables."""
    if machine.platform not in PLATFORMS:
        raise ProgramError(f"platform must be one of {PLATFORMS}, found {machine.platform!r}")
    names = tuple(tier.name for tier in machine.tiers)
    if names not in LINKS:
        raise ProgramError(
            f"tiers must be device, host, nvme or (where the device computes in main memory)"
            f" device, nvme in this order, found {', '.join(names) or 'none'}"
        )
    found = [(link.source, link.target) for link in machine.links]
    wanted = LINKS[names]
    if set(found) != wanted or len(found) != len(wanted):
        arrows = [", ".join(f"{a}->{b}" for a, b in sorted(pairs)) for pairs in (wanted, found)]
        raise ProgramError(f"links must be {arrows[0]}, once each; found {arrows[1] or 'none'}")


def _tables(values: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = values.get(key)
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise ProgramError(f"{key} must be a list of tables: [[{key}]]")
    return found


def _tier(where: str, table: Mapping[str, Any]) -> Tier:
    """A tier that sets no limit to one array has only its capacity as one."""
    tier: Tier = _record(Tier, where, {"max_array_bytes": LARGEST_BYTES, **table})
    return tier


def _record(kind: Any, where: str, table: Mapping[str, Any]) -> Any:
    """A dataclass from a table whose keys are its fields."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    refuse_unknown(where, table, list(fields))
    for name, field in fields.items():
        if name not in table and field.default is dataclasses.MISSING:
            raise ProgramError(f"{where}{name} is missing")
    return kind(**{key: _value(where + key, fields[key].type, table[key]) for key in table})


def _value(where: str, kind: Any, value: Any) -> Any:
    if kind is str:
        return _word(where, value)
    name = where.rpartition(".")[2]
    if isinstance(value, str) and name.endswith("_bytes"):
        value = parse_size(value)
    low, high = _RANGES[name]
    wanted = "a whole number" if kind is int else "a number"
    fitting = (int,) if kind is int else (int, float)
    if type(value) not in fitting or not low <= value <= high:
        raise ProgramError(
            f"{where} must be {wanted} from {low:,} to {high:,}, found {str(value)[:40]}"
        )
    if name in _POWERS_OF_TWO and value.bit_count() != 1:
        raise ProgramError(f"{where} must be a power of two, found {value:,}")
    return kind(value)


def _word(where: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ProgramError(
            f"{where} must be a name of letters, digits, '.', '_', '-', found {str(value)[:40]!r}"
        )
    return value


def _lines(machine: Machine) -> list[str]:
    lines = [f'name = "{machine.name}"', f'platform = "{machine.platform}"']
    records: list[tuple[str, Any]] = [("[compute]", machine.compute)]
    records += [("[[tiers]]", tier) for tier in machine.tiers]
    records += [("[[links]]", link) for link in machine.links]
    records += [("[target]", machine.target)] if machine.target else []
    for heading, record in records:
        lines += ["", heading]
        for key, value in dataclasses.asdict(record).items():
            lines.append(f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value!r}")
    return lines
