"""Smaller and larger rings than those of a good layout, in ever smaller steps, while that helps.

A ring that is too small makes links wait, one that is too large keeps weights from staying. Where
two links are nearly equally busy both rings decide together, so they change in turn.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from memsched.passes.lower.layout import Layout
from memsched.passes.needs import Needs
from memsched.passes.place import Spread
from memsched.passes.recipes import Recipe, Room, layout_of, read_room
from memsched.passes.search import Found, evaluate_wrapped, least_seconds

# Rings change by these shares of the largest weight that passes.
SHARES = (0.5, 0.25, 0.125)
SPREADS: tuple[Spread, ...] = ("bytes", "time")
# In the end what passes is moved a little, and a ring made smaller by such a share of the largest:
# where links never wait, that decides about the last hundredth.
LEADS = (1.0, 0.75)
LESS = (0.0, 0.0625)
# Less to gain than this is not worth the planning.
WORTH_TRYING = 1.002


@dataclasses.dataclass(slots=True)
class _Trials:
    """What has been tried, and what that took."""

    needs: Needs
    room: Room
    most_actions: int
    spent: int = 0
    seen: set[tuple[frozenset[str], ...]] = dataclasses.field(default_factory=set)

    def better(self, recipe: Recipe, best: Found) -> Found | None:
        """The plan of a recipe, if it is faster and none like it has been tried."""
        layout = layout_of(self.needs, self.room, recipe)
        if layout is None or _pins(layout) in self.seen:
            return None
        self.seen.add(_pins(layout))
        if least_seconds(self.needs, layout) >= best.seconds:
            return None
        repeat = self.room.repeat
        found = evaluate_wrapped(self.needs, layout, best.values, repeat=repeat, recipe=recipe)
        if found is None:
            return None
        self.spent += len(found.plan.actions)
        return found if found.seconds < best.seconds else None


def tuned(
    needs: Needs,
    found: Found,
    device_bytes: int,
    host_bytes: int,
    *,
    repeat: bool,
    most_actions: int,
) -> Found:
    """A plan at least as fast; where it ends, no single change of a ring leads on.

    Args:
        needs: the program and its machine.
        found: where to start.
        device_bytes: what weights may take on the device.
        host_bytes: what they may take in the host tier, if there is one.
        repeat: whether the plan follows itself.
        most_actions: trying stops when so many have been simulated.
    """
    recipe = found.recipe
    if recipe is None or found.seconds <= WORTH_TRYING * sum(needs.step_s):
        return found
    room = read_room(needs, device_bytes, host_bytes, repeat=repeat)
    trials = _Trials(needs, room, most_actions)
    trials.seen.add(_pins(found.layout))
    best, share = found, 0
    while share < len(SHARES) and trials.spent <= most_actions:
        unit = max(1, int(SHARES[share] * _largest_passing(needs, best.layout)))
        for other in _neighbours(best.recipe or recipe, unit, staged=_is_staged(needs, best)):
            better = trials.better(other, best)
            if better is not None:
                best = better
                break
            if trials.spent > most_actions:
                break
        else:
            share += 1
    unit = _largest_passing(needs, best.layout)
    for other in _moved(best.recipe or recipe, unit, staged=_is_staged(needs, best)):
        if trials.spent > most_actions:
            break
        best = trials.better(other, best) or best
    return best


def _moved(recipe: Recipe, unit: int, *, staged: bool) -> Iterator[Recipe]:
    """Recipes by which others of the same weights pass, through the same rings or smaller ones."""
    for lead, less, spread in itertools.product(LEADS, LESS, SPREADS):
        ring, host = recipe.ring_bytes, recipe.host_ring_bytes
        if staged:
            host -= int(less * unit)
        else:
            ring -= int(less * unit)
        yield dataclasses.replace(
            recipe, ring_bytes=ring, host_ring_bytes=host, spread=spread, lead=lead
        )


def _neighbours(recipe: Recipe, unit: int, *, staged: bool) -> Iterator[Recipe]:
    """Recipes with one ring, or both, somewhat smaller or larger."""
    ring, host = recipe.ring_bytes, recipe.host_ring_bytes
    changes = [(-unit, 0), (unit, 0)]
    if staged:
        changes += [(0, -unit), (0, unit), (-unit, unit), (unit, -unit), (-unit, -unit)]
    for spread in SPREADS if staged else (recipe.host_spread,):
        if spread != recipe.host_spread:
            yield dataclasses.replace(recipe, host_spread=spread)
        for more, more_host in changes:
            if ring + more > 0 and host + more_host >= 0:
                yield dataclasses.replace(
                    recipe,
                    ring_bytes=ring + more,
                    host_ring_bytes=host + more_host,
                    host_spread=spread,
                )


def _pins(layout: Layout) -> tuple[frozenset[str], ...]:
    """Who stays where: that decides about a layout's rings, too."""
    host = () if layout.host is None else layout.host.pinned
    return frozenset(layout.device.pinned), frozenset(host)


def _largest_passing(needs: Needs, layout: Layout) -> int:
    pinned = layout.device.pinned
    return max(
        (needs.device_bytes[name] for name in needs.weights if name not in pinned), default=1
    )


def _is_staged(needs: Needs, found: Found) -> bool:
    """Whether some weights pass through the host."""
    layout = found.layout
    if layout.host is None:
        return False
    return any(
        name not in layout.device.pinned and name not in layout.host.pinned
        for name in needs.weights
    )
