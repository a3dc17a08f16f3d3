"""Stores whose codes are fitted to inputs: what they hold, what they keep, what is refused."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import pytest
from converting import files, nothing_left
from encoded_stores import HEAD, TABLE, Body, forge
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from memsched.codecs import Int4, Int8, parse_codec
from memsched.codecs.levels import Level
from qwen3vl_jax.checkpoints import conversion, input_squares
from qwen3vl_jax.checkpoints.conversion import to_store
from qwen3vl_jax.checkpoints.encodings import everywhere
from qwen3vl_jax.checkpoints.input_squares import FILE_NAME, Inputs, check_fitted
from qwen3vl_jax.checkpoints.opening import open_checkpoint
from qwen3vl_jax.checkpoints.selection import Selection
from qwen3vl_jax.checkpoints.store import Store
from qwen3vl_jax.checkpoints.verification import verify
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError, WeightError
from qwen3vl_jax.progress import Silent
from qwen3vl_jax.weights import arrays

Arrays = dict[str, np.ndarray]


@pytest.fixture(params=["dense", "moe"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    factory.checkpoint(tmp_path / "hf", request.param, tied=True, shards=2)
    return tmp_path / "hf"


def squares_of(source: Path, seed: int = 0) -> Arrays:
    """Mean squares for every matrix that can be encoded, with outliers."""
    config, rng = load_config(source), np.random.default_rng(seed)
    widths = {entry.array: entry.shape[-1] for entry in arrays(config)}
    widths[HEAD] = widths[TABLE]
    return {
        path: np.exp(rng.normal(0, 3, widths[path])).astype(np.float32)
        for path in everywhere(config, "int8")
    }


def converted(source: Path, destination: Path, inputs: Inputs, codec: str = "int4") -> Path:
    codecs = everywhere(load_config(source), codec)
    to_store(source, destination, dtype="keep", progress=Silent(), codecs=codecs, inputs=inputs)
    return destination


def fitted_store(
    source: Path, destination: Path, squares: Mapping[str, np.ndarray], codec: str = "int4"
) -> Path:
    return converted(source, destination, Inputs(lambda: squares, "a"), codec)


@pytest.mark.parametrize("name", ["int4", "int8", "int4:64:zero"])
def test_a_store_holds_the_codes_that_its_inputs_give_and_keeps_these(
    source: Path, tmp_path: Path, name: str
) -> None:
    squares, config = squares_of(source), load_config(source)
    store = fitted_store(source, tmp_path / "store", squares, name)
    found = Store(store, config).manifest
    with open_checkpoint(source, config) as checkpoint:
        raw = {entry.array: checkpoint.read(entry) for entry in arrays(config)}
    raw[HEAD] = raw[TABLE]
    encoded = {path for path, array in found.arrays.items() if array.encoding is not None}
    for path in encoded:
        codec = parse_codec(found.arrays[path].encoding.codec)
        assert isinstance(codec, Int4 | Int8)
        packed = codec.encode(raw[path], weights=squares[path])
        assert found.arrays[path].sha256 == hashlib.sha256(packed.tobytes()).hexdigest(), path
    # An oracle that shares nothing with our reader: the package of Hugging Face.
    kept = load_safetensors((store / FILE_NAME).read_bytes())
    assert kept.keys() == encoded <= squares.keys()
    assert all(np.array_equal(kept[path], squares[path]) for path in kept)
    assert verify(source, store, progress=Silent())


def test_other_inputs_give_other_codes_in_as_many_bytes(source: Path, tmp_path: Path) -> None:
    stores = [
        files(fitted_store(source, tmp_path / str(seed), squares_of(source, seed)))
        for seed in range(2)
    ]
    assert {name: len(data) for name, data in stores[0].items() if name != "manifest.json"} == {
        name: len(data) for name, data in stores[1].items() if name != "manifest.json"
    }
    assert any(stores[0][name] != stores[1][name] for name in stores[0] if "q_proj" in name)


def test_a_chosen_codec_is_fitted_too(source: Path, tmp_path: Path) -> None:
    level = Level("tried", 0.5, 0.1, ("int8", "int4:32"))
    inputs = Inputs(lambda: squares_of(source), "a")
    arguments = {"dtype": "keep", "progress": Silent(), "selection": Selection(level)}
    to_store(source, tmp_path / "fitted", **arguments, inputs=inputs)
    to_store(source, tmp_path / "plain", **arguments)
    fitted, plain = files(tmp_path / "fitted"), files(tmp_path / "plain")
    assert fitted["encoding_report.json"] == plain["encoding_report.json"]
    assert fitted.keys() - plain.keys() == {FILE_NAME}
    assert any(fitted[name] != plain[name] for name in plain if name.startswith("arrays/"))
    assert verify(source, tmp_path / "fitted", progress=Silent())


def test_nothing_is_measured_where_nothing_is_fitted(source: Path, tmp_path: Path) -> None:
    inputs = Inputs(lambda: pytest.fail("measured"), "a")
    nothing = Selection(Level("minimal", 0.0, 0.1, ()))
    arguments = {"dtype": "keep", "progress": Silent(), "inputs": inputs}
    to_store(source, tmp_path / "raw", **arguments, selection=nothing)
    converted(source, tmp_path / "svd", inputs, "svd:rank=4")
    for name in ("raw", "svd"):
        assert not (tmp_path / name / FILE_NAME).exists()
        verify(source, tmp_path / name, progress=Silent())


# ---- kills ----


class Killed(BaseException):
    """What ends the process."""


def killed_at(
    moment: str, source: Path, destination: Path, inputs: Inputs, patch: pytest.MonkeyPatch
) -> None:
    """A conversion to int4 that ends where a function of `conversion` would be called."""

    def kill(*_: object) -> None:
        raise Killed

    with patch.context() as patched:
        patched.setattr(conversion, moment, kill)
        with pytest.raises(Killed):
            converted(source, destination, inputs)


@pytest.mark.parametrize("moment", ["_copy_files", "_store_all"])
def test_what_was_measured_before_a_kill_is_not_measured_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    squares = squares_of(source)
    killed_at(moment, source, tmp_path / "store", Inputs(lambda: squares, "a"), monkeypatch)
    converted(source, tmp_path / "store", Inputs(lambda: pytest.fail("measured twice"), "a"))
    straight = fitted_store(source, tmp_path / "straight", squares)
    assert files(tmp_path / "store") == files(straight)
    assert nothing_left(tmp_path)


def test_work_with_other_prompts_starts_afresh(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Inputs(lambda: squares_of(source), "a")
    killed_at("_copy_files", source, tmp_path / "store", first, monkeypatch)
    converted(source, tmp_path / "store", Inputs(lambda: squares_of(source, 1), "b"))
    straight = fitted_store(source, tmp_path / "straight", squares_of(source, 1))
    assert files(tmp_path / "store") == files(straight)


# ---- damage and forgery ----


def forged(store: Path, content: bytes | None) -> None:
    """Other mean squares, or none, with a manifest that knows them."""

    def change(body: Body) -> None:
        del body["files"][FILE_NAME]
        if content is not None:
            digest = hashlib.sha256(content).hexdigest()
            body["files"][FILE_NAME] = {"nbytes": len(content), "sha256": digest}

    (store / FILE_NAME).unlink()
    if content is not None:
        (store / FILE_NAME).write_bytes(content)
    forge(store, change)


def _longer(kept: Arrays) -> Arrays:
    return kept | {HEAD: np.append(kept[HEAD], np.float32(1))}


def _unknown(kept: Arrays) -> Arrays:
    return kept | {TABLE: kept[HEAD]}


def _half(kept: Arrays) -> Arrays:
    return kept | {HEAD: kept[HEAD].astype(np.float16)}


def _negative(kept: Arrays) -> Arrays:
    return kept | {HEAD: -kept[HEAD]}


def _not_a_number(kept: Arrays) -> Arrays:
    return kept | {HEAD: np.full_like(kept[HEAD], np.nan)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_longer, r"'lm_head.weight' is float32 \[17\].*16 columns"),
        (_unknown, r"'language_model.embed_tokens.weight' is float32 \[16\].*no matrix here"),
        (_half, r"'lm_head.weight' is float16 \[16\]"),
        (_negative, "inputs of 'lm_head.weight' must be finite, 0 or more"),
        (_not_a_number, "inputs of 'lm_head.weight' must be finite, 0 or more"),
    ],
)
def test_mean_squares_of_another_store_are_refused_in_one_line(
    source: Path, tmp_path: Path, change: Callable[[Arrays], Arrays], says: str
) -> None:
    store = fitted_store(source, tmp_path / "store", squares_of(source))
    kept = load_safetensors((store / FILE_NAME).read_bytes())
    forged(store, save_safetensors(change(kept)))
    with pytest.raises(WeightError, match=says) as refused:
        verify(source, store, progress=Silent())
    assert "\n" not in str(refused.value)


def test_any_damage_is_refused_and_a_file_of_any_bytes(source: Path, tmp_path: Path) -> None:
    store = fitted_store(source, tmp_path / "store", squares_of(source))
    whole, rng = (store / FILE_NAME).read_bytes(), np.random.default_rng(0)
    (store / FILE_NAME).write_bytes(whole[:-1] + b"\x00")
    with pytest.raises(WeightError, match=r"is not the file that manifest\.json knows"):
        verify(source, store, progress=Silent())
    widths = {name: values.shape[0] for name, values in load_safetensors(whole).items()}
    bad = [b"", b"\xff" * 8, b"\xff" * 64, whole[:7], whole[:-4], whole + b"1234"]
    bad += [rng.bytes(size) for size in (9, 100, 1000)]
    for content in bad:
        with pytest.raises(WeightError):
            input_squares.read(content, FILE_NAME, widths)


@pytest.mark.parametrize("seed", [None, 1])
def test_codes_that_are_not_fitted_to_what_is_kept_do_not_pass(
    source: Path, tmp_path: Path, seed: int | None
) -> None:
    store = fitted_store(source, tmp_path / "store", squares_of(source))
    kept = load_safetensors((store / FILE_NAME).read_bytes())
    others = None if seed is None else squares_of(source, seed)
    content = None
    if others is not None:
        content = save_safetensors({name: others[name] for name in kept})
    forged(store, content)
    with pytest.raises(WeightError, match="differs between"):
        verify(source, store, progress=Silent())


def test_measuring_what_is_not_finite_is_refused(source: Path, tmp_path: Path) -> None:
    squares = squares_of(source)
    squares[HEAD][3] = np.inf
    with pytest.raises(WeightError, match=r"inputs of 'lm_head.weight' must be finite.*float32"):
        fitted_store(source, tmp_path / "store", squares)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("codec", ["raw", "fp16", "bf16", "svd:rank=4", "sparse:2:4"])
def test_a_codec_without_scales_is_refused_by_name(codec: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_fitted(codec)
    assert str(refused.value) == (
        f"codec {codec} has no scales that --calibrate could fit; "
        "choose auto, or any int8 or int4, or leave out --calibrate"
    )
