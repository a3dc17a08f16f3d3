"""What more of something would be worth: by how much the bound falls with it."""

import dataclasses
from collections.abc import Callable

from memsched.cost import CostModel
from memsched.machine import HOST, NVME, Link, Machine
from memsched.plan import Plan
from memsched.program import Program
from memsched.report.bound import lower_bound
from memsched.report.summary import Summary

# What is twice as fast, under these names; tiers have their own.
DISK, BUS, COMPUTE = "disk", "bus", "compute"


def gains_s(
    summary: Summary, plan: Plan, program: Program, machine: Machine, cost: CostModel
) -> dict[str, float]:
    """Seconds that the bound falls, one by one, with 1 GB more of a tier, and with all links of the
    "disk", those between "host" and "device" ("bus") or "compute" twice as fast. Tiers are left out
    where their prices are not known.

    Args:
        summary: of this plan on this machine.
    """
    now_s = summary.bound.seconds
    faster = {DISK: _faster_links(machine, _of_disk), COMPUTE: _faster_compute(machine)}
    if machine.has_tier(HOST):
        faster[BUS] = _faster_links(machine, lambda link: not _of_disk(link))
    gains = dict(summary.prices.with_gb_more_s) if summary.prices else {}
    for name, other in faster.items():
        gains[name] = now_s - lower_bound(plan, program, other, cost).seconds
    return {name: max(0.0, seconds) for name, seconds in gains.items()}


def _of_disk(link: Link) -> bool:
    return NVME in (link.source, link.target)


def _faster_links(machine: Machine, chosen: Callable[[Link], bool]) -> Machine:
    links = tuple(
        dataclasses.replace(link, bytes_per_s=2 * link.bytes_per_s) if chosen(link) else link
        for link in machine.links
    )
    return dataclasses.replace(machine, links=links)


def _faster_compute(machine: Machine) -> Machine:
    now = machine.compute
    twice = dataclasses.replace(
        now, flops_per_s=2 * now.flops_per_s, bytes_per_s=2 * now.bytes_per_s
    )
    return dataclasses.replace(machine, compute=twice)
