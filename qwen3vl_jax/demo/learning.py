"""Joins the demo's batches to the network: what the training loop needs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qwen3vl_jax import inputs
from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.config import Config
from qwen3vl_jax.demo import recipe
from qwen3vl_jax.demo.batches import (
    CELL_CONTENTS,
    GRID,
    IGNORED,
    MERGE,
    TOKENS_PER_PICTURE,
    TRAINING_STREAM,
    ChatTokens,
    make_batch,
    make_naming_batch,
)
from qwen3vl_jax.demo.questions import KINDS
from qwen3vl_jax.frames import Piece, block_order, table_taps
from qwen3vl_jax.inputs import INPUT_NAMES
from qwen3vl_jax.network import (
    Batch,
    Qwen3VLNetwork,
    abstract_network,
    forward,
    named_arrays,
    network_from_arrays,
)
from qwen3vl_jax.text import head
from qwen3vl_jax.train import Loss, Parameters, cross_entropy
from qwen3vl_jax.vision import encode_frames


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["batch", "labels", "wording", "kinds", "ordinals"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Turns:
    """What the network reads, tokens of the answers and of the questions, kinds of question.

    `ordinals` say at vision tokens which picture they are of; None where that is not asked.
    """

    batch: Batch
    labels: AnyArray
    wording: AnyArray
    kinds: AnyArray
    ordinals: AnyArray | None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["piece", "words", "cells"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, slots=True)
class Naming:
    """Pictures alone, and the words for each of their cells."""

    piece: Piece
    words: AnyArray
    cells: AnyArray


def prepare(arrays: dict[str, np.ndarray], config: Config) -> Turns:
    """The network's view of a batch from `make_batch`.

    The same numbers as `inputs.prepare` gives, but frames are not padded from 36 patches to 64.
    """
    read = {name: arrays[name] for name in INPUT_NAMES if name in arrays}
    batch, _ = inputs.prepare(config, read, pictures=False)
    return Turns(
        dataclasses.replace(batch, pieces=(_piece(arrays["pixel_values"], config),)),
        arrays["labels"],
        arrays["wording"],
        arrays["kinds"],
        arrays.get("ordinals"),
    )


def _piece(pixels: Float[np.ndarray, "patches values"], config: Config) -> Piece:
    pictures = len(pixels) // GRID**2
    place = block_order(GRID, GRID, MERGE)
    taps, shares = table_taps(place, GRID, GRID, config.vision.table_side)
    rows = np.arange(pictures * TOKENS_PER_PICTURE, dtype=np.int32)
    return Piece(
        patches=pixels.reshape(pictures, GRID**2, -1),
        taps=taps,
        shares=shares,
        rows_columns=place,
        valid=np.ones(GRID**2, bool),
        token_rows=rows.reshape(pictures, -1),
    )


def batches(chat: ChatTokens, config: Config, number: int) -> Turns | Naming:
    """Training batch `number` of the curriculum."""
    layout, mixture = recipe.plan(number)
    if layout == recipe.NAMING:
        arrays = make_naming_batch(chat, layout, mixture, stream=TRAINING_STREAM, number=number)
        return Naming(_piece(arrays["pixel_values"], config), arrays["words"], arrays["cells"])
    return prepare(make_batch(chat, layout, mixture, stream=TRAINING_STREAM, number=number), config)


def make_loss(network: Qwen3VLNetwork, config: Config, end_token: int) -> Loss:
    """The loss of either kind of batch, with a metric for each kind of question or cell."""
    text = dataclasses.replace(config.text, num_hidden_layers=recipe.NUMBERING_LAYERS)
    shallow_config = dataclasses.replace(config, text=text)
    shallow = abstract_network(shallow_config, dtype=jnp.float32)

    def loss(
        parameters: Parameters, batch: Turns | Naming
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        filled = network_from_arrays(network, parameters)
        if isinstance(batch, Naming):
            return naming_loss(filled, batch, config)
        total, metrics = answer_loss(filled, batch, config, end_token)
        if batch.ordinals is None:
            return total, metrics
        numbering = numbering_loss(shallow, shallow_config, parameters, batch)
        return total + jnp.float32(recipe.NUMBERING_SHARE) * numbering, metrics

    return loss


def numbering_loss(
    shallow: Qwen3VLNetwork, config: Config, parameters: Parameters, turns: Turns
) -> jax.Array:
    """Cross entropy of the picture's ordinal at every vision token after the first layers.

    After the last layer it is learnt as well, but there (measured after 1,400 steps) only the last
    layer knows it, and no later one can use it.
    """
    first = {name: parameters[name] for name in named_arrays(shallow)}
    logits = forward(network_from_arrays(shallow, first), turns.batch, config)
    return cross_entropy(logits, jnp.asarray(turns.ordinals))


def answer_loss(
    network: Qwen3VLNetwork, turns: Turns, config: Config, end_token: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy of the answers, and a share of that of the questions.

    To guess "circle" after "the red" one has to find what is red in the picture: the same search
    that answers need, learnt at more places. Metrics: both, and the share of right answer tokens
    per kind, end tokens apart.
    """
    logits = forward(network, turns.batch, config)
    wanted = turns.labels[:, 1:]
    counted = (wanted != IGNORED) & (wanted != end_token)
    right = ((jnp.argmax(logits[:, :-1], axis=-1) == wanted) & counted).astype(jnp.float32)
    metrics = {
        name: _mean_where(right, counted & (turns.kinds[:, 1:] == index))
        for index, name in enumerate(KINDS)
    }
    answers = cross_entropy(logits, jnp.asarray(turns.labels))
    wording = cross_entropy(logits, jnp.asarray(turns.wording))
    metrics |= {"answers": answers, "wording": wording}
    return answers + jnp.float32(recipe.WORDING_SHARE) * wording, metrics


def naming_loss(
    network: Qwen3VLNetwork, naming: Naming, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy of each vision token, read as a word, to its cell's words in equal shares.

    Metrics: the probability of all words of a cell together, for each content of cells.
    """
    tokens, _ = encode_frames(network.visual, naming.piece, config.vision)
    log_odds = jax.nn.log_softmax(head(network.language_model.norm, network.head, tokens), axis=-1)
    known = naming.words != IGNORED
    chosen = jnp.take_along_axis(log_odds, jnp.where(known, naming.words, 0), axis=-1)
    surprise = jnp.where(known, -chosen, jnp.float32(0)).sum(axis=-1) / known.sum(axis=-1).astype(
        jnp.float32
    )
    together = jnp.where(known, jnp.exp(chosen), jnp.float32(0)).sum(axis=-1)
    metrics = {
        f"cell: {name}": _mean_where(together, naming.cells == index)
        for index, name in enumerate(CELL_CONTENTS)
    }
    return surprise.mean(), metrics


def _mean_where(values: Float[Array, "*shape"], where: Bool[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.where(where, values, jnp.float32(0)).sum() / where.sum().astype(jnp.float32)
