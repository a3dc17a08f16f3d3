"""What granularity is chosen: whole layers where all fits, steps of equal size elsewhere."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import tiny

from memsched.cost import Roofline
from memsched.machine import Machine
from memsched.passes.compile import compile_phases
from memsched.profiles import load_machine
from memsched.report import summarize
from qwen3vl_jax import weights
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.layer_steps import WHOLE_LAYERS, Granularity
from qwen3vl_jax.planned.granularity import (
    WORKING_BYTES,
    choose_granularity,
    finest,
    vocab_blocks,
    vocab_rows,
)
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.works import traced_request

ROOT = Path(__file__).parents[2]
FLOAT32, BFLOAT16 = np.dtype("float32"), np.dtype("bfloat16")
OFFICIAL = sorted((ROOT / "configs" / "models").glob("*.json"))
MACHINES = ("i5-10210u-sm61-nvme", "laptop-cpu")
DENSE = Granularity(split_dense=True)


def official(name: str) -> Config:
    return load_config(ROOT / "configs" / "models" / f"qwen3-vl-{name}.json")


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: path.stem)
def test_layers_are_whole_exactly_where_what_a_token_reads_fits(path: Path) -> None:
    config = load_config(path)
    sizes = {entry.path: 2 * math.prod(entry.shape) for entry in weights.table(config)}
    unread = {name for name in sizes if name.startswith("visual.")}
    if not config.tie_word_embeddings:
        unread |= {name for name in sizes if ".embed_tokens." in name}
    enough = sum(sizes[name] for name in sizes.keys() - unread) + WORKING_BYTES
    assert choose_granularity(config, BFLOAT16, enough) == WHOLE_LAYERS
    assert choose_granularity(config, BFLOAT16, enough - 1) == finest(config)
    assert finest(config) != WHOLE_LAYERS


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("2b-instruct", DENSE),
        ("32b-instruct", DENSE),
        # Attention has 37.8 MB, an expert 9.4: four are as much.
        ("30b-a3b-instruct", Granularity(experts_per_step=4)),
        # 142.6 and 37.7 MB: four are as much, but 94 layers would have 3,008 such steps.
        ("235b-a22b-instruct", Granularity(experts_per_step=8)),
    ],
)
def test_experts_come_in_groups_as_large_as_attention(name: str, wanted: Granularity) -> None:
    assert finest(official(name)) == wanted


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: path.stem)
def test_a_block_of_the_vocabulary_is_no_larger_than_a_step_of_a_layer(path: Path) -> None:
    config = load_config(path)
    text, rows = config.text, vocab_rows(config, BFLOAT16)
    attention = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    together = finest(config).experts_per_step or 0
    widest = max(attention, 3 * together * text.moe_intermediate_size, text.intermediate_size)
    assert rows <= widest
    blocks = -(-text.vocab_size // rows)
    assert 8 <= blocks <= 26
    # A store's chunk has 4 MiB at most: blocks are made of whole ones.
    chunks = math.ceil(text.vocab_size / (2**22 // (2 * text.hidden_size)))
    assert rows % math.ceil(text.vocab_size / chunks) == 0


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: path.stem)
def test_some_blocks_are_as_small_as_keys_where_nearly_all_fits(path: Path) -> None:
    config = load_config(path)
    text, rows = config.text, vocab_rows(config, BFLOAT16)
    keys = text.num_key_value_heads * text.head_dim
    all_keys_bytes = 2 * 2 * text.num_hidden_layers * keys * text.hidden_size
    entries = [one for one in weights.arrays(config) if not one.path.startswith("visual.")]
    if not config.tie_word_embeddings:
        entries = [one for one in entries if "embed_tokens" not in one.path]
    read_bytes = 2 * sum(math.prod(one.shape) for one in entries)
    for device_bytes in (read_bytes // 2, read_bytes - all_keys_bytes - 1, 2 * read_bytes):
        assert vocab_blocks(config, BFLOAT16, device_bytes) == rows
    for device_bytes in (read_bytes - all_keys_bytes, read_bytes):
        found = vocab_blocks(config, BFLOAT16, device_bytes)
        assert isinstance(found, tuple)
        assert sum(found) == text.vocab_size
        chunk = math.gcd(*found[:-1])  # one of the store's, or several
        assert 2 * chunk * text.hidden_size > 2**21
        small = [size for size in found[:-1] if size < rows]
        assert 4 <= len(small) <= len(found) - found.count(rows)
        assert all(abs(size - keys) <= chunk for size in small)


def scaled(name: str) -> Machine:
    """A machine for models a thousand times smaller than the official ones: so are latencies."""
    found = load_machine(ROOT / "configs" / "machines" / f"{name}.toml")
    links = [dataclasses.replace(link, latency_s=link.latency_s / 1000) for link in found.links]
    compute = dataclasses.replace(found.compute, latency_s=found.compute.latency_s / 1000)
    return dataclasses.replace(found, links=tuple(links), compute=compute)


@functools.cache
def decode_seconds(name: str, machine: str, share: float, granularity: Granularity) -> float:
    """Predicted seconds of a token with so much of what everything takes."""
    config = load_config(tiny.DATA / name)
    one = traced_request(config, Request(20, 7), FLOAT32)(granularity, vocab_rows(config, FLOAT32))[
        "decode"
    ]
    program = one.program
    nbytes = sum(spec.nbytes for spec in program.arrays.values() if spec.kind == "weight")
    others = max(step.workspace_bytes for step in program.steps) + sum(
        spec.nbytes for spec in program.arrays.values() if spec.kind != "weight"
    )
    here = scaled(machine).with_capacities({"device": int(nbytes * share + others)})
    plan = compile_phases({"decode": program}, here, Roofline())["decode"]
    return summarize(plan, program, here, Roofline(), {}).seconds


@pytest.mark.parametrize("share", [0.4, 0.7])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["dense_tied", "moe", "moe_mixed"])
def test_the_choice_loses_little_against_other_granularities(
    name: str, machine: str, share: float
) -> None:
    config = load_config(tiny.DATA / name)
    chosen = decode_seconds(name, machine, share, choose_granularity(config, FLOAT32, 1_000_000))
    others = [WHOLE_LAYERS, *(Granularity(True, experts) for experts in (1, 2, 4))]
    best = min(decode_seconds(name, machine, share, other) for other in others)
    assert chosen <= 1.1 * best  # of three layers every step is a large part
    assert decode_seconds(name, machine, share, WHOLE_LAYERS) >= 1.1 * chosen
