"""How a layout is made: how large the rings are, what may pass through them, how it is spread."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from memsched.passes.lower.layout import Layout, Pool
from memsched.passes.needs import Needs
from memsched.passes.place import Candidates, Spread, candidates, pinned

# A ring is tried in these multiples of the largest weight that passes through it.
MULTIPLES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)
HOST_MULTIPLES = (2.0, 3.0, 4.0, 8.0)
MOST_SIZES = 6
# Or in these multiples of what a step streams on average, and room for one weight more.
LOADS = (1.1, 1.25, 1.5, 2.0, 3.0, 1.0)
# Recipes end when so many arrays have been placed: some seconds.
MOST_ARRAYS = 500_000


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """What passes through the device is no larger than `largest_bytes`, and spread by `spread`.

    Rings get at least their bytes. Those of the host count where not all that passes fits there.
    `lead` moves what passes to and fro in a round: see `pinned`.
    """

    ring_bytes: int
    largest_bytes: int
    spread: Spread
    host_ring_bytes: int = 0
    host_spread: Spread = "bytes"
    lead: float = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """What weights may take on the device and in the host, if there is one; who may stay.

    `repeat` says whether the plan follows itself.
    """

    device_bytes: int
    host_bytes: int
    stay: Candidates
    repeat: bool


def read_room(needs: Needs, device_bytes: int, host_bytes: int, *, repeat: bool) -> Room:
    """Who may stay on the device: in a plan that runs once, what is read more than once."""
    may_stay = needs.weights
    if not repeat:
        may_stay = tuple(name for name in needs.weights if len(needs.uses[name]) > 1)
    stay = candidates(needs, may_stay, needs.device_bytes, needs.arrival_s)
    return Room(device_bytes, host_bytes, stay, repeat)


def coarse(
    needs: Needs, room: Room, spreads: tuple[Spread, ...]
) -> Iterator[tuple[Recipe, Layout]]:
    """Layouts worth trying, likely ones first, and how they are made."""
    seen: set[frozenset[str]] = set()
    tries = itertools.product(ring_sizes(needs, room.device_bytes), spreads)
    for (ring_bytes, largest), spread in itertools.islice(
        tries, 1 + MOST_ARRAYS // len(room.stay.names or " ")
    ):
        recipe = Recipe(ring_bytes, largest, spread)
        device = device_pool(needs, room, recipe)
        if device is None or frozenset(device.pinned) in seen:
            continue
        seen.add(frozenset(device.pinned))
        if needs.machine.device_is_host or not _is_staged(needs, room, device):
            layout = finished(needs, room, recipe, device)
            if layout is not None:
                yield recipe, layout
            continue
        unit = max(needs.host_bytes[name] for name in needs.weights)
        for multiple in HOST_MULTIPLES:
            wider = dataclasses.replace(recipe, host_ring_bytes=int(multiple * unit))
            layout = finished(needs, room, wider, device)
            if layout is not None:
                yield wider, layout


def layout_of(needs: Needs, room: Room, recipe: Recipe) -> Layout | None:
    """The layout of a recipe, or None if there is none."""
    device = device_pool(needs, room, recipe)
    return None if device is None else finished(needs, room, recipe, device)


def device_pool(needs: Needs, room: Room, recipe: Recipe) -> Pool | None:
    """Who stays on the device; None if all do, or if a step streams more than the ring holds."""
    budget = room.device_bytes - recipe.ring_bytes
    kept = pinned(room.stay, budget, recipe.largest_bytes, recipe.spread, recipe.lead)
    if kept is None or len(kept) == len(needs.weights):
        return None
    order = [name for name in needs.weights if name in kept]
    pool = stacked(order, needs.device_bytes, room.device_bytes)
    return pool if pool.ring_bytes >= _largest_load(needs, kept) else None


def finished(needs: Needs, room: Room, recipe: Recipe, device: Pool) -> Layout | None:
    """A device pool with the place in the host where the others rest."""
    if needs.machine.device_is_host:
        return Layout(device)
    passing = _passing(needs, room, device)
    if not _is_staged(needs, room, device):
        return Layout(device, stacked(passing, needs.host_bytes, room.host_bytes))
    found = candidates(needs, passing, needs.host_bytes, needs.staging_s)
    largest = max(needs.host_bytes[name] for name in needs.weights)
    budget = room.host_bytes - recipe.host_ring_bytes
    kept = pinned(found, budget, largest, recipe.host_spread, recipe.lead)
    if kept is None:
        return None
    order = [name for name in passing if name in kept]
    return Layout(device, stacked(order, needs.host_bytes, room.host_bytes))


def ring_sizes(needs: Needs, device_bytes: int) -> tuple[tuple[int, int], ...]:
    """Ring sizes worth trying, each with the largest weight that may pass through it.

    A ring must hold what a step streams: some weights, or about the share that does not fit of a
    step with many. Both are tried with some room to fetch ahead.
    """
    sizes = _sizes([needs.device_bytes[name] for name in needs.weights], device_bytes)
    if not sizes:
        return ()
    share = max(0.0, 1 - device_bytes / max(1, needs.weights_bytes))
    load = share * needs.largest_step_bytes
    rings = [(int(more * load + sizes[0]), sizes[0]) for more in LOADS]
    rings += [(int(more * size), size) for more, size in itertools.product(MULTIPLES, sizes)]
    return tuple(ring for ring in dict.fromkeys(rings) if ring[0] < device_bytes)


def stacked(names: Iterable[str], sizes: Mapping[str, int], capacity_bytes: int) -> Pool:
    """Pinned weights side by side from 0, and the ring in what is left."""
    offsets, end = {}, 0
    for name in names:
        offsets[name] = end
        end += sizes[name]
    return Pool(offsets, end, max(0, capacity_bytes - end))


def _passing(needs: Needs, room: Room, device: Pool) -> list[str]:
    """Who rests on the device from the start does not pass through the host."""
    return [name for name in needs.weights if not (room.repeat and name in device.pinned)]


def _is_staged(needs: Needs, room: Room, device: Pool) -> bool:
    """Whether the host has no room for all that passes."""
    passing = _passing(needs, room, device)
    return sum(needs.host_bytes[name] for name in passing) > room.host_bytes


def _largest_load(needs: Needs, kept: frozenset[str]) -> int:
    """The most bytes that one step streams."""
    return max(
        sum(needs.device_bytes[name] for name in names if name not in kept)
        for names in needs.step_weights
    )


def _sizes(nbytes: Sequence[int], kept_bytes: int) -> tuple[int, ...]:
    """Some of the distinct sizes up to which weights may pass, the largest always among them.

    Without the larger ones there must be enough to pass.
    """
    excess = sum(nbytes) - kept_bytes
    distinct = sorted(set(nbytes), reverse=True)
    enough = [size for size in distinct if sum(one for one in nbytes if one <= size) > excess]
    found = enough or distinct
    if len(found) <= MOST_SIZES:
        return tuple(found)
    stride = (len(found) - 1) / (MOST_SIZES - 1)
    return tuple(found[round(index * stride)] for index in range(MOST_SIZES))
