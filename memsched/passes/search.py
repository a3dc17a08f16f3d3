"""Which layout makes the fastest plan: ring sizes and pinned sets, tried on the simulator."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from memsched.cost import plan_seconds
from memsched.passes.lower.assemble import assemble
from memsched.passes.lower.fifo import WRAPS
from memsched.passes.lower.layout import Layout, Pool
from memsched.passes.lower.ring import stream
from memsched.passes.lower.values import Values
from memsched.passes.needs import Needs
from memsched.passes.place import Spread, candidates, pinned
from memsched.plan import Plan

# A ring is tried in these multiples of the largest weight that passes through it.
MULTIPLES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)
HOST_MULTIPLES = (2.0, 4.0, 8.0, 16.0)
MOST_SIZES = 6
# Or in these multiples of what a step streams on average, and room for one weight more.
LOADS = (1.1, 1.25, 1.5, 2.0, 3.0, 1.0)
# Trying stops when this many actions have been simulated, or arrays placed: some seconds each.
MOST_ACTIONS = 300_000
MOST_ARRAYS = 500_000
CLOSE_ENOUGH = 1.002


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A layout, the actions of everything else, the plan of both, the seconds of one round."""

    seconds: float
    layout: Layout
    values: Values
    plan: Plan


def resident_layout(needs: Needs, host_bytes: int) -> Layout:
    """Everything stays on the device."""
    host = None if needs.machine.device_is_host else Pool({}, 0, host_bytes)
    return Layout(stacked(needs.weights, needs.device_bytes, 0), host)


def smallest_layout(needs: Needs, host_bytes: int) -> Layout:
    """Nothing stays, and the rings are as small as they can be."""
    ring = Pool({}, 0, needs.largest_step_bytes)
    host = None if needs.machine.device_is_host else Pool({}, 0, host_bytes)
    return Layout(ring, host, wrap="step", gap=0)


def evaluate(needs: Needs, layout: Layout, values: Values, *, repeat: bool) -> Found | None:
    """The plan of a layout, or None if a ring is too small for it."""
    moves = stream(needs, layout, repeat=repeat)
    if moves is None:
        return None
    plan = assemble(needs, moves, values)
    seconds = plan_seconds(plan, needs.program, needs.machine, needs.cost)
    return Found(seconds, layout, values, plan)


def search(
    needs: Needs,
    values: Values,
    device_bytes: int,
    host_bytes: int,
    *,
    repeat: bool,
    spreads: tuple[Spread, ...] = ("time", "bytes", "tail"),
) -> Found | None:
    """The fastest plan whose weights take no more than these bytes, or None if there is none.

    Args:
        needs: the program and its machine.
        values: the actions of everything else.
        device_bytes: what weights may take on the device.
        host_bytes: what they may take in the host tier, if there is one.
        repeat: whether the plan follows itself.
        spreads: how what is streamed may be spread over a round.
    """
    best = evaluate(needs, smallest_layout(needs, host_bytes), values, repeat=repeat)
    spent = 0
    for layout in _layouts(needs, device_bytes, host_bytes, spreads, repeat=repeat):
        if best is not None and CLOSE_ENOUGH * _bound(needs, layout) >= best.seconds:
            continue
        for wrap in WRAPS:
            found = evaluate(needs, dataclasses.replace(layout, wrap=wrap), values, repeat=repeat)
            if found is not None:
                break
        else:
            continue
        spent += len(found.plan.actions)
        if best is None or found.seconds < best.seconds:
            best = found
        if spent > MOST_ACTIONS:
            break
    return best


def _bound(needs: Needs, layout: Layout) -> float:
    """No round of a layout is shorter than its compute, nor than the copies of a link."""
    passing = [name for name in needs.weights if name not in layout.device.pinned]
    bound = max(sum(needs.step_s), sum(needs.arrival_s[name] for name in passing))
    if layout.host is None:
        return bound
    staged = (name for name in passing if name not in layout.host.pinned)
    return max(bound, sum(needs.staging_s[name] for name in staged))


def _layouts(
    needs: Needs,
    device_bytes: int,
    host_bytes: int,
    spreads: tuple[Spread, ...],
    *,
    repeat: bool,
) -> Iterator[Layout]:
    """Layouts worth trying, likely ones first."""
    may_stay = needs.weights
    if not repeat:
        may_stay = tuple(name for name in needs.weights if len(needs.uses[name]) > 1)
    found = candidates(needs, may_stay, needs.device_bytes, needs.arrival_s)
    seen: set[frozenset[str]] = set()
    tries = itertools.product(ring_sizes(needs, device_bytes), spreads)
    for (ring_bytes, largest), spread in itertools.islice(
        tries, 1 + MOST_ARRAYS // len(found.names or " ")
    ):
        kept = pinned(found, device_bytes - ring_bytes, largest, spread)
        if kept is None or kept in seen or len(kept) == len(needs.weights):
            continue
        seen.add(kept)
        order = [name for name in needs.weights if name in kept]
        pool = stacked(order, needs.device_bytes, device_bytes)
        if pool.ring_bytes >= _largest_load(needs, kept):
            yield from _with_host(needs, pool, host_bytes, repeat=repeat)


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


def _with_host(needs: Needs, device: Pool, host_bytes: int, *, repeat: bool) -> Iterator[Layout]:
    """The layouts of one device pool: where in the host the others rest."""
    if needs.machine.device_is_host:
        yield Layout(device)
        return
    # Who rests on the device from the start does not pass through the host.
    passing = [name for name in needs.weights if not (repeat and name in device.pinned)]
    if sum(needs.host_bytes[name] for name in passing) <= host_bytes:
        yield Layout(device, stacked(passing, needs.host_bytes, host_bytes))
        return
    found = candidates(needs, passing, needs.host_bytes, needs.staging_s)
    largest = max(needs.host_bytes[name] for name in needs.weights)
    for multiple in HOST_MULTIPLES:
        kept = pinned(found, int(host_bytes - multiple * largest), largest, "time")
        if kept is not None:
            order = [name for name in passing if name in kept]
            yield Layout(device, stacked(order, needs.host_bytes, host_bytes))


def stacked(names: Iterable[str], sizes: Mapping[str, int], capacity_bytes: int) -> Pool:
    """Pinned weights side by side from 0, and the ring in what is left."""
    offsets, end = {}, 0
    for name in names:
        offsets[name] = end
        end += sizes[name]
    return Pool(offsets, end, max(0, capacity_bytes - end))


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
