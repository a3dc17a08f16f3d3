"""Training: a hand-computed loss, a falling loss, and runs that are killed and go on."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3vl_jax import train
from qwen3vl_jax.config import Config, parse_config
from qwen3vl_jax.inputs import prepare
from qwen3vl_jax.network import (
    Qwen3VLNetwork,
    abstract_network,
    forward,
    named_arrays,
    network_from_arrays,
)

CONFIG_VALUES = {
    "model_type": "qwen3_vl",
    "image_token_id": 20,
    "video_token_id": 21,
    "vision_start_token_id": 22,
    "vision_end_token_id": 23,
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 16,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [0],
    },
}
SETTINGS = train.Settings(
    steps=12,
    rates=((0, 0.0), (2, 0.01), (8, 0.01), (12, 0.0)),
    save_every_steps=4,
    log_every_steps=3,
)


def parts() -> tuple[Config, train.Parameters, train.Loss]:
    config = parse_config(CONFIG_VALUES)
    network = Qwen3VLNetwork(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    empty = abstract_network(config, dtype=jnp.float32)

    def loss(
        parameters: train.Parameters, batch: train.Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs, labels = batch
        logits = forward(network_from_arrays(empty, parameters), inputs, config)
        return train.cross_entropy(logits, labels), {}

    return config, named_arrays(network), loss


def batch_at(config: Config, number: int) -> train.Batch:
    """A picture whose brightness decides the third token."""
    rng = np.random.default_rng(number)
    bright = rng.integers(2, size=4)
    ids = np.array([[22, 20, 23, 3, answer] for answer in bright])
    pixels = np.repeat(2.0 * bright - 1, 4)[:, None] + 0.1 * rng.standard_normal((16, 96))
    arrays = {
        "input_ids": ids,
        "pixel_values": pixels.astype(np.float32),
        "image_grid_thw": np.array([[1, 2, 2]] * 4),
    }
    labels = np.full(ids.shape, train.IGNORED, np.int32)
    labels[:, 4] = ids[:, 4]
    return prepare(config, arrays)[0], labels


def run(
    directory: Path, report: Callable[[train.Progress], None] = lambda progress: None
) -> train.Parameters:
    config, parameters, loss = parts()
    return train.train(
        loss,
        parameters,
        lambda number: batch_at(config, number),
        SETTINGS,
        directory,
        report=report,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """A run that nobody disturbed."""

    directory: Path
    lines: list[train.Progress]
    weights: train.Parameters


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    directory = tmp_path_factory.mktemp("whole")
    lines: list[train.Progress] = []
    return Whole(directory, lines, run(directory, lines.append))


def test_the_loss_is_the_mean_surprise_of_the_labelled_tokens() -> None:
    # Position 0 predicts token 1 (not counted), position 1 predicts token 2.
    odds = jnp.log(
        jnp.array(
            [[[1, 1, 1], [1, 2, 5], [9, 9, 1]], [[1, 3, 4], [1, 1, 2], [7, 1, 1]]], np.float32
        )
    )
    labels = jnp.array([[2, train.IGNORED, 1], [0, 0, train.IGNORED]], jnp.int32)
    wanted = (-np.log(2 / 8) - np.log(1 / 8)) / 2
    assert float(train.cross_entropy(odds, labels)) == pytest.approx(wanted, rel=1e-6)


def test_without_any_label_the_loss_is_zero() -> None:
    labels = jnp.full((1, 3), train.IGNORED, jnp.int32)
    assert float(train.cross_entropy(jnp.ones((1, 3, 4), jnp.float32), labels)) == 0.0


def test_weights_learn_to_tell_bright_from_dark_pictures(whole: Whole) -> None:
    assert [line.step for line in whole.lines] == [3, 6, 9, 12]
    assert whole.lines[-1].metrics["loss"] < 0.5 * whole.lines[0].metrics["loss"]


def test_a_killed_run_goes_on_to_the_same_bits(whole: Whole, tmp_path: Path) -> None:
    script = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
        import jax
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        import test_train
        draw = test_train.batch_at
        def batch_at(config, number):
            if number == 11:
                os.kill(os.getpid(), signal.SIGKILL)
            return draw(config, number)
        test_train.batch_at = batch_at
        test_train.run(Path({str(tmp_path / "killed")!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert os.listdir(tmp_path / "killed" / "checkpoints"), "killed before its first checkpoint"
    resumed = run(tmp_path / "killed")
    for name, array in whole.weights.items():
        assert np.array_equal(np.asarray(array), np.asarray(resumed[name])), name
    logs = [
        (directory / "metrics.jsonl").read_text().splitlines()
        for directory in (whole.directory, tmp_path / "killed")
    ]
    assert [len(log) for log in logs] == [4, 4]


def test_only_the_last_two_checkpoints_are_kept(whole: Whole) -> None:
    names = os.listdir(whole.directory / "checkpoints")
    assert sorted(int(name) for name in names if name.isdigit()) == [8, 12]


def test_the_learning_rate_follows_its_corners() -> None:
    rate = train.learning_rate(SETTINGS)
    found = [float(rate(step)) for step in (0, 1, 2, 5, 8, 10, 12)]
    assert found == pytest.approx([0.0, 0.005, 0.01, 0.01, 0.01, 0.005, 0.0], abs=1e-9)
