"""All passes of a request: what it does, in shapes and as programs; no weight is opened."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memsched.aot import Compiler
from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.cache import SMALLEST_CAPACITY
from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings
from qwen3vl_jax.config import Config
from qwen3vl_jax.frames import pieces
from qwen3vl_jax.inputs import SMALLEST_FEATURES, SMALLEST_TOKENS
from qwen3vl_jax.layer_steps import Granularity
from qwen3vl_jax.long_phases import long_phases
from qwen3vl_jax.network import Features, Qwen3VLNetwork, empty_features
from qwen3vl_jax.phases import Phase, phases
from qwen3vl_jax.planned.long_requests import cache_of
from qwen3vl_jax.planned.programs import Traced, trace_phase
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.shapes import Shape, scores_shapes
from qwen3vl_jax.planned.skeleton import shape_network
from qwen3vl_jax.weights import Rows

# Gives all passes of a request as programs, cut into steps as it is told.
Tracer = Callable[[Granularity, Rows], Mapping[str, Traced]]


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """A phase for arrays of some shapes, `count` times in a request.

    `part` is what users know it as: "vision", "prefill" or "decode".
    """

    name: str
    phase: str
    part: str
    count: int
    arrays: tuple[Any, ...]


def works_of(config: Config, request: Request, dtype: np.dtype) -> tuple[Work, ...]:
    """All passes of a request: pieces of pictures, chunks of the prompt, scores, a new token.

    Of a cache in blocks a chunk reads half of the prompt's, as chunks do on average; a token reads
    as many as there can be.
    """
    vision = [(1, (_features(config, request, dtype), piece)) for piece in _pieces(config, request)]
    prefill = [(1, _chunk(config, request, tokens, dtype)) for tokens in chunks_of(config, request)]
    return (
        *_numbered("vision", "vision", vision),
        *_numbered("prefill", "prefill", prefill),
        Work("scores", "scores", "prefill", 1, scores_shapes(config, request.batch, dtype)),
        Work(
            "decode",
            "decode",
            "decode",
            request.new_tokens,
            cache_of(request, config, dtype, request.capacity(config)).decode(),
        ),
    )


def _numbered(phase: str, part: str, found: Iterable[tuple[int, tuple[Any, ...]]]) -> list[Work]:
    """One `Work` for all that are of the same shapes."""
    works: dict[Any, Work] = {}
    for count, arrays in found:
        leaves, tree = jax.tree.flatten(arrays)
        key = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        name = f"{phase} {len(works) + 1}" if works else phase
        known = works.get(key, Work(name, phase, part, 0, arrays))
        works[key] = dataclasses.replace(known, count=known.count + count)
    return list(works.values())


def _pieces(config: Config, request: Request) -> Iterable[Any]:
    """Shapes of the pieces in which pictures go through the vision tower."""
    grids = [grid for grid in request.grids(config) for _ in range(request.batch)]
    rows = sum(height * width for _, height, width in grids)
    # Half as much memory as real pixels, for a moment; nobody reads them.
    pixels = np.broadcast_to(np.zeros((), np.float16), (rows, config.vision.patch_values))
    for piece in pieces(pixels, grids, config.vision) if grids else ():
        shapes = jax.tree.map(lambda leaf: Shape(leaf.shape, leaf.dtype), piece)
        yield dataclasses.replace(shapes, patches=Shape(piece.patches.shape, jnp.float32))


def _features(config: Config, request: Request, dtype: np.dtype) -> Features:
    count = bucket(request.batch * request.picture_tokens(config), SMALLEST_FEATURES)
    return jax.eval_shape(lambda: empty_features(count, config, dtype))


def chunks_of(config: Config, request: Request) -> Iterable[int]:
    """Padded tokens of each chunk of the prompt, as `Qwen3VL.prefill` cuts it."""
    count, slots = request.prompt_length(config), request.block_slots
    capacity = bucket(request.capacity(config), SMALLEST_CAPACITY)
    first = 0
    while first < count:
        room = capacity - first if slots is None else slots - first % slots
        tokens = min(request.chunk_tokens, count - first, room)
        yield min(bucket(tokens, SMALLEST_TOKENS) if tokens > 1 else 1, room)
        first += tokens


def _chunk(config: Config, request: Request, tokens: int, dtype: np.dtype) -> tuple[Any, ...]:
    """Arrays of the phase "prefill"."""
    rows, hidden = request.batch, config.text.hidden_size
    cache = cache_of(request, config, dtype, request.prompt_length(config) // 2)
    return (
        Shape((rows, tokens, hidden), dtype),
        Shape((3, rows, tokens), jnp.int32),
        Shape((rows, tokens), jnp.int32),
        _features(config, request, dtype) if request.images or request.frames else None,
        *cache.parts(),
        Shape((rows, tokens), jnp.bool_),
        Shape((), jnp.int32),
        Shape((rows, 1, hidden), dtype),
        Shape((rows,), jnp.int32),
        Shape((rows,), jnp.bool_),
    )


def traced_request(
    config: Config,
    request: Request,
    dtype: np.dtype,
    compiler: Compiler | None = None,
    encodings: Encodings = NOTHING_ENCODED,
) -> Tracer:
    """Traces all passes of a request, once for each granularity and cut of the vocabulary."""
    works = works_of(config, request, dtype)

    @functools.cache
    def network(rows: Rows) -> Qwen3VLNetwork:
        return shape_network(config, dtype=dtype, vocab_rows=rows, encodings=encodings)

    @functools.cache
    def traced(granularity: Granularity, rows: Rows) -> Mapping[str, Traced]:
        known = phases(config, granularity)
        if request.block_slots is not None:
            known |= long_phases(config, granularity)
        return _traced(works, known, network(rows), compiler)

    return traced


def _traced(
    works: Iterable[Work],
    known: Mapping[str, Phase],
    network: Qwen3VLNetwork,
    compiler: Compiler | None,
) -> dict[str, Traced]:
    """All passes as programs. Each knows the weights of the others, and leaves room for caches."""
    alone = {work.name: trace_phase(known[work.phase], network, work.arrays) for work in works}
    if compiler is not None:
        alone = {name: one.compiled_by(compiler) for name, one in alone.items()}
    weights = {
        name: spec
        for one in alone.values()
        for name, spec in one.program.arrays.items()
        if spec.kind == "weight"
    }
    decode = alone["decode"].program
    cache_bytes = sum(decode.arrays[name].nbytes for name in decode.of_kind("cache"))
    return {
        name: one.beside(0 if one.program.of_kind("cache") else cache_bytes).knowing(weights)
        for name, one in alone.items()
    }
