"""qwen3vl_jax.planned.rehearsals: what is measured is what requests are made of."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import pytest

from memsched.program import Program
from qwen3vl_jax.layer_steps import WHOLE_LAYERS
from qwen3vl_jax.planned.granularity import finest, vocab_rows
from qwen3vl_jax.planned.rehearsals import (
    CALIBRATION,
    EVALUATION,
    Rehearsal,
    Shape,
    config_of,
    traced,
)
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.works import traced_request

DENSE = Shape(256, 256, 8, 8, 2, 2048, tower=128, depth=3)
SPARSE = dataclasses.replace(DENSE, experts=16)
BFLOAT16 = np.dtype("bfloat16")
REQUESTS = {
    "a picture": Request(40, 8, ((96, 64),)),
    "a batch": Request(40, 8, batch=3),
    "codes in the cache": Request(40, 8, kv="int8"),
    "a cache in blocks": Request(1400, 8, block_slots=512),
    "codes in blocks": Request(1400, 8, block_slots=512, kv="int8"),
}


def kernels(programs: Iterable[Program]) -> set[str]:
    """What is learned apart: the names of functions that are steps."""
    return {step.kernel.partition("#")[0] for made in programs for step in made.steps}


@pytest.fixture(scope="module")
def rehearsed() -> set[str]:
    """Of the same phases of smaller models."""
    small = {
        dataclasses.replace(
            one, shape=SPARSE if one.shape.experts else DENSE, share=1.0, context=2048, tokens=16
        )
        for one in CALIBRATION
        if one.codec == "raw"
    }
    return kernels(traced(one).program for one in small)


@pytest.mark.parametrize("shape", [DENSE, SPARSE], ids=["dense", "mixture of experts"])
@pytest.mark.parametrize("split", [False, True], ids=["whole layers", "the finest steps"])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_every_kernel_of_a_request_is_measured(
    rehearsed: set[str], request_name: str, shape: Shape, split: bool
) -> None:
    config = config_of(shape)
    granularity = finest(config) if split else WHOLE_LAYERS
    tracer = traced_request(config, REQUESTS[request_name], BFLOAT16)
    found = tracer(granularity, vocab_rows(config, BFLOAT16))
    assert kernels(one.program for one in found.values()) <= rehearsed


def test_what_is_tested_has_shapes_that_nothing_is_fitted_to() -> None:
    fitted = {(one.shape.hidden, one.shape.inner) for one in CALIBRATION}
    assert fitted.isdisjoint((one.shape.hidden, one.shape.inner) for one in EVALUATION)
    assert {one.shape.name for one in CALIBRATION}.isdisjoint(one.shape.name for one in EVALUATION)


def test_no_two_rehearsals_have_one_name() -> None:
    names = [one.name for one in (*CALIBRATION, *EVALUATION)]
    assert len(set(names)) == len(names)


def test_full_blocks_of_a_cache_are_read_as_weights_are() -> None:
    program = traced(Rehearsal(DENSE, "decode", 2048, in_blocks=True, split=True)).program
    blocks = [name for name in program.of_kind("weight") if name.startswith("blocks.")]
    assert len(blocks) == DENSE.layers
