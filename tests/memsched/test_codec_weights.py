"""Fits in which some columns count more than others, of every codec that has them."""

import codec_layouts as layouts
import numpy as np
import pytest
from codec_layouts import DTYPES, draw

from memsched.codecs import CODECS, Fitted
from memsched.errors import CodecError, ProgramError

FITTED = {name: codec for name, codec in CODECS.items() if isinstance(codec, Fitted)}
SHAPES = ((1, 1), (2, 3), (5, 31), (17, 33), (37, 45), (16, 128), (3, 193), (70, 260), (300, 700))


def columns(kind: str, width: int) -> np.ndarray:
    """Weights of columns."""
    rng = np.random.default_rng(width)
    match kind:
        case "uneven":
            values = np.exp(rng.normal(0, 1, width))
        case "outliers":
            values = np.where(rng.random(width) < 0.02, 400, 1) * np.exp(rng.normal(0, 1, width))
        case "few":
            values = np.where(rng.random(width) < 0.1, 1, 0)
        case "all of float32":
            values = 10 ** rng.uniform(-44, 38, width)
        case _:
            values = np.full(width, 3.0)
    return values.astype(np.float32)


KINDS = ("uneven", "outliers", "few", "all of float32", "equal")


def loss(name: str, packed: np.ndarray, raw: np.ndarray, weights: np.ndarray) -> float:
    """Weighted squares of the errors, read from the layout."""
    wrong = layouts.read(name, packed, raw.shape) - raw.astype(np.float64)
    return float((np.square(wrong) * weights.astype(np.float64)).sum())


def test_int8_and_int4_of_every_kind_are_fitted() -> None:
    assert set(FITTED) == {name for name in CODECS if name.startswith("int")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FITTED)
def test_a_weighted_error_is_never_above_that_of_the_plain_fit(name: str, kind: str) -> None:
    codec = FITTED[name]
    for shape in SHAPES:
        for dtype in DTYPES:
            raw, weights = draw(shape, dtype), columns(kind, shape[1])
            fitted = codec.encode(raw, weights=weights)
            plain = loss(name, codec.encode(raw), raw, weights)
            assert loss(name, fitted, raw, weights) <= plain * (1 + 1e-5), (shape, dtype)


@pytest.mark.parametrize("scale", [2.0**-149, 1e-30, 1e30])
@pytest.mark.parametrize("name", FITTED)
def test_nor_is_it_with_numbers_of_any_size(name: str, scale: float) -> None:
    codec, weights = FITTED[name], columns("outliers", 260)
    sizes = np.exp(np.random.default_rng(0).normal(0, 3, (70, 260)))
    raw = np.clip(draw((70, 260)) * sizes * scale, -layouts.limit(name), layouts.limit(name))
    raw = raw.astype(np.float32)
    plain = loss(name, codec.encode(raw), raw, weights)
    assert loss(name, codec.encode(raw, weights=weights), raw, weights) <= plain * (1 + 1e-5)


@pytest.mark.parametrize("name", FITTED)
def test_with_a_few_heavy_columns_much_less_error_is_left(name: str) -> None:
    codec, raw, weights = FITTED[name], draw((70, 1024)), columns("outliers", 1024)
    plain = loss(name, codec.encode(raw), raw, weights)
    # 0.4 to 0.65 for int4, 0.8 for int8 in whole rows.
    assert loss(name, codec.encode(raw, weights=weights), raw, weights) < 0.9 * plain


@pytest.mark.parametrize("name", FITTED)
def test_the_only_column_of_a_group_that_counts_is_exact(name: str) -> None:
    codec, width = FITTED[name], 256
    raw = draw((40, width)) / 8
    weights = np.zeros(width, np.float32)
    heavy = np.arange(5, width, codec.group or width)
    weights[heavy] = 1e-20
    raw[:, heavy] = np.random.default_rng(1).uniform(0.5, 1, (40, len(heavy)))
    decoded = codec.decode(codec.encode(raw, weights=weights), raw.shape, "float32")
    # A float16 scale has 11 bits; a float32 one has 24.
    close = 2.0**-22 if name.startswith("int8") else 2.0**-10
    np.testing.assert_allclose(decoded[:, heavy], raw[:, heavy], rtol=close)


@pytest.mark.parametrize("name", FITTED)
def test_zeros_are_as_no_weights_at_all(name: str) -> None:
    codec = FITTED[name]
    for shape in SHAPES:
        raw = draw(shape)
        zeros = codec.encode(raw, weights=np.zeros(shape[1], np.float32))
        np.testing.assert_array_equal(zeros, codec.encode(raw))


@pytest.mark.parametrize("name", FITTED)
def test_a_group_without_weight_is_as_without_weights(name: str) -> None:
    codec, raw = FITTED[name], draw((20, 256))
    weights = columns("outliers", 256)
    weights[:128] = 0
    shape, dtype = raw.shape, "float32"
    fitted = codec.decode(codec.encode(raw, weights=weights), shape, dtype)
    plain = codec.decode(codec.encode(raw), shape, dtype)
    assert (fitted[:, 128:] != plain[:, 128:]).any()
    if codec.group:  # a whole row is one group
        np.testing.assert_array_equal(fitted[:, :128], plain[:, :128])


@pytest.mark.parametrize("name", FITTED)
def test_only_the_ratio_of_weights_counts(name: str) -> None:
    codec, raw, weights = FITTED[name], draw((20, 200)), columns("uneven", 200)
    fitted = codec.encode(raw, weights=weights)
    for factor in (2.0**-90, 2.0**90):
        scaled = codec.encode(raw, weights=weights * np.float32(factor))
        np.testing.assert_array_equal(scaled, fitted)


@pytest.mark.parametrize("name", FITTED)
def test_rows_are_fitted_each_for_itself(name: str) -> None:
    codec, raw, weights = FITTED[name], draw((300, 700)), columns("outliers", 700)
    whole = codec.encode(raw, weights=weights)
    for first, stop in ((0, 1), (93, 94), (90, 200), (299, 300)):
        part = codec.encode(raw[first:stop], weights=weights)
        np.testing.assert_array_equal(part, whole[first:stop])


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", FITTED)
def test_weights_that_are_no_squares_are_refused_by_name(name: str, wrong: float) -> None:
    weights = np.ones(40, np.float32)
    weights[[3, 39]] = wrong
    with pytest.raises(CodecError) as refused:
        FITTED[name].encode(draw((2, 40)), "layers.0.weight", weights=weights)
    assert str(refused.value) == (
        "layers.0.weight: 2 of 40 weights of its columns are negative, infinite or NaN; "
        f"codec {name} needs finite numbers from 0: measure them again, or leave them out"
    )


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        (np.ones(39, np.float32), r"float32 \[39\]"),
        (np.ones((1, 40), np.float32), r"float32 \[1, 40\]"),
        (np.ones(40), r"float64 \[40\]"),
    ],
)
@pytest.mark.parametrize("name", FITTED)
def test_weights_of_another_form_are_refused(name: str, weights: np.ndarray, found: str) -> None:
    says = rf"^array: codec {name} takes float32 \[40\] as weights of its columns, not {found}$"
    with pytest.raises(ProgramError, match=says):
        FITTED[name].encode(draw((2, 40)), weights=weights)
