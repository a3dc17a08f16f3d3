"""When streamed weights are on the device: one visit for each run of steps that read them."""

from collections.abc import Collection
from typing import NamedTuple

from memsched.passes.needs import Needs


class Visit(NamedTuple):
    """A weight that must be on the device from step `first` to step `last`, both included."""

    array: str
    first: int
    last: int


def visits(needs: Needs, streamed: Collection[str], *, gap: int) -> tuple[Visit, ...]:
    """All visits of some weights, in the order in which steps read them.

    Uses that are at most `gap` steps apart are one visit: with 0 every use is one of its own.
    """
    found: list[Visit] = []
    latest: dict[str, int] = {}
    for index, names in enumerate(needs.step_weights):
        for name in names:
            if name not in streamed:
                continue
            at = latest.get(name)
            if at is not None and index - found[at].last <= gap:
                found[at] = found[at]._replace(last=index)
            else:
                latest[name] = len(found)
                found.append(Visit(name, index, index))
    return tuple(found)
