"""Mean squares of inputs, against what the products of the model itself are given."""

import dataclasses
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from converting import ROOT, convert
from encoded_stores import HEAD
from safetensors.numpy import load_file, save_file

from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.activations import input_squares, measured_input_squares
from qwen3vl_jax.calibration import inputs_of
from qwen3vl_jax.checkpoints.encodings import everywhere
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.encoded import Encoded
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.inputs import prepare
from qwen3vl_jax.linear import contract
from qwen3vl_jax.network import abstract_network, forward, network_from_arrays
from qwen3vl_jax.perturbation import measured_error

EXAMPLE = ROOT / "examples" / "checkpoint"
IDS = np.random.default_rng(0).integers(3, 30, (1, 16)).astype(np.int32)
ALL_EXPERTS = {"num_experts_per_tok": 3}


@dataclasses.dataclass(frozen=True, eq=False)
class Watching:
    """A format of weights that are as they were, and that keeps what they are multiplied with."""

    seen: list[np.ndarray]

    def product(self, rows: jax.Array, packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        jax.debug.callback(lambda given: self.seen.append(np.asarray(given)), rows)
        return contract(rows, packed)


def config_of(tmp_path: Path, kind: str, **text: Any) -> Config:
    factory.checkpoint(tmp_path / "hf", kind, text=text)
    return load_config(tmp_path / "hf")


def watched(model: Qwen3VL, ids: np.ndarray) -> dict[str, np.ndarray]:
    """All rows that came into every matrix that can be encoded."""
    seen: dict[str, list[np.ndarray]] = {}
    arrays = dict(model.parameters)
    for path in everywhere(model.config, "int8"):
        name = f"{HEAD}.0" if path == HEAD else path
        weight = arrays[name]
        arrays[name] = Encoded(weight, weight.shape, Watching(seen.setdefault(path, [])))
    rows = model.config.text.vocab_size
    empty = abstract_network(model.config, dtype=jnp.float32, vocab_rows=rows)
    batch, _ = prepare(model.config, {"input_ids": ids})
    forward(network_from_arrays(empty, arrays), batch, model.config)
    jax.effects_barrier()
    return {path: np.concatenate(parts) for path, parts in seen.items()}


@pytest.mark.parametrize("kind", ["dense", "moe", "mixed"])
def test_they_are_those_of_the_rows_that_every_matrix_is_multiplied_with(
    kind: str, tmp_path: Path
) -> None:
    # With every token through every expert no group of an expert's rows has a gap to fill.
    model = Qwen3VL.random(config_of(tmp_path, kind, **({} if kind == "dense" else ALL_EXPERTS)))
    found, _ = input_squares(model, {"input_ids": IDS})
    rows = watched(model, IDS)
    assert found.keys() == rows.keys() == everywhere(model.config, "int8").keys()
    for path, given in rows.items():
        assert len(given) == IDS.size
        wanted = np.square(given.astype(np.float64)).mean(axis=0)
        np.testing.assert_allclose(found[path], wanted, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("kind", ["dense", "moe", "mixed"])
def test_on_the_way_the_logits_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model = Qwen3VL.random(config_of(tmp_path, kind))
    _, last = input_squares(model, {"input_ids": IDS})
    head = np.asarray(model.parameters[f"{HEAD}.0"])
    np.testing.assert_allclose(np.asarray(last) @ head.T, model(input_ids=IDS), atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_padding_counts_for_nothing(kind: str, tmp_path: Path) -> None:
    text = {} if kind == "dense" else ALL_EXPERTS
    model = Qwen3VL.random(config_of(tmp_path, kind, **text))
    lengths = (16, 5)
    mask = np.arange(16) >= 16 - np.array(lengths)[:, None]
    ids = np.where(mask, np.concatenate([IDS, IDS[:, ::-1]]), 0)
    together, _ = input_squares(model, {"input_ids": ids, "attention_mask": mask.astype(int)})
    alone = [
        input_squares(model, {"input_ids": row[None, -n:]})[0]
        for row, n in zip(ids, lengths, strict=True)
    ]
    for path, squares in together.items():
        parts = [n * one[path] for n, one in zip(lengths, alone, strict=True)]
        np.testing.assert_allclose(squares, sum(parts) / sum(lengths), rtol=1e-4, err_msg=path)


def test_an_expert_that_nobody_chooses_has_zeros(tmp_path: Path) -> None:
    model = Qwen3VL.random(config_of(tmp_path, "moe"))
    arrays = {
        name: jnp.zeros_like(array) if name.endswith("mlp.gate.weight") else array
        for name, array in model.parameters.items()
    }
    empty = abstract_network(model.config, dtype=jnp.float32)
    model = Qwen3VL(model.config, network_from_arrays(empty, arrays), model.settings)
    found, _ = input_squares(model, {"input_ids": IDS})
    # Of equal scores the first two of three win.
    for layer in range(2):
        experts = [f"language_model.layers.{layer}.mlp.experts.{n}." for n in range(3)]
        assert [bool(found[name + "down_proj"].all()) for name in experts] == [True, True, False]
        assert not found[experts[2] + "down_proj"].any()
        assert all(found[name + "gate_up_proj"].all() for name in experts)


def test_no_column_counts_less_than_a_share_of_the_mean() -> None:
    prompts = ["What colour is the circle?", "  ", "Is there a star?"]
    found = measured_input_squares(EXAMPLE, prompts, dtype="float32")
    raw, _ = input_squares(
        Qwen3VL.from_pretrained(EXAMPLE, dtype="float32"), inputs_of(EXAMPLE, prompts)
    )
    assert found.keys() == everywhere(load_config(EXAMPLE), "int8").keys()
    for path, squares in found.items():
        assert squares.dtype == np.float32
        np.testing.assert_allclose(squares, raw[path] + 0.1 * raw[path].mean(), rtol=1e-5)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_prompt_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no prompt to calibrate with"):
        measured_input_squares(EXAMPLE, text.splitlines(), dtype=None)


@pytest.fixture(scope="module")
def with_outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with two channels of every norm 10 times as large."""
    folder = tmp_path_factory.mktemp("outliers")
    for path in EXAMPLE.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (file,) = EXAMPLE.glob("*.safetensors")
    tensors, rng = load_file(file), np.random.default_rng(0)
    for name, values in tensors.items():
        if name.endswith("layernorm.weight"):
            values[rng.choice(len(values), 2, replace=False)] *= 10
    save_file(tensors, folder / file.name, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("codec", ["int4", "int4:64"])
def test_fitted_codes_move_the_logits_of_other_prompts_less(
    with_outliers: Path, codec: str, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes((ROOT / "examples" / "prompts.txt").read_bytes())
    others = [
        "How many green shapes are left of the square?",
        "Name the largest number.",
        "Is the star above the circle?",
        "Where is it?",
    ]
    errors = []
    for name, arguments in (("plain", []), ("fitted", ["--calibrate", prompts])):
        arguments = ["--codec", codec, *arguments, "--verify"]
        assert convert(with_outliers, tmp_path / name, *arguments) == 0
        errors.append(measured_error(with_outliers, tmp_path / name, others, dtype="float32"))
    assert errors[1] < 0.9 * errors[0], errors
