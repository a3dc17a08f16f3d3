"""Ways of spoiling a plan at random: each takes a valid plan apart at one place."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from memsched.machine import Machine
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import Program


@dataclasses.dataclass(frozen=True)
class Case:
    """A valid plan, what it is for, and the dice."""

    plan: Plan
    program: Program
    machine: Machine
    rng: np.random.Generator

    def one(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def array(self) -> str:
        return str(self.one(list(self.program.arrays)))

    def tier(self) -> str:
        return str(self.one(self.machine.tiers).name)

    def offset(self) -> int | None:
        """Another slot of the plan, a neighbouring or unaligned place, or none."""
        known = [*self.plan.slots.values(), 0, 64]
        shifts = [0, 0, 64, -64, 128, 32, 1, 1 << 14, None]
        shift = self.one(shifts)
        return None if shift is None else int(self.one(known)) + shift


def rebuilt(plan: Plan, order: Sequence[tuple[int, Action]]) -> Plan:
    """Actions by (index they had, action); a slot stays with the action it belonged to."""
    slots = {new: plan.slots[old] for new, (old, _) in enumerate(order) if old in plan.slots}
    return dataclasses.replace(plan, actions=tuple(action for _, action in order), slots=slots)


def _drop(case: Case) -> Plan:
    order = list(enumerate(case.plan.actions))
    del order[int(case.rng.integers(len(order)))]
    return rebuilt(case.plan, order)


def _duplicate(case: Case) -> Plan:
    order = list(enumerate(case.plan.actions))
    again = case.one(order)
    order.insert(int(case.rng.integers(len(order) + 1)), again)
    return rebuilt(case.plan, order)


def _swap_neighbours(case: Case) -> Plan:
    order = list(enumerate(case.plan.actions))
    first = int(case.rng.integers(len(order) - 1))
    order[first : first + 2] = order[first : first + 2][::-1]
    return rebuilt(case.plan, order)


def _swap(case: Case) -> Plan:
    order = list(enumerate(case.plan.actions))
    one, other = case.rng.integers(len(order), size=2)
    order[one], order[other] = order[other], order[one]
    return rebuilt(case.plan, order)


def _move(case: Case) -> Plan:
    order = list(enumerate(case.plan.actions))
    moved = order.pop(int(case.rng.integers(len(order))))
    order.insert(int(case.rng.integers(len(order) + 1)), moved)
    return rebuilt(case.plan, order)


def _insert(case: Case) -> Plan:
    order = list(enumerate(case.plan.actions))
    new = case.one(
        [
            Run(case.one(case.program.steps).name),
            Copy(case.array(), case.tier(), case.tier()),
            Free(case.array(), case.tier()),
        ]
    )
    order.insert(int(case.rng.integers(len(order) + 1)), (-1, new))
    return rebuilt(case.plan, order)


def _pair_dropped(case: Case) -> Plan:
    """A Copy and the next Free of what it brought, or a Free and the next Copy that undoes it."""
    order = list(enumerate(case.plan.actions))
    pairs = []
    open_at: dict[tuple[str, str], int] = {}
    for index, action in order:
        if isinstance(action, Run):
            continue
        place = (action.array, action.tier if isinstance(action, Free) else action.target)
        if place in open_at:
            pairs.append((open_at[place], index))
        open_at[place] = index
    gone = case.one(pairs) if pairs else ()
    return rebuilt(case.plan, [(index, action) for index, action in order if index not in gone])


def _two(case: Case) -> Plan:
    """Two of the others, one after the other."""
    names = [name for name in MUTATIONS if name != "two at once"]
    once = MUTATIONS[case.one(names)](case)
    return MUTATIONS[case.one(names)](dataclasses.replace(case, plan=once))


def _change(case: Case, kind: type[Action], **fields: Any) -> Plan:
    """One action of a kind with other fields; the plan itself if it has none."""
    order = list(enumerate(case.plan.actions))
    places = [index for index, action in order if isinstance(action, kind)]
    if places:
        index = int(case.one(places))
        order[index] = (index, order[index][1]._replace(**fields))
    return rebuilt(case.plan, order)


def _slot(case: Case) -> Plan:
    """A Copy to another offset, or an offset for what has none."""
    slots = dict(case.plan.slots)
    copies = [i for i, action in enumerate(case.plan.actions) if isinstance(action, Copy)]
    known = sorted(slots) if slots and case.rng.random() < 0.7 else copies
    index = int(case.one(known)) if known else 0
    offset = case.offset()
    if offset is None:
        slots.pop(index, None)
    else:
        slots[index] = offset
    return dataclasses.replace(case.plan, slots=slots)


def _slots_shifted(case: Case) -> Plan:
    """All later Copies take the offset of the one before."""
    keys = sorted(case.plan.slots)
    first = int(case.rng.integers(len(keys) + 1))
    values = [case.plan.slots[key] for key in keys]
    values[first:] = values[first:][1:] + values[first:][:1]
    return dataclasses.replace(case.plan, slots=dict(zip(keys, values, strict=True)))


def _residences(case: Case, rests: tuple[Residence, ...]) -> tuple[Residence, ...]:
    """One residence removed, added, or changed in one field."""
    at = int(case.rng.integers(len(rests)))
    if (chance := case.rng.random()) < 0.3:
        return rests[:at] + rests[at + 1 :]
    if chance < 0.45:
        return (*rests, Residence(case.array(), case.tier(), offset=case.offset()))
    field = case.one(["array", "tier", "codec", "offset", "offset"])
    value = {"array": case.array(), "tier": case.tier(), "codec": "int8", "offset": case.offset()}
    return (*rests[:at], rests[at]._replace(**{field: value[field]}), *rests[at + 1 :])


def _both(case: Case) -> Plan:
    """Another array or offset in entry and in exit alike."""
    spoilt = _residences(case, case.plan.entry)
    gone, new = set(case.plan.entry) - set(spoilt), set(spoilt) - set(case.plan.entry)
    left = tuple(rest for rest in case.plan.exit if rest not in gone)
    return dataclasses.replace(case.plan, entry=spoilt, exit=(*left, *sorted(new, key=str)))


MUTATIONS: Mapping[str, Callable[[Case], Plan]] = {
    "action dropped": _drop,
    "action duplicated": _duplicate,
    "action inserted": _insert,
    "action moved": _move,
    "actions swapped": _swap,
    "neighbours swapped": _swap_neighbours,
    "pair dropped": _pair_dropped,
    "two at once": _two,
    "run: step": lambda case: _change(case, Run, step=case.one(case.program.steps).name),
    "copy: array": lambda case: _change(case, Copy, array=case.array()),
    "copy: source": lambda case: _change(case, Copy, source=case.tier()),
    "copy: target": lambda case: _change(case, Copy, target=case.tier()),
    "copy: codec": lambda case: _change(case, Copy, codec="int8"),
    "free: array": lambda case: _change(case, Free, array=case.array()),
    "free: tier": lambda case: _change(case, Free, tier=case.tier()),
    "offset": _slot,
    "offsets shifted": _slots_shifted,
    "entry": lambda case: dataclasses.replace(case.plan, entry=_residences(case, case.plan.entry)),
    "exit": lambda case: dataclasses.replace(case.plan, exit=_residences(case, case.plan.exit)),
    "entry and exit": _both,
}
