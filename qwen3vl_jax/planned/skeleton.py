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

from qwen3vl_jax.config import Config
from qwen3vl_jax.network import Qwen3VLNetwork, abstract_network
from qwen3vl_jax.text import DecoderLayer
from qwen3vl_jax.vision import VisionBlock


def shape_network(config: Config, *, dtype: np.dtype, vocab_rows: int | None) -> Qwen3VLNetwork:
    """Shapes and dtypes of all weights under their paths; equal layers share theirs."""
    text, vision = config.text, config.vision
    hollow = dataclasses.replace(
        config,
        text=dataclasses.replace(text, num_hidden_layers=0),
        vision=dataclasses.replace(vision, depth=0),
    )
    network = abstract_network(hollow, dtype=dtype, vocab_rows=vocab_rows)

    @functools.cache
    def layer(kind: bool) -> Any:
        index = next(i for i in range(text.num_hidden_layers) if text.is_sparse(i) is kind)
        return nnx.eval_shape(lambda: DecoderLayer(text, index, dtype=dtype, rngs=nnx.Rngs(0)))

    block = nnx.eval_shape(lambda: VisionBlock(vision, dtype=dtype, rngs=nnx.Rngs(0)))
    kinds = [text.is_sparse(index) for index in range(text.num_hidden_layers)]
    network.language_model.layers = nnx.List([layer(kind) for kind in kinds])
    network.visual.blocks = nnx.List([block] * vision.depth)
    return network
