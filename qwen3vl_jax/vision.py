"""The vision tower: frames of patches in, one token per 2x2 patches and the DeepStack features out.

A frame is the unit: neither pictures nor the frames of a video see each other. Every function here
that is jitted is one step. Letters: F frames of one size, P patches of a frame (padded to a
bucket), D hidden values.

Source: transformers 5.23, `modeling_qwen3_vl.py`, classes Qwen3VLVision*.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.attention import attention
from qwen3vl_jax.config import VisionConfig
from qwen3vl_jax.frames import Piece
from qwen3vl_jax.layers import LayerNorm, Linear, normal
from qwen3vl_jax.rope import rotate, vision_rotation


class PatchEmbedding(nnx.Module):
    """Pixels of a patch to its hidden values: a convolution whose stride is its kernel."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        side, time = config.patch_size, config.temporal_patch_size
        shape = (config.hidden_size, config.in_channels, time, side, side)
        self.proj = Linear(
            config.patch_values, config.hidden_size, bias=True, dtype=dtype, rngs=rngs
        )
        self.proj.weight = nnx.Param(self.proj.weight[...].reshape(shape))

    def __call__(self, patches: Float[AnyArray, "F P values"]) -> Float[Array, "F P D"]:
        weight = self.proj.weight[...]
        return self.proj(jnp.asarray(patches, weight.dtype))


class PositionTable(nnx.Module):
    """A square of learned positions, read between its points."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        draw = normal(rngs, config.num_position_embeddings, config.hidden_size)
        self.weight = nnx.Param((draw * 0.02).astype(dtype))

    def __call__(
        self, taps: Int[AnyArray, "P 4"], shares: Float[AnyArray, "P 4"]
    ) -> Float[Array, "P D"]:
        """The sum of four table rows, each times its share; float32."""
        return (self.weight[...][taps].astype(jnp.float32) * shares[:, :, None]).sum(axis=1)


class VisionAttention(nnx.Module):
    """Attention of all patches of a frame to all patches of the same frame."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.qkv = Linear(size, 3 * size, bias=True, dtype=dtype, rngs=rngs)
        self.proj = Linear(size, size, bias=True, dtype=dtype, rngs=rngs)
        self.heads = config.num_heads

    def __call__(
        self,
        x: Float[Array, "F P D"],
        cos: Float[Array, "P head_dim"],
        sin: Float[Array, "P head_dim"],
        valid: Bool[AnyArray, " P"],
    ) -> Float[Array, "F P D"]:
        frames, count, size = x.shape
        split = self.qkv(x).reshape(frames, count, 3, self.heads, size // self.heads)
        queries, keys, values = split.transpose(2, 0, 3, 1, 4)
        cos, sin = cos[None, None], sin[None, None]
        queries = rotate(queries.astype(jnp.float32), cos, sin).astype(x.dtype)
        keys = rotate(keys.astype(jnp.float32), cos, sin).astype(x.dtype)
        everything = jnp.full(count, count - 1, jnp.int32)
        allowed = jnp.broadcast_to(valid[None], (frames, count))
        rows = (-1, count, size // self.heads)
        mixed = attention(queries, keys.reshape(rows), values.reshape(rows), everything, allowed)
        return self.proj(mixed.transpose(0, 2, 1, 3).reshape(frames, count, size))


class VisionMLP(nnx.Module):
    """Two products around the tanh form of GELU."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        size, wide = config.hidden_size, config.intermediate_size
        self.linear_fc1 = Linear(size, wide, bias=True, dtype=dtype, rngs=rngs)
        self.linear_fc2 = Linear(wide, size, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "F P D"]) -> Float[Array, "F P D"]:
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=True))


class VisionBlock(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(config.hidden_size, dtype=dtype)
        self.norm2 = LayerNorm(config.hidden_size, dtype=dtype)
        self.attn = VisionAttention(config, dtype=dtype, rngs=rngs)
        self.mlp = VisionMLP(config, dtype=dtype, rngs=rngs)


class Merger(nnx.Module):
    """Joins the patches of a 2x2 square into one token of the decoder.

    Patches come in merge-block order, so a square is four consecutive rows. The main merger
    normalises patches before joining, the DeepStack mergers after. GELU is the exact one here.
    """

    def __init__(
        self, config: VisionConfig, *, norm_joined: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        joined = config.hidden_size * config.merged_patches
        self.norm = LayerNorm(joined if norm_joined else config.hidden_size, dtype=dtype)
        self.linear_fc1 = Linear(joined, joined, bias=True, dtype=dtype, rngs=rngs)
        self.linear_fc2 = Linear(joined, config.out_hidden_size, bias=True, dtype=dtype, rngs=rngs)
        self.norm_joined = norm_joined
        self.joined = joined

    def __call__(self, x: Float[Array, "F P D"]) -> Float[Array, "F tokens H"]:
        frames = x.shape[0]
        if self.norm_joined:
            x = self.norm(x.reshape(frames, -1, self.joined))
        else:
            x = self.norm(x).reshape(frames, -1, self.joined)
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """All weights under `visual.`"""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        make = functools.partial(Merger, config, dtype=dtype, rngs=rngs)
        self.patch_embed = PatchEmbedding(config, dtype=dtype, rngs=rngs)
        self.pos_embed = PositionTable(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [VisionBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)]
        )
        self.merger = make(norm_joined=False)
        self.deepstack_merger_list = nnx.List(
            [make(norm_joined=True) for _ in config.deepstack_visual_indexes]
        )


@jax.jit
def embed_patches(
    embedding: PatchEmbedding,
    table: PositionTable,
    patches: Float[AnyArray, "F P values"],
    taps: Int[AnyArray, "P 4"],
    shares: Float[AnyArray, "P 4"],
) -> Float[Array, "F P D"]:
    """Step: hidden values of every patch with its learned position added."""
    x = embedding(patches)
    return x + table(taps, shares).astype(x.dtype)[None]


@functools.partial(jax.jit, static_argnames=("theta", "head_dim"))
def vision_angles(
    rows_columns: Int[AnyArray, "P 2"], *, theta: float, head_dim: int
) -> tuple[Float[Array, "P head_dim"], Float[Array, "P head_dim"]]:
    """Step: cos and sin of every patch, float32."""
    return vision_rotation(rows_columns, theta, head_dim)


@functools.partial(jax.jit, donate_argnames="x")
def vision_block(
    block: VisionBlock,
    x: Float[Array, "F P D"],
    cos: Float[Array, "P head_dim"],
    sin: Float[Array, "P head_dim"],
    valid: Bool[AnyArray, " P"],
) -> Float[Array, "F P D"]:
    """Step: one block."""
    x = x + block.attn(block.norm1(x), cos, sin, valid)
    return x + block.mlp(block.norm2(x))


@jax.jit
def merge_patches(merger: Merger, x: Float[Array, "F P D"]) -> Float[Array, "F tokens H"]:
    """Step: patches to tokens of the decoder."""
    return merger(x)


def encode_frames(
    tower: VisionTower, piece: Piece, config: VisionConfig
) -> tuple[Float[Array, "F tokens H"], tuple[Float[Array, "F tokens H"], ...]]:
    """Tokens of equally sized frames, and one further set of features per DeepStack block."""
    x = embed_patches(tower.patch_embed, tower.pos_embed, piece.patches, piece.taps, piece.shares)
    cos, sin = vision_angles(piece.rows_columns, theta=config.rope_theta, head_dim=config.head_dim)
    features = {}
    for index, block in enumerate(tower.blocks):
        x = vision_block(block, x, cos, sin, piece.valid)
        if index in config.deepstack_visual_indexes:
            place = config.deepstack_visual_indexes.index(index)
            features[place] = merge_patches(tower.deepstack_merger_list[place], x)
    tokens = merge_patches(tower.merger, x)
    return tokens, tuple(features[place] for place in range(len(features)))
