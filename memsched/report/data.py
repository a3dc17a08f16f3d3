"""A report as plain data, for JSON."""

from collections.abc import Mapping
from typing import Any

from memsched.report.bound import Prices
from memsched.report.summary import ArrayUse, Summary


def to_dict(phases: Mapping[str, Summary]) -> dict[str, Any]:
    """Phases by name. Gap, prices, baselines and arrays are those of the last one.

    `prices` are seconds for 1 GB more of each tier, solved again; `dual_prices` those for a little
    more (a lane that is 1 % faster saves 1 % of its seconds). Both are null where not known.
    """
    last = phases[list(phases)[-1]]
    prices = last.prices
    return {
        "phases": {name: _phase(summary) for name, summary in phases.items()},
        "gap": last.gap,
        "prices": None if prices is None else dict(prices.with_gb_more_s),
        "dual_prices": None if prices is None else _dual_prices(prices),
        "baselines": dict(last.baselines),
        "arrays": [_array(use) for use in last.arrays],
    }


def _dual_prices(prices: Prices) -> dict[str, Any]:
    return {
        "seconds_per_gb": dict(prices.seconds_per_gb),
        "seconds_of_lane": dict(prices.seconds_of_lane),
    }


def _phase(summary: Summary) -> dict[str, Any]:
    return {
        "seconds": summary.seconds,
        "bound_seconds": summary.bound.seconds,
        "bound_by": summary.bound.lane,
        "seconds_p90": summary.seconds_p90,
        "peak_bytes": {name: tier.peak_bytes for name, tier in summary.occupancy.items()},
        "peak_parts": {name: dict(tier.parts) for name, tier in summary.occupancy.items()},
        "link_bytes": summary.link_bytes,
        "busy_seconds": {lane: use.busy_s for lane, use in summary.lanes.items()},
        "steps": summary.steps,
        "runs": summary.runs,
        "actions": summary.actions,
    }


def _array(use: ArrayUse) -> dict[str, Any]:
    return {
        "name": use.name,
        "nbytes": use.nbytes,
        "tier": use.tier,
        "codec": use.codec,
        "why": use.why,
    }
