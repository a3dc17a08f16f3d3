"""Joins the demo's batches to the network: what the training loop needs."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax import inputs
from qwen3vl_jax.config import Config
from qwen3vl_jax.demo import recipe
from qwen3vl_jax.demo.batches import (
    GRID,
    IGNORED,
    MERGE,
    TOKENS_PER_PICTURE,
    TRAINING_STREAM,
    ChatTokens,
    make_batch,
)
from qwen3vl_jax.demo.questions import KINDS
from qwen3vl_jax.demo.recipe import Stage
from qwen3vl_jax.frames import Piece, block_order, table_taps
from qwen3vl_jax.inputs import INPUT_NAMES
from qwen3vl_jax.network import Batch, Qwen3VLNetwork, forward, network_from_arrays
from qwen3vl_jax.train import Loss, Parameters, cross_entropy

Prepared = tuple[Batch, np.ndarray, np.ndarray]  # what the network reads, labels, kinds


def prepare(arrays: dict[str, np.ndarray], config: Config) -> Prepared:
    """The network's view of a batch from `make_batch`.

    The same numbers as `inputs.prepare` gives, but frames are not padded to a bucket: 36 patches, not 64.
    """
    read = {name: arrays[name] for name in INPUT_NAMES if name in arrays}
    batch, _ = inputs.prepare(config, read, pictures=False)
    pictures = len(arrays["image_grid_thw"])
    place = block_order(GRID, GRID, MERGE)
    taps, shares = table_taps(place, GRID, GRID, config.vision.table_side)
    count = pictures * TOKENS_PER_PICTURE
    piece = Piece(
        patches=arrays["pixel_values"].reshape(pictures, GRID * GRID, -1),
        taps=taps,
        shares=shares,
        rows_columns=place,
        valid=np.ones(GRID * GRID, bool),
        token_rows=np.arange(count, dtype=np.int32).reshape(pictures, -1),
    )
    return dataclasses.replace(batch, pieces=(piece,)), arrays["labels"], arrays["kinds"]


def batches(chat: ChatTokens, config: Config, stages: tuple[Stage, ...], number: int) -> Prepared:
    """Training batch `number` of the curriculum."""
    layout, mixture = recipe.plan(number, stages)
    arrays = make_batch(chat, layout, mixture, stream=TRAINING_STREAM, number=number)
    return prepare(arrays, config)


def make_loss(network: Qwen3VLNetwork, config: Config, end_token: int) -> Loss:
    """Cross entropy of the answers; metrics: share of right tokens per kind of question, end tokens apart."""

    def loss(parameters: Parameters, prepared: Prepared) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch, labels, kinds = prepared
        logits = forward(network_from_arrays(network, parameters), batch, config)
        wanted = labels[:, 1:]
        counted = (wanted != IGNORED) & (wanted != end_token)
        right = (jnp.argmax(logits[:, :-1], axis=-1) == wanted) & counted
        metrics = {}
        for index, name in enumerate(KINDS):
            chosen = counted & (kinds[:, 1:] == index)
            metrics[name] = (right & chosen).sum().astype(jnp.float32) / chosen.sum().astype(jnp.float32)
        return cross_entropy(logits, labels), metrics

    return loss


def tokenizer_ids(directory: Path) -> dict[str, int]:
    """Ids of the added tokens of the tokenizer in `directory`."""
    from tokenizers import Tokenizer

    from qwen3vl_jax.demo.tokenizer import ADDED, SPECIAL

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return {token: tokenizer.token_to_id(token) for token in (*SPECIAL, *ADDED)}
