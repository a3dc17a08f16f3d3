"""Plans of phases that follow each other: what one keeps, the next finds in its place.

The last phase is the one repeated most, so it chooses first. Each phase before it keeps a part of
what the last one keeps, as much as it has room for beside its own activations and its ring, even
if it does not read it: to load it again costs more than a larger ring saves. Where there is room
for more, it keeps weights of its own on top. What they lose to plans of their own by that, they
save many times when the phases change; the last one loses nothing.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from memsched.passes.budgets import fastest, host_room
from memsched.passes.caching import better_cached
from memsched.passes.effort import HINT, Effort
from memsched.passes.lower.fifo import WRAPS, Wrap
from memsched.passes.lower.layout import Layout, Pool
from memsched.passes.lower.values import Values
from memsched.passes.needs import Needs
from memsched.passes.place import candidates, pinned
from memsched.passes.recipes import stacked
from memsched.passes.search import USUAL, Found, evaluate
from memsched.passes.stack import Stack
from memsched.plan import Plan

RING_SHARES = (0.5, 1.0, 1.5, 2.0, 3.0)
# A phase takes the smallest ring among those that make it this much slower than the best.
CLOSE_ENOUGH = 1.02


@dataclasses.dataclass(frozen=True, slots=True)
class _Decision:
    """What a phase keeps: of the stack (which others read, too), and of its own on top of it."""

    kept: frozenset[str]
    own: tuple[str, ...]
    wrap: Wrap
    gap: int


def plan_phases(phases: Mapping[str, Needs], effort: Effort = USUAL) -> dict[str, Plan]:
    """A plan for each phase; all repeat, and what two of them keep lies at one offset.

    The last one is as fast as if it were planned alone, and so no slower than any plain way.

    Raises:
        DoesNotFitError: a phase has no plan within the budgets.
    """
    whole = {name: needs.device_bytes[name] for needs in phases.values() for name in needs.weights}
    order = list(phases)[::-1]
    alone = {
        key: fastest(
            needs,
            repeat=True,
            others_bytes=sum(whole.values()) - needs.weights_bytes,
            effort=effort if key == order[0] else effort.share(HINT),
        )
        for key, needs in phases.items()
    }
    host = _host_pool(phases, alone, order)
    stack = _first_stack(phases, alone, order, whole)
    decisions = {}
    for key in order:
        if key == order[0]:
            layout = alone[key].layout
            decisions[key] = _Decision(frozenset(stack.names), (), layout.wrap, layout.gap)
        else:
            stack, decisions[key] = _fit(phases[key], alone[key], stack, host)
    plans = {}
    for key, needs in phases.items():
        made = _lay_out(needs, alone[key].values, stack, decisions[key], host)
        if key == order[0]:
            # Others' values may take the room that its ring in the host would need.
            if made is None or made.seconds > alone[key].seconds:
                made = alone[key]
            plans[key] = better_cached(needs, made, repeat=True)
            continue
        assert made is not None, "what was tried before fits"
        plans[key] = made.plan
    return plans


def _first_stack(
    phases: Mapping[str, Needs],
    alone: Mapping[str, Found],
    order: Sequence[str],
    sizes: Mapping[str, int],
) -> Stack:
    """What the last phase keeps and, if that is all of its weights, others' as far as they fit."""
    needs, found = phases[order[0]], alone[order[0]]
    kept = [name for name in needs.weights if name in found.layout.device.pinned]
    guests = []
    if len(kept) == len(needs.weights):
        room = needs.device_capacity_bytes - found.values.device_bytes
        room -= sum(sizes[name] for name in kept)
        seen = set(kept)
        for name in (name for key in order[1:] for name in phases[key].weights):
            if name not in seen and sizes[name] <= room:
                seen.add(name)
                guests.append(name)
                room -= sizes[name]
    return Stack(tuple(tuple(layer) for layer in (kept, guests) if layer), sizes)


def _host_pool(
    phases: Mapping[str, Needs], alone: Mapping[str, Found], order: Sequence[str]
) -> Pool | None:
    """Who rests in the host, in all phases alike: those that the last one has there, and its ring.

    If nothing passes through its ring, others rest there, too, as far as there is room.
    """
    first, own = phases[order[0]], alone[order[0]].layout
    if own.host is None:
        return None
    room = min(host_room(phases[key], alone[key].values) for key in order)
    sizes = {name: size for key in order for name, size in _host_sizes(phases[key]).items()}
    passing = [name for name in sizes if name not in own.device.pinned]
    staged = any(first.uses.get(name) and name not in own.host.pinned for name in passing)
    if sum(sizes.values()) <= room:
        return stacked(sizes, sizes, room)
    names = [name for name in passing if name in own.host.pinned]
    ring_bytes = max(size for name, size in sizes.items() if name not in names)
    if staged:
        ring_bytes = max(ring_bytes, own.host.ring_bytes)
    used = sum(sizes[name] for name in names)
    if used + ring_bytes > room:
        # Whoever has to leave passes through the ring, too.
        ring_bytes = max(ring_bytes, *sizes.values())
        found = candidates(first, names, first.host_bytes, first.staging_s)
        kept = pinned(found, room - ring_bytes, max(sizes.values()), "bytes") or frozenset()
        names = [name for name in names if name in kept]
        used = sum(sizes[name] for name in names)
    for name in dict.fromkeys((*passing, *sizes)):
        if name not in names and used + sizes[name] <= room - ring_bytes:
            names.append(name)
            used += sizes[name]
    return stacked(names, sizes, room)


def _host_sizes(needs: Needs) -> dict[str, int]:
    return {name: needs.host_bytes[name] for name in needs.weights}


def _fit(needs: Needs, alone: Found, stack: Stack, host: Pool | None) -> tuple[Stack, _Decision]:
    """The part of the stack that a phase keeps, by the ring that serves it best."""
    capacity = needs.device_capacity_bytes - alone.values.device_bytes
    tried: list[tuple[float, int, Stack, _Decision]] = []
    for ring_bytes in _rings(needs, alone, capacity):
        cut, under = stack.split(
            capacity - ring_bytes, lambda layer, room: _choose(needs, stack, layer, room)
        )
        room = capacity - ring_bytes - sum(stack.sizes[name] for name in under)
        own = _spread(needs, set(needs.weights) - set(under), room)
        for wrap in WRAPS:
            gap = alone.layout.gap if wrap == "array" else 0
            decision = _Decision(frozenset(under), own, wrap, gap)
            made = _lay_out(needs, alone.values, cut, decision, host)
            if made is not None:
                tried.append((made.seconds, ring_bytes, cut, decision))
                break
    fastest_s = min(seconds for seconds, *_ in tried)
    good = [one for one in tried if one[0] <= CLOSE_ENOUGH * fastest_s]
    _, _, cut, decision = min(good, key=lambda one: (one[1], one[0]))
    return cut, decision


def _lay_out(
    needs: Needs, values: Values, stack: Stack, decision: _Decision, host: Pool | None
) -> Found | None:
    """The plan of a phase that keeps a part of the stack, its own above, and its ring on top."""
    program, end = needs.program, sum(stack.sizes[name] for name in decision.kept)
    offsets = {
        name: offset
        for name, offset in stack.offsets.items()
        if name in decision.kept and name in program.arrays
    }
    for name in decision.own:
        offsets[name] = end
        end += stack.sizes[name]
    room = needs.device_capacity_bytes - values.device_bytes - end
    if host is not None:
        # What others spill into the host leaves this phase's ring alone.
        ring_bytes = host_room(needs, values) - host.ring_offset
        host = dataclasses.replace(host, ring_bytes=ring_bytes)
    layout = Layout(Pool(offsets, end, room), host, decision.wrap, decision.gap)
    return evaluate(needs, layout, values, repeat=True)


def _rings(needs: Needs, alone: Found, capacity: int) -> tuple[int, ...]:
    """Ring sizes to try: none, what served the phase alone, and multiples of the largest step."""
    tries = [0, alone.layout.device.ring_bytes]
    tries += [int(share * needs.largest_step_bytes) for share in RING_SHARES]
    return tuple(dict.fromkeys(ring for ring in tries if ring <= capacity))


def _choose(needs: Needs, stack: Stack, layer: Sequence[str], room: int) -> frozenset[str]:
    """Of a layer, what the phase reads, spread evenly; then anything else that fits."""
    kept = set(_spread(needs, {name for name in layer if needs.uses.get(name)}, room))
    room -= sum(stack.sizes[name] for name in kept)
    for name in layer:
        if not needs.uses.get(name) and stack.sizes[name] <= room:
            kept.add(name)
            room -= stack.sizes[name]
    return frozenset(kept)


def _spread(needs: Needs, names: Collection[str], room: int) -> tuple[str, ...]:
    """Those of some weights that stay, in order of use."""
    if not names:
        return ()
    found = candidates(needs, names, needs.device_bytes, needs.arrival_s)
    kept = pinned(found, room, max(found.sizes[name] for name in found.names), "time")
    return tuple(name for name in found.names if name in (kept or ()))
