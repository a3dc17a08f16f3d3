"""How finely a model is cut into steps for a machine. The choice changes no bit of an answer.

Where all that a token reads fits, layers stay whole: that takes the fewest calls. Where that is
streamed, a plan must have room for all that one step reads, and what that takes cannot keep
anything; so a step then reads one matrix of an MLP, or some experts. Nothing is finer than
attention, which is one step and as large as such a matrix: smaller steps beside it would free no
memory.
"""

import math

import numpy as np

from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings, resting_bytes
from qwen3vl_jax.checkpoints.manifest import chunk_rows
from qwen3vl_jax.config import Config
from qwen3vl_jax.layer_steps import WHOLE_LAYERS, Granularity
from qwen3vl_jax.weights import Entry, Rows, arrays

# Caches, and what steps need beside them, of an ordinary prompt.
WORKING_BYTES = 512 << 20
# Planning takes time for every step: there are about so many of experts in all, or fewer.
MOST_EXPERT_STEPS = 1600
VOCAB_BLOCKS = 8
# So many small blocks in the head, at least, where nearly everything fits.
FINE_BLOCKS = 4


def choose_granularity(
    config: Config,
    dtype: np.dtype,
    device_bytes: int,
    encodings: Encodings = NOTHING_ENCODED,
) -> Granularity:
    """Whole layers if all that a token reads fits beside an ordinary prompt's caches, else the
    finest steps.

    Args:
        device_bytes: the budget of the device.
    """
    fits = resting_bytes(_read(config), encodings, dtype) + WORKING_BYTES <= device_bytes
    return WHOLE_LAYERS if fits else finest(config)


def finest(config: Config) -> Granularity:
    """Steps of about the size of attention: with these the least memory is enough.

    A step has a power of two of experts, more than that if there would be too many steps.
    """
    text, sparse = config.text, _sparse(config)
    if not any(sparse):
        return Granularity(split_dense=True)
    alike = round(math.log2(max(1.0, _attention(config) / _expert(config))))
    quick = math.ceil(math.log2(max(1.0, sum(sparse) * text.num_experts / MOST_EXPERT_STEPS)))
    together = min(1 << max(alike, quick), text.num_experts)
    return Granularity(split_dense=not all(sparse), experts_per_step=together)


def vocab_rows(config: Config, dtype: np.dtype) -> int:
    """Rows of a block of the vocabulary matrices, in whole chunks of a store.

    An eighth of all, or fewer if that is more than any of the finest steps of a layer reads. It is
    the same on every machine, but for `vocab_blocks`.
    """
    text = config.text
    chunk = chunk_rows((text.vocab_size, text.hidden_size), dtype.itemsize)
    eighth = -(-text.vocab_size // (VOCAB_BLOCKS * chunk))
    alike = _largest_step(config) // (chunk * text.hidden_size)
    return max(1, min(eighth, alike)) * chunk


def vocab_blocks(
    config: Config,
    dtype: np.dtype,
    device_bytes: int,
    encodings: Encodings = NOTHING_ENCODED,
) -> Rows:
    """How the vocabulary matrices are cut for a machine: `vocab_rows`, or some of them finer.

    Where all but a little of what a token reads fits, keys and values pass, the smallest matrices.
    Their room is full for as long as the head is computed, so nothing could be read then. With a
    few blocks as small as they are among the others, it can. Every block begins with a chunk.

    Args:
        device_bytes: the budget of the device.
    """
    rows, text = vocab_rows(config, dtype), config.text
    chunk = chunk_rows((text.vocab_size, text.hidden_size), dtype.itemsize)
    fine = chunk * max(1, round(text.num_key_value_heads * text.head_dim / chunk))
    if fine >= rows or not _nearly_fits(config, dtype, device_bytes, encodings):
        return rows
    count, rest = divmod(text.vocab_size, rows)
    if rest < FINE_BLOCKS * fine:
        count, rest = count - 1, rest + rows
    few, last = divmod(rest, fine)
    return _mixed(count, rows, few, fine) + ((last,) if last else ())


def _nearly_fits(config: Config, dtype: np.dtype, device_bytes: int, encodings: Encodings) -> bool:
    """Whether a token reads as much as fits, give or take all matrices of keys and values."""
    read = _read(config)
    smallest = [one for one in read if one.path.endswith((".k_proj.weight", ".v_proj.weight"))]
    lacking = resting_bytes(read, encodings, dtype) - device_bytes
    return abs(lacking) <= resting_bytes(smallest, encodings, dtype)


def _read(config: Config) -> list[Entry]:
    """The weights of a token: not those of pictures, and of the embedding table only rows."""
    tables = () if config.tie_word_embeddings else ("language_model.embed_tokens.",)
    return [one for one in arrays(config) if not one.path.startswith(("visual.", *tables))]


def _mixed(count: int, rows: int, few: int, fine: int) -> tuple[int, ...]:
    """Blocks of `rows` in three equal parts, and half of the fine ones between each two parts."""
    first, second, half = count // 3, 2 * count // 3, few // 2
    return (
        *(rows,) * first,
        *(fine,) * half,
        *(rows,) * (second - first),
        *(fine,) * (few - half),
        *(rows,) * (count - second),
    )


def _largest_step(config: Config) -> int:
    """Elements that the largest of the finest steps of a layer reads."""
    text, sparse, found = config.text, _sparse(config), [_attention(config)]
    if not all(sparse):
        found.append(text.intermediate_size * text.hidden_size)
    if any(sparse):
        found.append((finest(config).experts_per_step or 1) * _expert(config))
    return max(found)


def _sparse(config: Config) -> list[bool]:
    """Which layers have experts."""
    return [config.text.is_sparse(index) for index in range(config.text.num_hidden_layers)]


def _attention(config: Config) -> int:
    """Elements of the matrices of attention."""
    text = config.text
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    return heads * text.head_dim * text.hidden_size


def _expert(config: Config) -> int:
    """Elements of an expert."""
    return 3 * config.text.hidden_size * config.text.moe_intermediate_size
