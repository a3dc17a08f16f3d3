"""Layouts from a placement by integer programming: so many of each class stay, evenly spread.

The search spreads whatever it keeps over a round; here each class is spread by itself, and how many
of which class stay follows from all links together.
"""

from collections.abc import Iterator, Sequence

from memsched.bound import Placed, placed, read_masses
from memsched.passes.lower.layout import Layout
from memsched.passes.needs import Needs
from memsched.passes.recipes import stacked

# Rings of the device (in loads of the largest step) and the host (in largest weights) to try.
RINGS = ((2.0, 1.0), (1.0, 3.0))


def starts(needs: Needs, device_bytes: int, host_bytes: int, count: int) -> Iterator[Layout]:
    """Some layouts for a plan that follows itself.

    Args:
        needs: the program and its machine.
        device_bytes: what weights may take on the device.
        host_bytes: what they may take in the host tier, if there is one.
        count: how many, at most.
    """
    if not count:
        return
    masses = read_masses(needs.program, needs.machine, needs.cost)
    tries = [rings if masses.staging_lane else (rings[0], 0.0) for rings in RINGS[:count]]
    for rings, host_rings in dict.fromkeys(tries):
        found = placed(masses, device_bytes, host_bytes, rings, host_rings)
        layout = None if found is None else _layout(needs, found, device_bytes, host_bytes)
        if layout is not None:
            yield layout


def _layout(needs: Needs, found: Placed, device_bytes: int, host_bytes: int) -> Layout | None:
    on_device: set[str] = set()
    in_host: set[str] = set()
    for one, here, near in zip(found.classes, found.on_device, found.in_host, strict=True):
        kept = _even(one.names, here)
        on_device |= kept
        in_host |= _even([name for name in one.names if name not in kept], near)
    if len(on_device) == len(needs.weights):
        return None
    order = [name for name in needs.weights if name in on_device]
    device = stacked(order, needs.device_bytes, device_bytes)
    if device.ring_offset > device_bytes:
        return None
    if needs.machine.device_is_host:
        return Layout(device)
    host = stacked(
        [name for name in needs.weights if name in in_host], needs.host_bytes, host_bytes
    )
    return Layout(device, host) if host.ring_offset <= host_bytes else None


def _even(names: Sequence[str], count: int) -> set[str]:
    """So many of some names, as far from each other as can be."""
    whole = len(names)
    return {
        name
        for index, name in enumerate(names)
        if (index + 1) * count // whole > index * count // whole
    }
