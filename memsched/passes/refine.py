"""Local search on small layouts: let one weight stay or go, or swap two, while that helps."""

import dataclasses
import itertools
from collections.abc import Iterator

from memsched.passes.lower.fifo import WRAPS
from memsched.passes.lower.layout import Layout
from memsched.passes.needs import Needs
from memsched.passes.recipes import stacked
from memsched.passes.search import Found, evaluate

# The neighbours of a layout are as many as pairs of weights; each costs a simulation.
MOST_WEIGHTS = 24
MOST_TRIES = 300


def refined(needs: Needs, found: Found, device_bytes: int, *, repeat: bool) -> Found:
    """A layout at least as good; where it ends, no single change leads on.

    Args:
        needs: the program and its machine.
        found: where to start.
        device_bytes: what weights may take on the device.
        repeat: whether the plan follows itself.
    """
    if len(needs.weights) > MOST_WEIGHTS:
        return found
    best, tries = found, 0
    improved = True
    while improved and tries < MOST_TRIES:
        improved = False
        for layout in _neighbours(needs, best.layout, device_bytes):
            tries += 1
            other = evaluate(needs, layout, best.values, repeat=repeat)
            if other is not None and other.seconds < best.seconds * (1 - 1e-9):
                best, improved = other, True
                break
    return best


def _neighbours(needs: Needs, layout: Layout, device_bytes: int) -> Iterator[Layout]:
    """Layouts that differ in one pinned weight, or in one for another."""
    kept = frozenset(name for name in needs.weights if name in layout.device.pinned)
    gone = [name for name in needs.weights if name not in kept]
    changes = [frozenset((name,)) for name in needs.weights]
    changes += [frozenset(pair) for pair in itertools.product(sorted(kept), gone)]
    for change, wrap in itertools.product(changes, WRAPS):
        order = [name for name in needs.weights if name in kept ^ change]
        pool = stacked(order, needs.device_bytes, device_bytes)
        if pool.ring_offset <= device_bytes and len(order) < len(needs.weights):
            yield dataclasses.replace(layout, device=pool, wrap=wrap)
