"""The demo from nothing to a checkpoint: tokenizer, training, export, loss curve."""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from qwen3vl_jax.config import load_config
from qwen3vl_jax.demo import learning, recipe
from qwen3vl_jax.demo.batches import ChatTokens
from qwen3vl_jax.demo.export import write_settings, write_weights
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.network import Qwen3VLNetwork, abstract_network, named_arrays
from qwen3vl_jax.train import Parameters, Progress, Settings, adamw, newest_average, train

CHECKPOINT = "checkpoint"


def first_weights(checkpoint: Path) -> Parameters:
    """The weights that training starts from: random, always the same."""
    network = Qwen3VLNetwork(load_config(checkpoint), dtype=jnp.float32, rngs=nnx.Rngs(0))
    return recipe.start(named_arrays(network))


def train_demo(
    directory: Path, report: Callable[[Progress], None], *, settings: Settings = recipe.SETTINGS
) -> Path:
    """Trains in `directory`, going on from an earlier run there, and exports.

    Returns:
        The Hugging Face directory of the finished model.
    """
    checkpoint = directory / CHECKPOINT
    write_settings(checkpoint)
    config = load_config(checkpoint)
    chat = ChatTokens(checkpoint)
    parameters = first_weights(checkpoint)
    average = train(
        learning.make_loss(abstract_network(config, dtype=jnp.float32), config, chat.end),
        parameters,
        lambda number: learning.batches(chat, config, number),
        settings,
        directory,
        report=report,
    )
    write_weights(checkpoint, average)
    return checkpoint


def export_newest(directory: Path, *, settings: Settings = recipe.SETTINGS) -> int:
    """Exports the newest averaged weights of a run, finished or not; returns their step."""
    checkpoint = directory / CHECKPOINT
    if not (checkpoint / "config.json").is_file():
        raise UsageError(f"{directory}: holds no training run; train there first")
    parameters = first_weights(checkpoint)
    step, average = newest_average(directory, parameters, adamw(settings))
    write_weights(checkpoint, average)
    return step


def draw_curve(metrics: Path, picture: Path) -> None:
    """Loss and accuracies over the steps, as a PNG. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 8), layout="constrained"
    )
    above.plot(steps, [line["loss"] for line in lines], color="black")
    above.set(yscale="log", ylabel="loss of the answers")
    for name in [
        name
        for name in dict.fromkeys(key for line in lines for key in line)
        if name not in ("step", "seconds", "rate", "loss")
    ]:
        below.plot(steps, [line.get(name) for line in lines], label=name, linewidth=1)
    below.set(xlabel="step", ylabel="share right", ylim=(0, 1.02))
    below.legend(ncols=3, fontsize="small")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
