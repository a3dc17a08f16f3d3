"""Gaps to the bound of decoding that were closed, so that they stay closed."""

from pathlib import Path

import pytest

from memsched.cost import Roofline
from memsched.profiles import load_machine
from qwen3vl_jax.config import load_config
from qwen3vl_jax.parameters import named_dtype
from qwen3vl_jax.planned.gaps import decode_gap
from qwen3vl_jax.planned.request import Request

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("machine", "model", "most"),
    [
        ("i5-10210u-sm61-nvme", "2b", 0.03),
        ("i5-10210u-sm61-nvme", "8b", 0.03),
        ("laptop-cpu", "8b", 0.03),
        # What passes while the head is computed are small blocks of it (`vocab_blocks`).
        ("tpu-v5e-host", "8b", 0.03),
        ("h200", "8b", 1e-6),
    ],
)
def test_decoding_is_as_near_to_its_bound_as_it_was(machine: str, model: str, most: float) -> None:
    config = load_config(CONFIGS / "models" / f"qwen3-vl-{model}-instruct.json")
    here = load_machine(CONFIGS / "machines" / f"{machine}.toml")
    request = Request(512, 128, ((448, 448),))
    gap = decode_gap(config, request, named_dtype(config.dtype), here, Roofline())
    assert gap is not None
    assert -1e-6 < gap.share < most


def test_what_does_not_fit_has_no_gap() -> None:
    config = load_config(CONFIGS / "models" / "qwen3-vl-2b-instruct.json")
    here = load_machine(CONFIGS / "machines" / "laptop-cpu.toml")
    small = here.with_capacities({"device": 20_000_000})
    assert decode_gap(config, Request(8, 8), named_dtype(config.dtype), small, Roofline()) is None
