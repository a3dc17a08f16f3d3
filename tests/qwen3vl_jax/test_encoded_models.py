"""Models of encoded stores: they compute with what was decoded, in memory or streamed by plans."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import planned_models as helper
import pytest
import tiny
from converting import convert
from encoded_stores import HEAD, NAMES, TABLE, decoded, encoded_store, is_encoded

from memsched.codecs import parse_codec
from memsched.errors import DoesNotFitError, ProgramError
from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.checkpoints.encodings import with_own_head
from qwen3vl_jax.checkpoints.opening import described
from qwen3vl_jax.encoded import Encoded, PackedRows, format_of
from qwen3vl_jax.errors import UsageError, WeightError
from qwen3vl_jax.network import abstract_network, network_from_arrays
from qwen3vl_jax.planned.dry_run import dry_run
from qwen3vl_jax.planned.loading import Budgets
from qwen3vl_jax.planned.options import LEVELS
from qwen3vl_jax.planned.request import Request

pytestmark = pytest.mark.usefixtures("shared_traces")

PROJECTION = "language_model.layers.1.self_attn.q_proj.weight"
Located = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def located(tmp_path_factory: pytest.TempPathFactory) -> Located:
    """`located(checkpoint, codec)`: an encoded store of it, made once; "raw" is the source."""

    @functools.cache
    def source(name: str) -> Path:
        return tiny.checkpoint(name, tmp_path_factory.mktemp("checkpoint"))

    @functools.cache
    def locate(name: str, codec: str) -> Path:
        folder = tmp_path_factory.mktemp("stores") / "store"
        return source(name) if codec == "raw" else encoded_store(source(name), folder, codec)

    return locate


def decoded_model(raw: Qwen3VL, codec_name: str) -> Qwen3VL:
    """The model with raw weights that went through the codec; its head is one of its own."""
    codec, config = parse_codec(codec_name), raw.config
    arrays = dict(raw.parameters)
    if config.tie_word_embeddings and codec.cut == 1:
        config = with_own_head(config)
        arrays[f"{HEAD}.0"] = arrays[f"{TABLE}.0"]
    lossy = {
        path: jnp.asarray(decoded(np.asarray(array), codec_name))
        for path, array in arrays.items()
        if is_encoded(path.removesuffix(".0") if path.startswith(HEAD) else path, codec)
    }
    empty = abstract_network(config, dtype=jnp.float32, vocab_rows=config.text.vocab_size)
    return Qwen3VL(config, network_from_arrays(empty, arrays | lossy), raw.settings)


SUBJECTS = [("dense_tied", codec) for codec in NAMES] + [
    (name, codec) for name in ("dense", "moe") for codec in ("int8", "int4:32", "svd:rank=8")
]


@pytest.mark.parametrize(("name", "codec"), SUBJECTS)
def test_a_model_computes_what_it_would_with_decoded_weights(
    name: str, codec: str, located: Located
) -> None:
    raw = Qwen3VL.from_pretrained(located(name, "raw"))
    wanted, model = decoded_model(raw, codec), Qwen3VL.from_pretrained(located(name, codec))
    given = tiny.inputs("text")
    scores, expected = (np.asarray(each(**given)) for each in (model, wanted))
    # Inputs as words of 16 bits where the kernel multiplies codes; logits of size 5 to 18.
    np.testing.assert_allclose(scores, expected, atol=1e-3 * float(np.abs(expected).max()))
    assert np.abs(scores - np.asarray(raw(**given))).max() > 0


@pytest.mark.parametrize("codec", NAMES)
def test_weights_stay_encoded_in_memory(codec: str, located: Located) -> None:
    found, kept = Qwen3VL.from_pretrained(located("dense", codec)).parameters, parse_codec(codec)
    raw = Qwen3VL.from_pretrained(located("dense", "raw")).parameters
    assert found.keys() == raw.keys()
    for path, array in found.items():
        name = path.removesuffix(".0") if path.startswith(HEAD) else path
        assert isinstance(array, Encoded) == is_encoded(name, kept), path
        if isinstance(array, Encoded):
            packed = kept.encode(np.asarray(raw[path]))
            np.testing.assert_array_equal(np.asarray(array.packed), packed)
            assert (array.shape, array.nbytes) == (raw[path].shape, packed.nbytes)
            assert isinstance(array.format, PackedRows) == codec.startswith("int")
    assert sum(a.nbytes for a in found.values()) < sum(a.nbytes for a in raw.values())


@pytest.mark.parametrize("name", ["dense_tied", "moe"])
def test_what_is_encoded_while_it_is_loaded_is_what_a_store_has(
    name: str, located: Located
) -> None:
    made = Qwen3VL.from_pretrained(located(name, "raw"), codec="int4", vocab_blocks=3)
    stored = Qwen3VL.from_pretrained(located(name, "int4"), vocab_blocks=3)
    assert made.config == stored.config
    for path, array in stored.parameters.items():
        other = made.parameters[path]
        if isinstance(array, Encoded):
            assert isinstance(other, Encoded)
            assert (other.shape, other.format) == (array.shape, array.format)
            array, other = array.packed, other.packed
        np.testing.assert_array_equal(np.asarray(array), np.asarray(other))


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_encodes_while_loading_what_a_conversion_by_it_does(
    level: str, located: Located, tmp_path: Path
) -> None:
    source, store = located("dense_tied", "raw"), tmp_path / "store"
    assert convert(source, store, "--codec", "auto", "--level", level) == 0
    made = Qwen3VL.from_pretrained(source, level=level)
    assert made.config == Qwen3VL.from_pretrained(store).config
    rows = json.loads((store / "encoding_report.json").read_text())["arrays"]
    for path, array in made.parameters.items():
        row = rows.get(path.removesuffix(".0") if path.startswith(HEAD) else path)
        codec = "raw" if row is None else row["codec"]
        assert isinstance(array, Encoded) == (codec != "raw")
        if isinstance(array, Encoded):
            assert array.format == format_of(parse_codec(codec))
            assert array.nbytes == row["nbytes"]
    assert any(isinstance(a, Encoded) for a in made.parameters.values()) == (level != "minimal")
    stored = Qwen3VL.from_pretrained(store, level=level)  # which leaves it as it is
    given = tiny.inputs("text")
    np.testing.assert_array_equal(np.asarray(made(**given)), np.asarray(stored(**given)))


def test_an_encoded_store_is_computed_with_in_another_dtype(located: Located) -> None:
    model = Qwen3VL.from_pretrained(located("dense", "int8"), dtype="bfloat16")
    reference = Qwen3VL.from_pretrained(located("dense", "int8"))
    given = tiny.inputs("text")
    assert model.dtype == jnp.bfloat16
    scores, wanted = np.asarray(model(**given)), np.asarray(reference(**given))
    # Activations of 8 bits through four layers: a few hundredths of the largest logit.
    np.testing.assert_allclose(scores, wanted, atol=0.05 * float(np.abs(wanted).max()))


def machine_options(folder: Path, tiers: int) -> dict[str, Any]:
    """A machine with room on disk."""
    spill = folder / "spill"
    spill.mkdir()
    return {"machine": helper.machine_file(folder, tiers), "nvme_dir": spill}


def least(path: Path, given: dict[str, np.ndarray], **options: Any) -> int:
    """Bytes of device memory that just do, as refusals say it."""
    nbytes = 4096
    for _ in range(20):
        model = helper.planned(path, device_memory=nbytes, **options)
        try:
            helper.answers(model, given)
        except DoesNotFitError as refusal:
            nbytes = max(nbytes + 1, refusal.smallest["device"])
        else:
            return nbytes
        finally:
            model.close()
    raise AssertionError("each refusal was followed by another")


@pytest.mark.parametrize(
    ("name", "codec", "tiers"),
    [
        *itertools.product(("dense", "dense_tied", "moe"), ("int8", "int4:32"), (2,)),
        ("dense_tied", "int4:32", 3),
    ],
)
def test_plans_stream_what_is_packed_and_change_no_bit(
    name: str, codec: str, tiers: int, located: Located, tmp_path: Path
) -> None:
    path, given = located(name, codec), tiny.inputs("image")
    options = machine_options(tmp_path, tiers)
    wanted = helper.answers(Qwen3VL.from_pretrained(path), given)
    model = helper.planned(path, device_memory=least(path, given, **options), **options)
    try:
        found = helper.answers(model, given)
        runner = helper.runner_of(model)
        program = runner.plans["decode"].traced.program
        assert runner.executor.read_bytes > program.arrays[PROJECTION].nbytes
    finally:
        model.close()
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    raw = Qwen3VL.from_pretrained(located(name, "raw")).parameters[PROJECTION]
    shape, dtype = parse_codec(codec).packed(raw.shape, "float32")
    assert (program.arrays[PROJECTION].shape, program.arrays[PROJECTION].dtype) == (shape, dtype)


@pytest.mark.parametrize("codec", ["sparse:2:4", "svd:rank=8"])
def test_plans_of_other_codecs_answer_within_rounding(
    codec: str, located: Located, tmp_path: Path
) -> None:
    path, given = located("dense", codec), tiny.inputs("text")
    options = machine_options(tmp_path, 2)
    wanted = helper.answers(Qwen3VL.from_pretrained(path), given)
    model = helper.planned(path, device_memory=least(path, given, **options), **options)
    try:
        found = helper.answers(model, given)
    finally:
        model.close()
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(np.abs(other).max()))


def test_less_memory_is_enough_for_an_encoded_model(located: Located, tmp_path: Path) -> None:
    given, options = tiny.inputs("text"), machine_options(tmp_path, 2)
    needed = [least(located("dense", codec), given, **options) for codec in ("raw", "int4:32")]
    assert needed[1] < needed[0]


def test_a_forecast_names_the_codecs(located: Located, tmp_path: Path) -> None:
    config, encodings = described(located("dense_tied", "int4:32"))
    budgets = Budgets(machine=helper.machine_file(tmp_path, 2), device_memory="100MB")
    found = dry_run(config, Request(20, 7), budgets, dtype=None, encodings=encodings)
    codecs = {row["name"]: row["codec"] for row in found.data["arrays"]}
    assert {codecs[PROJECTION], codecs[f"{HEAD}.0"]} == {"int4:32"}
    assert codecs["language_model.norm.weight"] == "raw"
    heads = [name for name in codecs if name.startswith((HEAD, TABLE))]
    assert heads
    assert not any(name.startswith(TABLE) for name in heads)


def test_a_damaged_chunk_is_noticed_when_the_model_is_loaded(
    located: Located, tmp_path: Path
) -> None:
    store = encoded_store(located("dense", "raw"), tmp_path / "store", "int8")
    chunk = store / "arrays" / PROJECTION / "c.0.0"
    whole = chunk.read_bytes()
    chunk.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(WeightError, match=f"'{PROJECTION}' is damaged"):
        Qwen3VL.from_pretrained(store)


@pytest.mark.parametrize(
    ("codec", "options", "error", "says"),
    [
        ("raw", {"codec": "int8", "device_memory": "1GB"}, UsageError, "convert .* --codec"),
        ("int8", {"codec": "int8"}, UsageError, "is encoded already"),
        ("raw", {"codec": "int9"}, ProgramError, "codec 'int9' is unknown"),
        ("raw", {"level": "reckless"}, UsageError, "level 'reckless' is unknown; there is aggres"),
        ("raw", {"level": "balanced", "codec": "int8"}, UsageError, "both say what to encode"),
        (
            "raw",
            {"level": "balanced", "device_memory": "1GB"},
            UsageError,
            "add --nvme-dir, or make a store with scripts/convert.py --codec auto --level balanced",
        ),
    ],
)
def test_codecs_that_cannot_be_had_while_loading_are_refused(
    located: Located, codec: str, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as refused:
        Qwen3VL.from_pretrained(located("dense", codec), **options)
    assert "\n" not in str(refused.value)
