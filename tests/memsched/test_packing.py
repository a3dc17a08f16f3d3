"""Offsets for known lifetimes, against brute force and instances that others made."""

import csv
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsched.errors import DoesNotFitError, ProgramError
from memsched.packing import Item, Packing, pack, search

INSTANCES = Path(__file__).parents[1] / "data" / "minimalloc"


def broken_rules(items: Sequence[Item], packing: Packing) -> list[str]:
    """What is wrong with a packing, by looking at every pair."""
    placed = list(zip(items, packing.offsets, strict=True))
    wrong = []
    for (one, low), (other, high) in itertools.combinations(placed, 2):
        together = one.lower < other.upper and other.lower < one.upper
        if together and max(low, high) < min(low + one.size, high + other.size):
            wrong.append(f"{one} at {low} overlaps {other} at {high}")
    for item, offset in placed:
        if offset < 0 or offset % item.alignment or item.offset not in (None, offset):
            wrong.append(f"{item} at {offset}")
    if packing.peak != max((offset + item.size for item, offset in placed), default=0):
        wrong.append(f"the peak is not {packing.peak}")
    return wrong


def live_sum(items: Sequence[Item]) -> int:
    """The largest sum of sizes at any moment, counted at every start."""
    return max(
        (
            sum(item.size for item in items if item.lower <= start.lower < item.upper)
            for start in items
        ),
        default=0,
    )


def smallest_peak(items: Sequence[Item]) -> int:
    """The lowest peak there is: capacities one by one, and for each all offsets of all items."""
    fixed = [(item, item.offset) for item in items if item.offset is not None]
    free = [item for item in items if item.offset is None]
    lowest = max([live_sum(items), *(offset + item.size for item, offset in fixed)])
    return next(peak for peak in itertools.count(lowest) if fits(free, fixed, peak))


def fits(free: list[Item], placed: list[tuple[Item, int]], peak: int) -> bool:
    if not free:
        return True
    item = free[0]
    return any(
        fits(free[1:], [*placed, (item, offset)], peak)
        for offset in range(0, peak - item.size + 1, item.alignment)
        if all(
            item.upper <= other.lower
            or other.upper <= item.lower
            or offset + item.size <= start
            or start + other.size <= offset
            for other, start in placed
        )
    )


@st.composite
def item_lists(draw: st.DrawFn, most: int, longest: int, largest: int) -> list[Item]:
    """Items of which up to two are fixed, far enough apart not to overlap."""
    alignments = draw(st.sampled_from([(1,), (2,), (1, 2, 3)]))
    items = []
    for index in range(draw(st.integers(1, most))):
        lower = draw(st.integers(0, longest - 1))
        items.append(
            Item(
                f"i{index}",
                lower,
                draw(st.integers(lower + 1, longest)),
                draw(st.integers(0, largest)),
                draw(st.sampled_from(alignments)),
            )
        )
    fixed = draw(st.integers(0, min(2, len(items))))
    for place in range(fixed):
        step = items[place].alignment
        offset = (place * 3 * largest + draw(st.integers(0, largest - 1))) // step * step
        items[place] = dataclasses.replace(items[place], offset=offset)
    return items


@given(item_lists(most=6, longest=6, largest=4))
@settings(max_examples=150)
def test_the_peak_of_tiny_problems_is_the_smallest_there_is(items: list[Item]) -> None:
    packing = pack(items, seconds=60.0, rounds=80)
    assert broken_rules(items, packing) == []
    assert packing.peak == smallest_peak(items)


@given(item_lists(most=40, longest=25, largest=30), st.integers(0, 6))
@settings(max_examples=60)
def test_no_two_items_overlap(items: list[Item], rounds: int) -> None:
    packing = pack(items, seconds=60.0, rounds=rounds)
    assert broken_rules(items, packing) == []
    assert live_sum(items) <= packing.bound <= packing.peak


def test_offsets_stay_exact_beyond_32_bits() -> None:
    large = 3 << 40
    items = [
        Item("weights", 0, 9, large + 1),
        Item("early", 0, 3, large),
        Item("late", 3, 9, large - 7),
        Item("short", 2, 4, 5),
    ]
    packing = pack(items, seconds=60.0, rounds=20)
    assert broken_rules(items, packing) == []
    assert packing.peak == 2 * large + 6


def test_items_without_bytes_take_none() -> None:
    items = [Item("a", 0, 4, 0), Item("b", 0, 4, 8, alignment=8), Item("c", 1, 2, 0, offset=3)]
    packing = pack(items)
    assert packing.peak == 8
    assert broken_rules(items, packing) == []
    assert pack([]).peak == 0


def test_an_equal_call_gives_equal_offsets() -> None:
    items = random_items(np.random.default_rng(5), 60)
    first, again, other = (pack(items, seconds=60.0, rounds=12, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert broken_rules(items, other) == []


def random_items(random: np.random.Generator, count: int) -> list[Item]:
    lower = random.integers(0, count, count)
    upper = lower + 1 + random.geometric(0.1, count)
    size = random.integers(1, 1000, count)
    return [
        Item(f"{index}", int(a), int(b), int(s) * 64)
        for index, (a, b, s) in enumerate(zip(lower, upper, size, strict=True))
    ]


def instance(name: str) -> list[Item]:
    with (INSTANCES / name).open() as file:
        return [
            Item(row["id"], int(row["lower"]), int(row["upper"]), int(row["size"]))
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize(
    ("name", "rounds"), [("input.12", 0), ("A.1048576", 60), ("E.1048576", 60)]
)
def test_instances_of_minimalloc_are_packed_at_their_capacity(name: str, rounds: int) -> None:
    items, capacity = instance(f"{name}.csv"), int(name.split(".")[1])
    packing = pack(items, capacity=capacity, seconds=60.0, rounds=rounds)
    assert broken_rules(items, packing) == []
    assert packing.peak <= capacity
    assert packing.bound == live_sum(items)


def training_step(layers: int, random: np.random.Generator) -> list[Item]:
    """What a training step makes: residuals read again in reverse order, gradients, workspaces."""
    items, end = [], 2 * layers
    for layer in range(layers):
        residual, gradient, workspace = (int(n) * 64 for n in random.integers(1, 20_000, 3))
        backward = end - layer - 1
        items += [
            Item(f"residual {layer}", layer, backward + 1, residual, 64),
            Item(f"gradient {layer}", backward, backward + 2, gradient, 64),
            Item(f"forward {layer}", layer, layer + 1, workspace, 64),
            Item(f"backward {layer}", backward, backward + 1, 2 * workspace, 64),
        ]
    return items


def ring(steps: int, random: np.random.Generator) -> list[Item]:
    """What streaming holds: pinned weights, and others fetched up to four steps ahead."""
    pinned = [Item(f"pinned {i}", 0, steps, 4096 * int(random.integers(1, 99))) for i in range(9)]
    sizes = random.choice([1 << 20, 3 << 20, 4 << 20], steps)
    return pinned + [
        Item(f"streamed {step}", max(0, step - int(random.integers(1, 5))), step + 1, int(size))
        for step, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [training_step, ring])
def test_plans_end_within_2_percent_of_the_bound(
    make: Callable[[int, np.random.Generator], list[Item]], seed: int
) -> None:
    items = make(40, np.random.default_rng(seed))
    packing = pack(items, seconds=60.0, rounds=20)
    assert broken_rules(items, packing) == []
    assert packing.peak <= 1.02 * packing.bound


def test_more_items_than_a_beam_search_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(np.random.default_rng(0), 80)
    monkeypatch.setattr(search, "_MOST_ITEMS", 40)
    first, later = (pack(items, seconds=60.0, rounds=rounds) for rounds in (0, 20))
    assert broken_rules(items, later) == []
    assert later.peak < first.peak


def test_time_that_is_up_ends_the_search() -> None:
    items = random_items(np.random.default_rng(4), 200)
    at_once = pack(items, seconds=0.0)
    assert at_once == pack(items, seconds=60.0, rounds=0)
    assert broken_rules(items, at_once) == []


def test_a_capacity_that_is_too_small_is_refused_with_one_that_is_not() -> None:
    items = [Item("a", 0, 2, 6), Item("b", 1, 3, 6), Item("c", 5, 6, 1)]
    with pytest.raises(DoesNotFitError, match=r"3 items take 12 B .* capacity is 11 B") as caught:
        pack(items, capacity=11, seconds=60.0, rounds=5)
    assert caught.value.smallest == {"capacity": 12}
    assert pack(items, capacity=12).peak == 12


BAD = {
    "backwards": ([Item("a", 2, 1, 5)], "item 'a' lives from 2 to 1; upper must be above"),
    "no time": ([Item("a", 2, 2, 5)], "item 'a' lives from 2 to 2"),
    "negative": ([Item("a", 0, 1, -5)], "item 'a' has -5 B"),
    "unaligned": ([Item("a", 0, 1, 5, alignment=0)], "item 'a' is aligned to 0"),
    "twice": ([Item("a", 0, 1, 5), Item("a", 1, 2, 5)], "item 'a' is there twice"),
    "fixed askew": ([Item("a", 0, 1, 5, 4, offset=6)], "fixed at offset 6; wanted a multiple of 4"),
    "fixed below 0": ([Item("a", 0, 1, 5, offset=-1)], "fixed at offset -1"),
    "too large": ([Item("a", 0, 1, 1 << 61)], "could reach 2,305,843,009,213,693,953 B; at most"),
    "fixed on another": (
        [Item("a", 0, 4, 5, offset=3), Item("b", 3, 9, 4, offset=0)],
        "items 'a' and 'b' are fixed at offsets 3 and 0, where they overlap",
    ),
}


@pytest.mark.parametrize(("items", "says"), BAD.values(), ids=BAD)
def test_items_that_cannot_be_are_refused(items: list[Item], says: str) -> None:
    with pytest.raises(ProgramError, match=says):
        pack(items)
