"""A mixture of experts without a capacity: each token's rows go through its chosen experts only.

Every expert is a named pair of arrays of its own, so that it can rest and move alone.
Letters: R rows (tokens of the whole batch), E experts, C choices of a row, H hidden, F expert
width.

Source: transformers 5.23, `modeling_qwen3_vl_moe.py`, class Qwen3VLMoeTextSparseMoeBlock.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.layers import Linear
from qwen3vl_jax.linear import linear

SMALLEST_GROUP, LARGEST_GROUP = 4, 64  # rows of one product; up to 8 cost as much as one


class Expert(nnx.Module):
    """One gated MLP; gate is the first half of `gate_up_proj` [2F, H], `down_proj` is [H, F]."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        size, wide = config.hidden_size, config.moe_intermediate_size
        gate_up = jax.random.normal(rngs.params(), (2 * wide, size), jnp.float32) * size**-0.5
        down = jax.random.normal(rngs.params(), (size, wide), jnp.float32) * wide**-0.5
        self.gate_up_proj = nnx.Param(gate_up.astype(dtype))
        self.down_proj = nnx.Param(down.astype(dtype))

    def __call__(self, x: Float[Array, "R H"]) -> Float[Array, "R H"]:
        gate, up = jnp.split(linear(x, self.gate_up_proj[...]), 2, axis=-1)
        return linear(jax.nn.silu(gate) * up, self.down_proj[...])


class SparseMLP(nnx.Module):
    """Router and experts of one layer."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.gate = Linear(
            config.hidden_size, config.num_experts, bias=False, dtype=dtype, rngs=rngs
        )
        self.experts = nnx.List(
            [Expert(config, dtype=dtype, rngs=rngs) for _ in range(config.num_experts)]
        )
        self.choices = config.num_experts_per_tok

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        rows = x.reshape(-1, x.shape[-1])
        shares, chosen = route(self.gate(rows), self.choices)
        return run_experts(self.experts, rows, shares, chosen).reshape(x.shape)


def route(
    scores: Float[Array, "R E"], choices: int
) -> tuple[Float[Array, "R C"], Int[Array, "R C"]]:
    """The experts of every row and their shares, which sum to one; of equals the first wins."""
    chances = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    best, chosen = jax.lax.top_k(chances, choices)
    return (best / best.sum(axis=-1, keepdims=True)).astype(scores.dtype), chosen


def group_rows(count: int, choices: int, experts: int) -> int:
    """Rows that an expert takes at once: what it gets on average, as a power of two."""
    average = -(-count * choices // experts)
    return min(count, max(SMALLEST_GROUP, min(1 << (average - 1).bit_length(), LARGEST_GROUP)))


def run_experts(
    experts: Sequence[Expert],
    rows: Float[Array, "R H"],
    shares: Float[Array, "R C"],
    chosen: Int[Array, "R C"],
) -> Float[Array, "R H"]:
    """Sum of each row's chosen experts times their shares.

    Assignments are sorted by expert and cut into groups of one expert; one loop takes a group at a
    time, so experts that nobody chose cost nothing:
        chosen [[2, 0], [2, 1]]  ->  expert 0: row 0 | expert 1: row 1 | expert 2: rows 0, 1
    """
    count, choices = chosen.shape
    size = group_rows(count, choices, len(experts))
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    # `size` more entries than assignments, so that the last group may read past the end.
    row_of = jnp.pad(order // choices, (0, size)).astype(jnp.int32)
    share_of = jnp.pad(shares.reshape(-1)[order], (0, size))
    counts = jnp.bincount(chosen.reshape(-1), length=len(experts)).astype(jnp.int32)
    ends = jnp.cumsum(counts)
    groups_until = jnp.cumsum((counts + (size - 1)) // size)

    def add_group(group: Array, total: Float[Array, "R H"]) -> Float[Array, "R H"]:
        index = jnp.searchsorted(groups_until, group, side="right").astype(jnp.int32)
        of_expert = (counts[index] + (size - 1)) // size
        nth = group - (groups_until[index] - of_expert)
        at = ends[index] - counts[index] + nth * size
        where = jax.lax.dynamic_slice(row_of, (at,), (size,))
        share = jax.lax.dynamic_slice(share_of, (at,), (size,))
        share = jnp.where(at + jnp.arange(size) < ends[index], share, jnp.zeros_like(share))
        part = jax.lax.switch(index, experts, rows[where])
        return total.at[where].add(part * share[:, None])

    return jax.lax.fori_loop(0, groups_until[-1], add_group, jnp.zeros_like(rows))
