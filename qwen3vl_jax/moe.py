"""A mixture of experts without a capacity: each token's rows go through its chosen experts only.

Every expert is a named pair of arrays of its own, so that it can rest and move alone.
Letters: R rows (tokens of the whole batch), E experts, C choices of a row, H hidden, F expert
width.

Source: transformers 5.23, `modeling_qwen3_vl_moe.py`, class Qwen3VLMoeTextSparseMoeBlock.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from qwen3vl_jax.arrays import AnyArray, Leaf
from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.layers import Linear, cut, normal
from qwen3vl_jax.linear import linear

SMALLEST_GROUP, LARGEST_GROUP = 4, 64  # rows of one product; up to 8 cost as much as one


class Expert(nnx.Module):
    """One gated MLP; gate is the first half of `gate_up_proj` [2F, H], `down_proj` is [H, F]."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        size, wide = config.hidden_size, config.moe_intermediate_size
        gate_up = normal(rngs, 2 * wide, size) * size**-0.5
        down = normal(rngs, size, wide) * wide**-0.5
        self.gate_up_proj = nnx.Param(gate_up.astype(dtype))
        self.down_proj = nnx.Param(down.astype(dtype))

    def __call__(self, x: Float[Array, "R H"]) -> Float[Array, "R H"]:
        gate, up = jnp.split(linear(x, self.gate_up_proj.get_value()), 2, axis=-1)
        return linear(jax.nn.silu(gate) * up, self.down_proj.get_value())


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "row_of", "share_of", "counts"],
    meta_fields=["group"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Routing:
    """Hidden values, and through which experts they go.

    Assignments of a row to an expert are sorted by expert, then by row: `row_of` and `share_of`
    tell them one by one, `counts` how many each expert has. An expert takes `group` at a time.
    """

    rows: Float[Leaf, "R H"]
    row_of: Int[Leaf, " assignments"]
    share_of: Float[Leaf, " assignments"]
    counts: Int[Leaf, " E"]
    group: int


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
        routing = cut(route(self.gate, x, self.choices))
        total = add_experts(self.experts, jnp.int32(0), routing, jnp.zeros_like(routing.rows))
        return cut(total).reshape(x.shape)


def route(gate: Linear, x: Float[Array, "B T H"], choices: int) -> Routing:
    """Chooses the experts of every row."""
    rows = cut(x.reshape(-1, x.shape[-1]))
    return assign(rows, *choose(gate(rows), choices), gate.weight.shape[0])


def choose(
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


def expected_groups(routing: Routing, some: int) -> float:
    """About how many groups go through so many of the experts, all being chosen alike.

    The last group of an expert is half full. At least one: beside reads, steps whose experts
    nobody chose take 0.28 ms where others take 0.4.
    """
    assignments, experts = routing.row_of.shape[0] - routing.group, routing.counts.shape[0]
    groups = min(assignments, assignments / routing.group + experts / 2)
    return max(1.0, some / experts * groups)


def assign(
    rows: Float[Array, "R H"],
    shares: Float[Array, "R C"],
    chosen: Int[Array, "R C"],
    experts: int,
) -> Routing:
    """Sorts assignments by expert:

    chosen [[2, 0], [2, 1]]  ->  expert 0: row 0 | expert 1: row 1 | expert 2: rows 0, 1
    """
    count, choices = chosen.shape
    group = group_rows(count, choices, experts)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    # `group` more entries than assignments, so that the last group may read past the end.
    return Routing(
        rows,
        jnp.pad(order // choices, (0, group)).astype(jnp.int32),
        jnp.pad(shares.reshape(-1)[order], (0, group)),
        jnp.bincount(chosen.reshape(-1), length=experts).astype(jnp.int32),
        group,
    )


def add_experts(
    experts: Sequence[Expert],
    first: Int[AnyArray, ""],
    routing: Routing,
    total: Float[Array, "R H"],
) -> Float[Array, "R H"]:
    """Adds to each row what those of its chosen experts say that are here, times their shares.

    One loop takes a group of an expert's rows at a time, so experts that nobody chose cost nothing.
    A row's experts are added in the order of their numbers, in the dtype of the rows: taking all
    experts at once or some after others, in their order, gives the same bits.

    Args:
        experts: those numbered `first` and following.
    """
    size, counts = routing.group, routing.counts
    groups = (counts + (size - 1)) // size
    ends, groups_until = jnp.cumsum(counts), jnp.cumsum(groups)
    last = first + (len(experts) - 1)

    def add_group(group: Array, total: Float[Array, "R H"]) -> Float[Array, "R H"]:
        index = jnp.searchsorted(groups_until, group, side="right").astype(jnp.int32)
        nth = group - (groups_until[index] - groups[index])
        at = ends[index] - counts[index] + nth * size
        where = jax.lax.dynamic_slice(routing.row_of, (at,), (size,))
        share = jax.lax.dynamic_slice(routing.share_of, (at,), (size,))
        share = jnp.where(at + jnp.arange(size) < ends[index], share, jnp.zeros_like(share))
        part = cut(jax.lax.switch(index - first, experts, cut(routing.rows[where])))
        return total.at[where].add(part * share[:, None])

    # No shape says how often it runs: this name tells whoever reads the jaxpr.
    with jax.named_scope(f"repeats={expected_groups(routing, len(experts)):.4f}"):
        return jax.lax.fori_loop(
            groups_until[first] - groups[first], groups_until[last], add_group, total
        )
