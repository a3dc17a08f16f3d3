"""The network as shapes only, in a moment: for planning, which reads nothing else of it.

Equal layers are one object. Where paths are wanted and no identity, as in tracing, that is the same
as a network whose layers are all their own; `abstract_network` makes such a one, in minutes for
24,000 experts.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from flax import nnx

from qwen3vl_jax.checkpoints.encodings import HEAD, NOTHING_ENCODED, Encoding, Encodings
from qwen3vl_jax.config import Config
from qwen3vl_jax.layers import ShapesOnly
from qwen3vl_jax.network import Qwen3VLNetwork, abstract_network
from qwen3vl_jax.parameters import encoded_shape
from qwen3vl_jax.text import DecoderLayer
from qwen3vl_jax.vision import VisionBlock
from qwen3vl_jax.weights import Rows, row_blocks

Parts = tuple[tuple[str, Encoding], ...]  # the place of each matrix in a module


def shape_network(
    config: Config,
    *,
    dtype: np.dtype,
    vocab_rows: Rows,
    encodings: Encodings = NOTHING_ENCODED,
) -> Qwen3VLNetwork:
    """Shapes and dtypes of all weights under their paths; equal layers share theirs."""
    text, vision = config.text, config.vision
    hollow = dataclasses.replace(
        config,
        text=dataclasses.replace(text, num_hidden_layers=0),
        vision=dataclasses.replace(vision, depth=0),
    )
    network = abstract_network(hollow, dtype=dtype, vocab_rows=vocab_rows)
    network = _encoded(network, _outside(encodings, config, vocab_rows))

    @functools.cache
    def layer(index: int, encoded: Parts) -> Any:
        made = nnx.eval_shape(lambda: DecoderLayer(text, index, dtype=dtype, rngs=ShapesOnly()))
        return _encoded(made, encoded)

    @functools.cache
    def block(encoded: Parts) -> Any:
        made = nnx.eval_shape(lambda: VisionBlock(vision, dtype=dtype, rngs=ShapesOnly()))
        return _encoded(made, encoded)

    sparse = [text.is_sparse(index) for index in range(text.num_hidden_layers)]
    parts = _parts(encodings, "language_model.layers.")
    layers = [layer(sparse.index(kind), parts.get(i, ())) for i, kind in enumerate(sparse)]
    network.language_model.layers = nnx.List(layers)
    parts = _parts(encodings, "visual.blocks.")
    network.visual.blocks = nnx.List([block(parts.get(i, ())) for i in range(vision.depth)])
    return network


def _parts(encodings: Encodings, prefix: str) -> dict[int, Parts]:
    """Encoded matrices of each layer, by their place in it."""
    found: dict[int, list[tuple[str, Encoding]]] = {}
    for path, encoding in encodings.items():
        if path.startswith(prefix):
            index, _, place = path.removeprefix(prefix).partition(".")
            found.setdefault(int(index), []).append((place, encoding))
    return {index: tuple(sorted(parts, key=lambda part: part[0])) for index, parts in found.items()}


def _outside(encodings: Encodings, config: Config, vocab_rows: Rows) -> Parts:
    """Encoded matrices that are in no layer; the head in its blocks."""
    layers = ("language_model.layers.", "visual.blocks.")
    outside = {name: e for name, e in encodings.items() if not name.startswith(layers)}
    blocks = row_blocks(config.text.vocab_size, vocab_rows)
    if head := outside.pop(HEAD, None):
        outside |= {f"{HEAD}.{block}": head.part(rows) for block, rows in enumerate(blocks)}
    return tuple(outside.items())


def _encoded(module: Any, encoded: Parts) -> Any:
    """A module of shapes, with these matrices as shapes of what they rest in."""
    if not encoded:
        return module
    shapes = {place: encoded_shape(encoding) for place, encoding in encoded}
    graph, state = nnx.split(module)
    flat = [(path, ".".join(map(str, path)), param) for path, param in nnx.to_flat_state(state)]
    missing = shapes.keys() - {place for _, place, _ in flat}
    assert not missing, missing
    filled = [
        (path, param.replace(shapes.get(place, param.get_value()))) for path, place, param in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))
