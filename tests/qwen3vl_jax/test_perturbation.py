"""Sensitivities that are measured, against matrices moved by hand, and what they predict."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from converting import ROOT, convert, files
from encoded_stores import HEAD, TABLE, decoded

from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.checkpoints.encodings import with_own_head
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.network import abstract_network, network_from_arrays
from qwen3vl_jax.perturbation import measured_error, measured_sensitivities
from qwen3vl_jax.processing.processor import Processor

EXAMPLE = ROOT / "examples" / "checkpoint"  # tied, four layers, trained
PROMPTS = ["What colour is the circle?", "How many shapes are there in the picture?"]
LAYER = "language_model.layers.2."  # alone in the middle part


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, float], list[str]]:
    said: list[str] = []
    return measured_sensitivities(EXAMPLE, PROMPTS, dtype=None, say=said.append), said


def scores(model: Qwen3VL) -> np.ndarray:
    """Of every token of the prompts, one prompt after another, without their means."""
    processor = Processor.from_pretrained(EXAMPLE)
    rows = []
    for prompt in PROMPTS:
        given = processor([[{"role": "user", "content": prompt}]])
        rows.append(np.asarray(model(**given))[0])
    found = np.concatenate(rows)
    return found - found.mean(axis=1, keepdims=True)


def with_matrices(model: Qwen3VL, names: list[str]) -> tuple[Qwen3VL, float]:
    """The model with matrices that went through int4:32, and by how much they moved."""
    config, arrays = with_own_head(model.config), dict(model.parameters)
    arrays[f"{HEAD}.0"] = arrays[f"{TABLE}.0"]
    squares = []
    for name in names:
        before = np.asarray(arrays[name])
        after = decoded(before, "int4:32")
        squares.append((np.linalg.norm(after - before) / np.linalg.norm(before)) ** 2)
        arrays[name] = jnp.asarray(after)
    empty = abstract_network(config, dtype=jnp.float32, vocab_rows=config.text.vocab_size)
    moved = Qwen3VL(config, network_from_arrays(empty, arrays), model.settings)
    return moved, float(np.sqrt(np.mean(squares)))


@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        ("head", [f"{HEAD}.0"]),
        ("v_proj:2-2", [f"{LAYER}self_attn.v_proj.weight"]),
        ("down_proj:0-1", [f"language_model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)]),
    ],
)
def test_a_sensitivity_is_what_the_logits_move_by_for_what_the_weights_do(
    measured: tuple[dict[str, float], list[str]], name: str, matrices: list[str]
) -> None:
    model = Qwen3VL.from_pretrained(EXAMPLE)
    wanted = scores(model)
    moved, change = with_matrices(model, matrices)
    answer = np.linalg.norm(scores(moved) - wanted) / np.linalg.norm(wanted) / change
    # Prompts one by one and in one padded batch: float32 sums in another order.
    assert measured[0][name] == pytest.approx(answer, rel=1e-3)


def test_a_line_is_said_for_every_class(measured: tuple[dict[str, float], list[str]]) -> None:
    found, said = measured
    assert len(found) == 7 * 3 + 1
    assert said[-1] == f"sensitivity 22 of 22, head: {found['head']:.3g}"


def test_what_is_predicted_is_what_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    arguments = ("--codec", "auto", "--error-budget", "0.05", "--calibrate", prompts)
    assert convert(EXAMPLE, tmp_path / "store", *arguments) == 0
    *table, predicted, measured = capsys.readouterr().err.splitlines()[22:]
    report = json.loads((tmp_path / "store" / "encoding_report.json").read_text())
    rows = report["arrays"].values()
    assert table[0].split() == ["codec", "arrays", "raw", "bytes", "stored", "bytes"]
    assert table[-1].split() == [
        "all",
        str(len(rows)),
        f"{sum(row['raw_bytes'] for row in rows):,}",
        f"{report['nbytes']:,}",
    ]
    assert predicted == f"predicted error of the logits: {report['predicted_error']:.4f} of 0.05"
    error = measured_error(EXAMPLE, tmp_path / "store", PROMPTS, dtype=None)
    assert measured == f"measured on these prompts: {error:.4f}"
    # Errors of many matrices together: 0.78 to 1.05 of the prediction was seen.
    assert 0.6 < error / report["predicted_error"] < 1.4
    assert convert(tmp_path / "store", "--verify") == 0


def test_the_same_prompts_choose_the_same_store(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS[0])
    arguments = ("--codec", "auto", "--calibrate", prompts)
    for name in ("one", "other"):
        assert convert(EXAMPLE, tmp_path / name, *arguments) == 0
    assert files(tmp_path / "one") == files(tmp_path / "other")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_prompt_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="no prompt to calibrate with"):
        measured_sensitivities(EXAMPLE, text.splitlines(), dtype=None, say=print)


def test_weights_that_do_not_fit_cannot_be_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3vl_jax.planned.loading.fits", lambda nbytes: False)
    with pytest.raises(UsageError, match="all its weights must fit in memory") as refused:
        measured_sensitivities(EXAMPLE, PROMPTS, dtype="bfloat16", say=print)
    assert "\n" not in str(refused.value)
