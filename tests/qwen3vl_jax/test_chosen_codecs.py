"""Codecs that are chosen for the machine that a model is to run on, from shapes alone."""

import functools
from pathlib import Path

import numpy as np
import pytest
import tiny

from memsched.codecs import parse_codec, relative_error
from memsched.codecs.choice import Candidate, Subject, choose
from memsched.cost import Roofline
from memsched.errors import DoesNotFitError
from memsched.machine import Machine
from memsched.profiles import load_machine
from qwen3vl_jax.checkpoints.encodings import HEAD, NOTHING_ENCODED, Encodings
from qwen3vl_jax.checkpoints.expectation import expected_subjects
from qwen3vl_jax.checkpoints.experts_alike import apart, together
from qwen3vl_jax.checkpoints.selection import level_of
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.planned.choosing import Chosen, candidates
from qwen3vl_jax.planned.forecast import Forecast, forecast
from qwen3vl_jax.planned.request import Request

ROOT = Path(__file__).parents[2]
FLOAT32 = np.dtype("float32")
REQUEST = Request(20, 7)


@functools.cache
def machine(device_bytes: int) -> Machine:
    found = load_machine(ROOT / "configs" / "machines" / "i5-10210u-sm61-nvme.toml")
    return found.with_capacities({"device": device_bytes})


def chosen(config: Config, device_bytes: int, level: str) -> list[Chosen]:
    """The fastest, and the smallest."""
    return list(
        candidates(
            config,
            machine(device_bytes),
            REQUEST,
            dtype=FLOAT32,
            cost=Roofline(),
            level=level_of(level),
        )
    )


def forecast_of(
    config: Config, device_bytes: int, encodings: Encodings = NOTHING_ENCODED
) -> Forecast:
    return forecast(config, machine(device_bytes), REQUEST, dtype=FLOAT32, encodings=encodings)


def token_s(found: Forecast) -> float:
    return found.summaries["decode"].seconds


def test_expected_errors_are_those_of_large_normal_matrices() -> None:
    config, level = load_config(tiny.DATA / "dense"), level_of("balanced")
    subjects = {one.name: one for one in expected_subjects(config, FLOAT32, level)}
    subject = subjects["language_model.layers.0.mlp.down_proj.weight"]
    width = config.text.intermediate_size
    numbers = np.random.default_rng(5).standard_normal((4000, width), np.float32)
    assert {one.codec for one in subject.candidates} >= {"int8", "int4:32"}
    for one in subject.candidates:
        wanted = relative_error(numbers, parse_codec(one.codec))
        assert one.error == pytest.approx(wanted, rel=0.03)
        shape = (config.text.hidden_size, width)
        assert one.nbytes == parse_codec(one.codec).nbytes(shape, "float32")


@pytest.mark.parametrize(
    ("name", "device_bytes", "level"),
    [
        ("dense_tied", 1_500_000, "balanced"),
        ("dense_tied", 1 << 30, "aggressive"),
        ("moe_mixed", 1_500_000, "aggressive"),
    ],
)
def test_what_is_chosen_is_faster_than_raw_and_no_slower_than_the_smallest(
    name: str, device_bytes: int, level: str
) -> None:
    config = load_config(tiny.DATA / name)
    raw_s = token_s(forecast_of(config, device_bytes))
    best, smallest = chosen(config, device_bytes, level)
    assert 0 < best.predicted_error <= level_of(level).error_budget
    best_s = token_s(forecast_of(best.config, device_bytes, best.encodings))
    smallest_s = token_s(forecast_of(smallest.config, device_bytes, smallest.encodings))
    assert best_s < raw_s
    assert best_s <= smallest_s * 1.02  # the bound decides, and what is alike by a thousandth


def test_a_tied_head_that_is_encoded_is_an_array_of_its_own() -> None:
    config = load_config(tiny.DATA / "dense_tied")
    for one in chosen(config, 1_500_000, "aggressive"):
        assert one.config.tie_word_embeddings == (HEAD not in one.encodings)
    raw, *_ = chosen(config, 1_500_000, "minimal")
    assert raw.config == config
    assert not raw.encodings


def test_what_does_not_fit_raw_may_fit_encoded() -> None:
    config = load_config(tiny.DATA / "dense")
    with pytest.raises(DoesNotFitError) as refused:
        forecast_of(config, 9_000)
    least = refused.value.smallest["device"]
    best = chosen(config, least - 1_000, "aggressive")[0]
    with pytest.raises(DoesNotFitError):
        forecast_of(config, least - 1_000)
    forecast_of(best.config, least - 1_000, best.encodings)


def test_the_experts_of_a_layer_get_one_codec_and_keep_their_own_errors() -> None:
    own = Candidate("int8", 100, 0.03), Candidate("int8", 100, 0.04)
    subjects = [
        Subject(f"layers.{layer}.mlp.experts.{expert}.down_proj", 200, 0.5, (own[expert],))
        for layer in range(2)
        for expert in range(2)
    ]
    groups = together([*subjects, Subject("layers.0.self_attn.q_proj.weight", 50, 1.0, ())])
    assert [len(group.members) for group in groups] == [2, 2, 1]
    joined = groups[0].subject
    assert (joined.nbytes, joined.candidates[0].nbytes) == (400, 200)
    # 0.5 * 0.03 and 0.5 * 0.04 add up as squares to 0.025: room for one layer, not for two.
    whole = [group.subject for group in groups]
    found = apart(choose(whole, error_budget=0.026, smallest_saving=0.1), groups)
    assert found.predicted_error == pytest.approx(0.025)
    codecs = {one.name: (one.codec, one.nbytes, one.error) for one in found.arrays}
    assert codecs == {
        subjects[0].name: ("int8", 100, 0.03),
        subjects[1].name: ("int8", 100, 0.04),
        subjects[2].name: ("raw", 200, 0.0),
        subjects[3].name: ("raw", 200, 0.0),
        "layers.0.self_attn.q_proj.weight": ("raw", 50, 0.0),
    }
