"""Reports: the numbers against hand counts and the referee, the text line by line."""

import json
from collections.abc import Callable

import numpy as np
import programs
import pytest
import random_plans
from learned_costs import coefficients

from memsched.cost import Roofline, Span
from memsched.cost.learned import LearnedCost
from memsched.machine import Machine
from memsched.plan import Copy, Free, Plan, Residence, Run
from memsched.program import Program
from memsched.referee import verify
from memsched.report import (
    Measured,
    busy_seconds,
    comparison,
    comparison_text,
    lower_bound,
    occupancy,
    summarize,
    to_dict,
    to_text,
)
from memsched.report.rendering import WIDTH
from memsched.report.text import seconds_text
from memsched.report.what_if import gains_s

COST = Roofline()
# Three layers of 256 B; 1,000 operations each at 1e6 per second; disk 1e6 B/s.
CHAIN = programs.chain(layers=3)
SMALL = programs.tiny_machine(device=1024)
PINNED = Plan(
    program=CHAIN.digest,
    machine=SMALL.digest,
    entry=(
        Residence("w0", "device", offset=0),
        *(Residence(name, "nvme") for name in ("w0", "w1", "w2")),
        Residence("x", "device"),
    ),
    actions=(
        Run("layer0"),
        Free("x", "device"),
        Copy("w1", "nvme", "device"),
        Run("layer1"),
        Free("h0", "device"),
        Free("w1", "device"),
        Copy("w2", "nvme", "device"),
        Run("layer2"),
        Free("h1", "device"),
        Free("w2", "device"),
    ),
    exit=(
        Residence("w0", "device", offset=0),
        *(Residence(name, "nvme") for name in ("w0", "w1", "w2")),
        Residence("h2", "device"),
    ),
    slots={2: 256, 6: 256},
)

MAKERS: list[Callable[[], Program]] = [
    programs.chain,
    programs.decode,
    programs.prefill,
    programs.training,
    programs.blocks,
]


def machines() -> list[Machine]:
    return [programs.tiny_machine(), programs.tiny_machine(host=1 << 20)]


def test_the_example_is_right() -> None:
    assert verify(PINNED, CHAIN, SMALL) == {"device": 1024, "nvme": 0}


def test_a_tier_is_fullest_with_these_arrays() -> None:
    device = occupancy(PINNED, CHAIN, SMALL)["device"]
    assert (device.capacity_bytes, device.peak_bytes) == (1024, 1024)
    # While layer0 runs: the pinned weight, x and h0; the second slot waits for w1.
    assert device.index == 0
    assert device.parts == {
        "activation": 256,
        "idle in the arena": 256,
        "input": 256,
        "weight": 256,
    }


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("machine", machines(), ids=["two tiers", "three tiers"])
def test_peaks_are_the_referee_s(make: Callable[[], Program], machine: Machine) -> None:
    program = make()
    plan = programs.naive_plan(program, machine)
    found = occupancy(plan, program, machine)
    assert {name: tier.peak_bytes for name, tier in found.items()} == verify(plan, program, machine)


@pytest.mark.parametrize("machine", machines(), ids=["two tiers", "three tiers"])
def test_random_plans_peak_as_the_referee_says_and_beat_no_bound(machine: Machine) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        program = programs.random_program(rng)
        plan = random_plans.random_plan(rng, program, machine)
        peaks = verify(plan, program, machine)
        tight = machine.with_capacities(peaks)
        found = occupancy(plan, program, tight)
        assert {name: tier.peak_bytes for name, tier in found.items()} == peaks
        for tier in found.values():
            assert sum(tier.parts.values()) == tier.peak_bytes
            assert min(tier.parts.values(), default=1) > 0
        summary = summarize(plan, program, tight, COST)
        assert summary.seconds >= summary.bound.seconds * (1 - 1e-9), seed
        assert summary.runs >= summary.steps


def test_the_bound_counts_what_cannot_be_kept() -> None:
    # Of 1,024 B a step's values take 512: of two weights one is its own. Half of all can be kept.
    assert lower_bound(PINNED, CHAIN, SMALL, COST).lane_s == {
        "compute": pytest.approx(3e-3),
        "nvme->device": pytest.approx(384e-6, rel=1e-6),
    }
    # With a disk of 2e4 B/s these 384 B take longer than computing, and beside a step there is no
    # room for them but that of what is kept.
    slow = programs.tiny_machine(device=1024, nvme_bytes_per_s=2e4)
    bound = lower_bound(PINNED, CHAIN, slow, COST)
    alone_s = 384 / 2e4 + 3e-3
    assert (bound.lane, bound.seconds) == ("nvme->device", pytest.approx(alone_s, rel=1e-6))
    # 1 GB more holds everything: then computing is the bound.
    found = to_dict({"it": summarize(PINNED, CHAIN, slow, COST)})
    assert found["prices"] == {"device": pytest.approx(alone_s - 3e-3, rel=1e-5)}
    # What comes has no room beside a step: the disk's 384 B and all steps set the bound.
    assert found["dual_prices"]["seconds_of_lane"] == {
        "compute": pytest.approx(3e-3, rel=1e-5),
        "nvme->device": pytest.approx(384 / 2e4, rel=1e-5),
        "device->nvme": 0.0,
    }


def test_with_a_host_each_link_has_its_bound() -> None:
    machine = programs.tiny_machine(
        device=1024, host=128, nvme_bytes_per_s=1.0, host_bytes_per_s=2.0
    )
    plan = programs.naive_plan(CHAIN, programs.tiny_machine(host=1 << 20))
    # Half is kept on the device, and 128 B more in the host.
    bound = lower_bound(plan, CHAIN, machine, COST)
    assert bound.lane_s == {
        "compute": pytest.approx(3e-3),
        "nvme->host": pytest.approx(768 - 384 - 192, rel=1e-6),
        "host->device": pytest.approx((768 - 384) / 2.0, rel=1e-6),
    }


def test_a_plan_that_is_run_once_must_read_what_it_does_not_have() -> None:
    weights = tuple(Residence(f"w{i}", "nvme") for i in range(3))
    load = Plan(
        CHAIN.digest,
        SMALL.digest,
        (*weights, Residence("x", "device")),
        (Copy("w0", "nvme", "device"), *PINNED.actions),
        PINNED.exit,
        {0: 0, 3: 256, 7: 256},
    )
    verify(load, CHAIN, SMALL)
    assert lower_bound(load, CHAIN, SMALL, COST).lane_s["nvme->device"] == pytest.approx(768e-6)
    found = summarize(load, CHAIN, SMALL, COST)
    assert not found.repeated
    # Its bound is a sum: what more memory would be worth is not known.
    data = to_dict({"it": found})
    assert data["prices"] is data["dual_prices"] is None
    assert "device" not in gains_s(found, load, CHAIN, SMALL, COST)


def test_every_array_has_its_part() -> None:
    summary = summarize(PINNED, CHAIN, SMALL, COST)
    parts = {use.name: (use.role, use.tier) for use in summary.arrays}
    assert parts == {
        "x": ("passing", "device"),
        "w0": ("pinned", "device"),
        "w1": ("streamed", "nvme"),
        "w2": ("streamed", "nvme"),
        "h0": ("passing", "device"),
        "h1": ("passing", "device"),
        "h2": ("resident", "device"),
    }
    assert summary.link_bytes == {"nvme->device": 512, "device->nvme": 0}
    assert summary.lanes["compute"].actions == 3
    assert summary.lanes["compute"].busy_s == pytest.approx(3e-3)
    # Every copy waits for the step before, and the step for the copy: nothing overlaps.
    assert summary.seconds == pytest.approx(3e-3 + 512e-6)
    assert summary.gap == pytest.approx(512e-6 / 3e-3)


def test_weights_from_the_host_and_spilled_arrays_are_told_apart() -> None:
    program = programs.chain(layers=2)
    machine = programs.tiny_machine(host=1 << 20)
    rest = (
        Residence("w0", "nvme"),
        Residence("w1", "nvme"),
        Residence("w1", "host", offset=0),
    )
    plan = Plan(
        program.digest,
        machine.digest,
        (*rest, Residence("x", "device")),
        (
            Copy("w0", "nvme", "host"),
            Copy("w0", "host", "device"),
            Run("layer0"),
            Free("w0", "host"),
            Free("w0", "device"),
            Free("x", "device"),
            Copy("h0", "device", "host"),
            Free("h0", "device"),
            Copy("w1", "host", "device"),
            Copy("h0", "host", "device"),
            Run("layer1"),
            *(Free(name, "device") for name in ("w1", "h0")),
            Free("h0", "host"),
        ),
        (*rest, Residence("h1", "device")),
        {0: 256},
    )
    verify(plan, program, machine)
    uses = {use.name: use for use in summarize(plan, program, machine, COST).arrays}
    assert (uses["w0"].role, uses["w0"].tier) == ("streamed", "nvme")
    assert (uses["w1"].role, uses["w1"].tier) == ("streamed", "host")
    assert (uses["h0"].role, uses["h0"].tier) == ("spilled", "host")


TEXT = """\
decode: 3 steps, 10 actions
  a pass takes 3.51 ms, 2 tokens of it: 569 tokens/s
  no schedule beats 3 ms (compute): this one takes 17.1% more

  tier    peak B       of B                      made up of, B
  device   1,024      1,024  |aaaa----iiiiwwww|  256 activation
                                                 256 idle in the arena
                                                 256 input
                                                 256 weight
  nvme         0  1,048,576  |................|  0 nothing

  lane           actions   bytes     busy   of the time   bytes per token
  compute              3       0     3 ms           85%                 0
  nvme->device         2     512   512 us           15%               256

  stay on the device: 1 arrays, 256 B
    every pass reads them
                   256 B  w0
  streamed from nvme: 2 arrays, 512 B
    there is no room to keep them
                   256 B  w1
                   256 B  w2

  other ways, predicted:
    everything resident   does not fit
    lru                        7.02 ms   2.00 times this plan
"""


def test_the_text_is_this() -> None:
    baselines = {"everything resident": None, "lru": 2 * (3e-3 + 512e-6)}
    summary = summarize(PINNED, CHAIN, SMALL, COST, baselines)
    assert to_text({"decode": summary}, {"decode": 2}) == TEXT


def test_long_names_and_lists_are_cut_and_counted() -> None:
    names = [f"{'very.long.name.' * 9}{i}" for i in range(8)]
    program = programs.program(
        [
            programs.array("x", "input", 1),
            *(programs.array(name, "weight", 10 + i) for i, name in enumerate(names)),
            *(programs.array(f"unread{i}", "weight", 2) for i in range(3)),
            programs.array("y", "activation", 1),
        ],
        [programs.Step("only", "only", ("x", *names), ("y",))],
        ["y"],
    )
    machine = programs.tiny_machine(host=10**15)
    plan = programs.naive_plan(program, machine)
    text = to_text({"a": summarize(plan, program, machine, COST)} | {})
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert "never read: 3 arrays, 24 B" in text
    # All would fit: it is the naive plan that keeps nothing.
    assert (
        "  streamed from nvme: 8 arrays, 432 B\n"
        "    nothing keeps them, though all weights that are read would fit\n"
    ) in text
    # The five largest are 17 to 13 values long, of 4 B each.
    assert "132 B  in 3 others" in text


def test_data_has_the_promised_keys_and_survives_json() -> None:
    summary = summarize(PINNED, CHAIN, SMALL, COST, {"lru": 1.0, "everything resident": None})
    data = to_dict({"prefill": summary, "decode": summary})
    assert json.loads(json.dumps(data)) == data
    assert list(data["phases"]) == ["prefill", "decode"]
    phase = data["phases"]["decode"]
    assert {"seconds", "bound_seconds", "seconds_p90", "peak_bytes", "link_bytes"} <= phase.keys()
    assert phase["peak_bytes"] == {"device": 1024, "nvme": 0}
    assert data["baselines"] == {"lru": 1.0, "everything resident": None}
    assert data["arrays"][1] == {
        "name": "w0",
        "nbytes": 256,
        "tier": "device",
        "codec": "raw",
        "why": "pinned: every pass reads it",
    }


def test_nine_of_ten_times_are_said_by_a_cost_model_that_knows_quantiles() -> None:
    # 256 s for each of the two copies: beside them steps are nothing. Their margin is 1.3.
    slow = programs.tiny_machine(device=1024, nvme_bytes_per_s=1.0)
    learned = LearnedCost(coefficients(slow))
    found = summarize(PINNED, CHAIN, slow, learned)
    assert found.seconds_p90 == pytest.approx(1.3 * found.seconds, rel=1e-3)
    assert to_dict({"it": found})["phases"]["it"]["seconds_p90"] == found.seconds_p90
    unknown = summarize(PINNED, CHAIN, slow, COST)
    assert to_dict({"it": unknown})["phases"]["it"]["seconds_p90"] is None


def test_busy_time_counts_overlapping_spans_once() -> None:
    spans = [
        Span(0, 0.0, 1.0),
        Span(1, 1.0, 1.0),
        Span(2, 0.5, 2.0),
        Span(6, 1.5, 2.5),
        Span(3, 2.0, 3.0),
        Span(7, 5.0, 6.5),
    ]
    assert busy_seconds(PINNED, spans) == {"compute": 3.5, "nvme->device": 2.0}


def test_prediction_and_measurement_stand_side_by_side() -> None:
    summary = summarize(PINNED, CHAIN, SMALL, COST)
    measured = Measured(
        passes=2,
        seconds=0.014048,
        busy_s={"compute": 0.012, "nvme->device": 0.002048},
        peak_bytes={"device": 1024},
        read_bytes=1024,
        written_bytes=0,
    )
    lines = comparison(summary, measured)
    found = [(line.what, line.unit, line.predicted, line.measured) for line in lines]
    assert found == [
        ("a pass", "s", pytest.approx(0.003512), pytest.approx(0.007024)),
        ("compute busy", "s", pytest.approx(0.003), 0.006),
        ("nvme->device busy", "s", pytest.approx(0.000512), 0.001024),
        ("read from disk", "B", 512.0, 512.0),
        ("written to disk", "B", 0.0, 0.0),
        ("device peak", "B", 1024.0, 1024.0),
    ]
    assert comparison_text(lines).splitlines()[1:5] == [
        "a pass                                0.0035 s              0.0070 s     2.000",
        "compute busy                          0.0030 s              0.0060 s     2.000",
        "nvme->device busy                     0.0005 s              0.0010 s     2.000",
        "read from disk                           512 B                 512 B     1.000",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (2e-9, "2 ns"),
        (1.5e-5, "15 us"),
        (0.25, "250 ms"),
        (0.9997, "1,000 ms"),
        (3.14159, "3.14 s"),
        (12345.6, "12,346 s"),
    ],
)
def test_seconds_have_a_readable_unit(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
