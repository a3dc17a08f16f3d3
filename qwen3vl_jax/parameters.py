"""Where the weights of a model in memory come from: a checkpoint, or chance."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qwen3vl_jax.checkpoints.encodings import (
    Encoding,
    Encodings,
    as_encoded,
    codec_name,
    encoding_of,
    encodings_of,
    everywhere,
    origin,
    packed,
)
from qwen3vl_jax.checkpoints.opening import Checkpoint, described, open_checkpoint
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.encoded import Encoded, format_of
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.weights import Entry

DTYPES = ("float32", "bfloat16", "float16")


def named_dtype(name: str) -> np.dtype:
    """One of `DTYPES`.

    Raises:
        UsageError: it is another.
    """
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return np.dtype(jnp.dtype(name))


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to load.

    `stored` is its model, `config` the same as it runs: a tied head that is encoded is one of its
    own. `dtype` is that of raw weights in memory.
    """

    path: Path
    stored: Config
    config: Config
    dtype: np.dtype
    encodings: Encodings


def source_of(
    path: str | Path, dtype: str | None, codec: str | None, level: str = "minimal"
) -> Source:
    """What is to be loaded from a directory.

    Args:
        codec: encodes raw weights while they are loaded.
        level: the same, each with its own codec. A store that is encoded stays as it is.

    Raises:
        UsageError: a dtype or level that does not exist, both codec and level, or a codec for a
            store that is encoded already.
        memsched.errors.ProgramError: a codec that does not exist.
    """
    (config, found), stored = described(path), load_config(path)
    chosen = named_dtype(config.dtype if dtype is None else dtype)
    if codec is not None and level != "minimal":
        raise UsageError(f"codec={codec!r} and level={level!r} both say what to encode; give one")
    if codec is not None and codec_name(codec) != "raw":
        if found:
            raise UsageError(f"{path} is encoded already; leave out codec={codec!r}")
        found = encodings_of(config, everywhere(config, codec), lambda entry: chosen)
    elif level != "minimal" and not found:
        found = _chosen(Path(path), config, chosen, level)
    return Source(Path(path), stored, as_encoded(config, found), chosen, found)


def kv_of(kv: str | None, level: str) -> str:
    """How a KV cache is stored: as is asked, or as the level says.

    Raises:
        UsageError: a level that does not exist.
    """
    from qwen3vl_jax.checkpoints.selection import level_of

    return level_of(level).kv if kv is None else kv


def _chosen(path: Path, config: Config, dtype: np.dtype, level: str) -> Encodings:
    """What a level makes of raw weights. Reads every matrix."""
    from qwen3vl_jax.checkpoints.selection import NotesInMemory, Selection, level_of, select

    selection = Selection(level_of(level))
    with open_checkpoint(path, config) as checkpoint:
        return select(
            selection, checkpoint, config, lambda entry: dtype, NotesInMemory(), lambda nbytes: None
        ).encodings


def read_all(source: Source, entries: Sequence[Entry]) -> dict[str, Array | Encoded]:
    """Every array of a checkpoint, on the default device."""
    with open_checkpoint(source.path, source.stored) as checkpoint:
        return {entry.path: _read(source, checkpoint, entry) for entry in entries}


def encoded_shape(encoding: Encoding) -> Encoded:
    """What an array rests in, as a shape."""
    shape, dtype = encoding.packed
    return as_weight(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), encoding)


def _read(source: Source, checkpoint: Checkpoint, entry: Entry) -> Array | Encoded:
    encoding = encoding_of(entry, source.encodings)
    if encoding is None:
        # Zero-copy when the dtype stays: the array that was read is the one XLA reads.
        read = jax.device_put(checkpoint.read(entry))
        return read if read.dtype == source.dtype else read.astype(source.dtype)
    if checkpoint.encodings:
        return as_weight(jax.device_put(checkpoint.read_packed(entry)), encoding)
    raw = checkpoint.read(origin(entry, source.stored)).astype(source.dtype, copy=False)
    return as_weight(jax.device_put(packed(raw, entry.path, encoding)), encoding)


def as_weight(resting: Any, encoding: Encoding) -> Encoded:
    """What has been packed, as a weight."""
    outputs, inputs = encoding.shape
    return Encoded(resting, (outputs, inputs), format_of(encoding.format))


def draw_all(shapes: Mapping[str, Any], dtype: np.dtype, seed: int) -> dict[str, Array]:
    """Random weights of these shapes, in their order, as `draw` makes them."""
    generator = np.random.default_rng(seed)
    return {
        path: jnp.asarray(draw(generator, path, one.shape), dtype) for path, one in shapes.items()
    }


def draw(
    generator: np.random.Generator, path: str, shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    """Ones for norms, zeros for biases, otherwise uniform with variance 1 / inputs."""
    if path.endswith("bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    reach = np.float32((3.0 / np.prod(shape[1:])) ** 0.5)
    return (generator.random(shape, np.float32) * 2 - 1) * reach
