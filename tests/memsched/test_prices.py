"""What a little more of everything is worth: the same in a report or solved again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import programs
import pytest
from decoders import computer, decoder

from memsched.bound import Masses, read_masses, solve
from memsched.cost import Roofline
from memsched.machine import DEVICE, HOST, Machine
from memsched.report import summarize, to_dict

DECODER = decoder()
SHARE = 0.01
# Of the seconds: HiGHS stops there.
SOLVED = 1e-6
# What is copied beside a step counts in the time of both: in times the bound is a little curved.
CURVED = 0.02
MACHINES = {
    "disk": computer(device=1_500_000_000),
    "fast disk": computer(device=1_500_000_000, disk_bytes_per_s=12e9),
    "bus": computer(device=1_000_000_000, host=4_000_000_000),
    "both": computer(device=1_000_000_000, host=1_700_000_000, disk_bytes_per_s=3e9),
}


def with_device(masses: Masses, share: float) -> Masses:
    return dataclasses.replace(
        masses, device_capacity_bytes=int(masses.device_capacity_bytes * (1 + share))
    )


def with_host(masses: Masses, share: float) -> Masses:
    assert masses.host_capacity_bytes is not None
    return dataclasses.replace(
        masses, host_capacity_bytes=int(masses.host_capacity_bytes * (1 + share))
    )


def with_compute(masses: Masses, share: float) -> Masses:
    windows = tuple(
        dataclasses.replace(one, seconds=one.seconds * (1 - share)) for one in masses.windows
    )
    return dataclasses.replace(masses, compute_s=masses.compute_s * (1 - share), windows=windows)


def with_arrival(masses: Masses, share: float) -> Masses:
    weights = tuple(
        dataclasses.replace(one, arrival_s=one.arrival_s * (1 - share)) for one in masses.weights
    )
    values = tuple(
        dataclasses.replace(one, back_s=one.back_s * (1 - share)) for one in masses.values
    )
    return dataclasses.replace(masses, weights=weights, values=values)


def with_staging(masses: Masses, share: float) -> Masses:
    weights = tuple(
        dataclasses.replace(one, staging_s=one.staging_s * (1 - share)) for one in masses.weights
    )
    return dataclasses.replace(masses, weights=weights)


def reported(machine: Machine) -> dict[str, Any]:
    """The prices of a report, whatever the plan: they are those of the bound."""
    plan = programs.naive_plan(DECODER, machine)
    data = to_dict({"decode": summarize(plan, DECODER, machine, Roofline())})
    prices: dict[str, Any] = data["dual_prices"]
    return prices


def gained_s(prices: dict[str, Any], masses: Masses, key: str, share: float) -> float:
    """By the price, for one percent or so more."""
    capacities = {DEVICE: masses.device_capacity_bytes, HOST: masses.host_capacity_bytes or 0}
    if key in capacities:
        worth_s: float = prices["seconds_per_gb"][key] * capacities[key] / 1e9
        return worth_s * share
    lanes = {
        "compute": "compute",
        "arrival": masses.arrival_lane,
        "staging": masses.staging_lane or "",
    }
    busy_s: float = prices["seconds_of_lane"][lanes[key]]
    return busy_s * share


MORE: dict[str, Callable[[Masses, float], Masses]] = {
    DEVICE: with_device,
    HOST: with_host,
    "compute": with_compute,
    "arrival": with_arrival,
    "staging": with_staging,
}


@pytest.mark.parametrize("name", MACHINES)
def test_prices_agree_with_solving_again_one_percent_up_and_down(name: str) -> None:
    machine = MACHINES[name]
    masses, prices = read_masses(DECODER, machine, Roofline()), reported(machine)
    now_s = solve(masses).seconds
    smooth = dear = 0
    for key, change in MORE.items():
        if machine.device_is_host and key in (HOST, "staging"):
            continue
        up_s = now_s - solve(change(masses, SHARE)).seconds
        down_s = solve(change(masses, -SHARE)).seconds - now_s
        priced_s = gained_s(prices, masses, key, SHARE)
        # Less costs more than more brings: the price lies between, also where there is a kink.
        rounding_s = SOLVED * now_s + (0.0 if key in (DEVICE, HOST) else CURVED * priced_s)
        assert up_s - rounding_s <= priced_s <= down_s + rounding_s, key
        if down_s - up_s <= 0.01 * down_s:
            smooth += 1
            assert priced_s == pytest.approx(up_s, rel=0.01, abs=rounding_s), key
            assert priced_s == pytest.approx(down_s, rel=0.01, abs=rounding_s), key
        dear += priced_s > 1e-4 * now_s
    assert smooth >= 2
    assert dear >= 1


@pytest.mark.parametrize("device", range(600_000_000, 3_500_000_000, 290_000_000))
def test_more_memory_is_worth_its_price_at_every_size(device: int) -> None:
    machine = computer(device=device)
    masses = read_masses(DECODER, machine, Roofline())
    now_s = solve(masses).seconds
    up_s = now_s - solve(with_device(masses, SHARE)).seconds
    down_s = solve(with_device(masses, -SHARE)).seconds - now_s
    priced_s = gained_s(reported(machine), masses, DEVICE, SHARE)
    assert up_s - SOLVED * now_s <= priced_s <= down_s + SOLVED * now_s
    assert priced_s > 0
