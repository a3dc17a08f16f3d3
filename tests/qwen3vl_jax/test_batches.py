"""The batch that is chosen, against every other one; what binds, and how it is told."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny

from memsched.errors import DoesNotFitError
from memsched.profiles import load_machine
from memsched.report.rendering import plain
from qwen3vl_jax.config import load_config
from qwen3vl_jax.planned.batches import MOST_ROWS, Batches, batches_view, choose_batch
from qwen3vl_jax.planned.best_batch import dry_run_best_batch
from qwen3vl_jax.planned.forecast import forecast
from qwen3vl_jax.planned.loading import Budgets
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.sweep import Point

MACHINES = Path(__file__).parents[2] / "configs" / "machines"
CONFIG = load_config(tiny.DATA / "dense")
FLOAT32 = np.dtype("float32")
REQUEST = Request(20, 7)


def one_by_one(machine: str, device_bytes: int, most: int) -> dict[int, float]:
    """Predicted tokens/s of all batches that fit."""
    here = load_machine(MACHINES / f"{machine}.toml").with_capacities({"device": device_bytes})
    rates = {}
    for rows in range(1, most + 1):
        asked = dataclasses.replace(REQUEST, batch=rows)
        try:
            found = forecast(CONFIG, here, asked, dtype=FLOAT32)
        except DoesNotFitError:
            continue
        rates[rows] = rows / found.summaries["decode"].seconds
    return rates


@pytest.mark.parametrize(
    ("machine", "device_bytes", "binds"),
    [
        ("i5-10210u-sm61-nvme", 800_000, "memory"),  # what fits just fits
        ("laptop-cpu", 1_500_000, "memory"),  # caches take the room of weights
        ("tpu-v5e-host", 1_500_000, "memory"),
    ],
)
def test_no_other_batch_of_a_tiny_model_has_more_tokens(
    machine: str, device_bytes: int, binds: str
) -> None:
    budgets = Budgets(machine=MACHINES / f"{machine}.toml", device_memory=device_bytes)
    found = dry_run_best_batch(CONFIG, REQUEST, budgets, dtype="float32").batches
    assert found is not None
    rates = one_by_one(machine, device_bytes, 16)
    assert max(rates) < 16  # larger ones do not fit
    assert found.chosen.value == max(rates, key=lambda rows: rates[rows])
    assert found.binds == binds
    for point in found.points:
        assert point.fits == (point.value in rates)
        if point.fits:
            assert point.tokens_per_s == pytest.approx(rates[point.value])


def test_batches_whose_arrays_no_tier_takes_are_not_chosen(tmp_path: Path) -> None:
    text = (MACHINES / "i5-10210u-sm61-nvme.toml").read_text()
    limit = 'max_array_bytes = "512MiB"'
    assert text.count(limit) == 1
    (tmp_path / "small.toml").write_text(text.replace(limit, "max_array_bytes = 200_000"))
    budgets = Budgets(machine=tmp_path / "small.toml")
    run = dry_run_best_batch(CONFIG, REQUEST, budgets, dtype="float32")
    found = run.batches
    assert found is not None
    refused = [point for point in found.points if not point.fits]
    assert all("lower the batch" in point.refused for point in refused)
    # Keys of one row: 2 heads, 64 slots of 32 numbers of 4 B.
    assert found.chosen.value == 200_000 // (2 * 64 * 32 * 4)
    assert refused[0].value == found.chosen.value + 1


def point(rows: int, rate: float | None, lane: str = "compute", arriving: int = 0) -> Point:
    return Point(rows, rate, 1.0, lane, 10**6, 0, arriving, refused="" if rate else "too little")


def chosen(rates: dict[int, Point]) -> Batches:
    """The choice among batches of which only those with a point fit."""
    found = choose_batch(lambda rows: rates.get(rows, point(rows, None)))
    assert found is not None
    return found


@pytest.mark.parametrize("best", [1, 2, 3, 5, 11, 16, 23, 100, 1000])
def test_a_peak_is_found_wherever_it_is(best: int) -> None:
    curve = {
        rows: point(rows, float(min(rows, best**2 / rows))) for rows in range(1, MOST_ROWS + 1)
    }
    found = chosen(curve)
    assert abs(found.chosen.value - best) <= best / 16
    assert len(found.points) <= 30


@pytest.mark.parametrize("most", [1, 2, 7, 33, 1000])
def test_the_largest_that_fits_is_found_nearly(most: int) -> None:
    found = chosen({rows: point(rows, float(rows)) for rows in range(1, most + 1)})
    assert most - most / 16 <= found.chosen.value <= most
    assert found.binds == "memory"
    assert found.why.endswith("does not fit")


def test_it_says_what_binds() -> None:
    full = {rows: point(rows, float(min(rows, 6))) for rows in range(1, 200)}
    assert (chosen(full).chosen.value, chosen(full).binds) == (6, "compute")
    assert "its limit is compute" in chosen(full).why
    crowded = {1: point(1, 3.0), 2: point(2, 2.0, "nvme->device", 7000)}
    assert chosen(crowded).binds == "memory"
    assert chosen(crowded).why == "beside caches of 2 a pass brings 7,000 B, not 0 B"
    free = chosen({rows: point(rows, float(rows)) for rows in range(1, MOST_ROWS + 1)})
    assert (free.chosen.value, free.binds) == (MOST_ROWS, "compute")
    assert "not tried" in free.why


def test_of_equally_fast_batches_the_smallest_is_taken() -> None:
    assert chosen({rows: point(rows, 5.0) for rows in range(1, 9)}).chosen.value == 1


def test_where_not_one_row_fits_there_is_no_batch() -> None:
    assert choose_batch(lambda rows: point(rows, None)) is None


def test_the_table_has_a_row_for_every_batch() -> None:
    text = plain(batches_view(chosen({1: point(1, 50.0), 2: point(2, 2000.0)}))).splitlines()
    assert text[:2] == ["the best batch is 2, memory binds", "  a batch of 3 does not fit"]
    rows = [line.split() for line in text[4:] if line]
    assert [row[:2] for row in rows] == [["1", "50"], ["2", "2,000"], ["3", "-"], ["4", "-"]]
    assert rows[1][2:4] == ["1", "ms"]  # two rows, 2,000 tokens/s together
