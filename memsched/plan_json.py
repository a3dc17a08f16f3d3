"""Plans as JSON: the same plan is the same text, and no text becomes a plan unchecked.

One line per residence and action, so that two plans can be compared line by line:

    {"format": "memsched plan", "version": 1,
    "program": "00112233aabbccdd", "machine": "ddccbbaa33221100",
    "entry": [
    ["w0", "nvme", "raw", null]],
    "actions": [
    ["copy", "w0", "nvme", "device", "raw", 0],
    ["run", "layer0"],
    ["free", "w0", "device"]],
    "exit": [
    ["w0", "nvme", "raw", null]]}

The last item of a residence and of a copy is the offset in the tier's arena.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, assert_never

from memsched.errors import PlanError
from memsched.machine import Machine
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import Program
from memsched.referee import verify
from memsched.sizes import LARGEST_BYTES

FORMAT = "memsched plan"
VERSION = 1
# 235B parameters as single experts are 80,000 arrays: a plan of a few MB.
LARGEST_TEXT = 1 << 28
LONGEST_NAME = 1000

_KEYS = ("format", "version", "program", "machine", "entry", "actions", "exit")
_DIGEST = re.compile("[0-9a-f]{16}")


def to_json(plan: Plan) -> str:
    """The plan as text that `from_json` takes; equal plans give equal bytes.

    Raises:
        PlanError: a slot that belongs to no Copy, for which there is no place in the text.
    """
    for index in plan.slots:
        if not 0 <= index < len(plan.actions) or not isinstance(plan.actions[index], Copy):
            raise PlanError(f"plan: slots: {index} is not the index of a Copy; remove it")
    entry, leaving = ([_rest_row(rest) for rest in rests] for rests in (plan.entry, plan.exit))
    actions = [
        _action_row(action, plan.slots.get(index)) for index, action in enumerate(plan.actions)
    ]
    return (
        f'{{"format": {json.dumps(FORMAT)}, "version": {VERSION},\n'
        f'"program": {json.dumps(plan.program)}, "machine": {json.dumps(plan.machine)},\n'
        f'"entry": {_rows(entry)},\n"actions": {_rows(actions)},\n"exit": {_rows(leaving)}}}\n'
    )


def from_json(text: str, program: Program, machine: Machine) -> Plan:
    """The plan that a text holds, if it is right for this program on this machine.

    A plan for another machine is taken as long as this one has room for it: it is verified here.

    Raises:
        PlanError: it is no plan, of another version, made for another program, too large for this
            machine, or it breaks a rule.
    """
    plan = from_values(parse(text))
    verify(plan, program, machine)
    return plan


def from_values(values: Mapping[str, Any]) -> Plan:
    """The plan that parsed JSON holds, of the right form; whether it is right, `verify` knows.

    Raises:
        PlanError: it is no plan, or of another version.
    """
    found = (values.get("format"), values.get("version"))
    # True equals 1, and is none.
    if found != (FORMAT, VERSION) or type(found[1]) is not int:
        raise PlanError(
            f"plan: {_cut(found)} cannot be read, only {(FORMAT, VERSION)}; plan it anew"
        )
    if sorted(values) != sorted(_KEYS):
        raise PlanError(f"plan: has the keys {_cut(sorted(values))}, wanted are {sorted(_KEYS)}")
    rows = [
        _list(f"actions[{i}]", row) for i, row in enumerate(_list("actions", values["actions"]))
    ]
    slots = {}
    for index, row in enumerate(rows):
        if row[:1] == ["copy"] and len(row) == 6 and row[5] is not None:
            slots[index] = _offset(f"actions[{index}]", row[5])
    return Plan(
        program=_digest("program", values["program"]),
        machine=_digest("machine", values["machine"]),
        entry=_rests("entry", values["entry"]),
        actions=tuple(_action(f"actions[{index}]", row) for index, row in enumerate(rows)),
        exit=_rests("exit", values["exit"]),
        slots=slots,
    )


def plan_digest(plan: Plan) -> str:
    """16 hexadecimal digits that change with anything in the plan."""
    return hashlib.sha256(to_json(plan).encode()).hexdigest()[:16]


def _rows(rows: Sequence[Sequence[str | int | None]]) -> str:
    return "[" + ",".join("\n" + json.dumps(row) for row in rows) + "]"


def _rest_row(rest: Residence) -> list[str | int | None]:
    return [rest.array, rest.tier, rest.codec, rest.offset]


def _action_row(action: Action, slot: int | None) -> list[str | int | None]:
    match action:
        case Run():
            return ["run", action.step]
        case Copy():
            return ["copy", action.array, action.source, action.target, action.codec, slot]
        case Free():
            return ["free", action.array, action.tier]
        case _:
            assert_never(action)


def parse(text: str) -> dict[str, Any]:
    """A JSON object that someone else may have written.

    Raises:
        PlanError: it is none, too large, or has a key twice.
    """
    if len(text) > LARGEST_TEXT:
        raise PlanError(f"plan: {len(text):,} characters; at most {LARGEST_TEXT:,} are read")
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except PlanError:
        raise
    # A ValueError also says that a number has too many digits.
    except (ValueError, RecursionError) as error:
        raise PlanError(f"plan: not JSON: {_cut(error)}") from error
    if not isinstance(values, dict):
        raise PlanError(f"plan: must be an object, found a {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise PlanError("plan: an object has the same key twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise PlanError(f"plan: {name} is no number of a plan")


def _action(where: str, row: list[Any]) -> Action:
    match row:
        case ["run", step]:
            return Run(_name(where, step))
        case ["copy", array, source, target, codec, _]:
            words = [_name(where, word) for word in (array, source, target, codec)]
            return Copy(words[0], words[1], words[2], words[3])
        case ["free", array, tier]:
            return Free(_name(where, array), _name(where, tier))
        case _:
            raise PlanError(f"plan: {where} is no action: {_cut(row)}")


def _rests(where: str, value: Any) -> tuple[Residence, ...]:
    rests = []
    for index, row in enumerate(_list(where, value)):
        here = f"{where}[{index}]"
        if len(row := _list(here, row)) != 4:
            raise PlanError(f"plan: {here} has {len(row)} items, wanted are 4: {_cut(row)}")
        array, tier, codec = (_name(here, word) for word in row[:3])
        offset = None if row[3] is None else _offset(here, row[3])
        rests.append(Residence(array, tier, codec, offset))
    return tuple(rests)


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"plan: {where} must be a list, found {_cut(value)}")
    return value


def _name(where: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_NAME:
        raise PlanError(
            f"plan: {where} must hold names up to {LONGEST_NAME} letters: {_cut(value)}"
        )
    return value


def _digest(where: str, value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise PlanError(f"plan: {where} must be 16 hexadecimal digits, found {_cut(value)}")
    return value


def _offset(where: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_BYTES:
        raise PlanError(f"plan: {where} must have an offset in bytes or null, found {_cut(value)}")
    return value


def _cut(value: Any) -> str:
    """One line of something that may be long or hostile."""
    return ascii(value)[:80]
