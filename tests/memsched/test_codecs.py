"""Every codec: sizes, layouts, bounds, parts, memory. A new entry is tested unasked."""

import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import codec_layouts as layouts
import ml_dtypes
import numpy as np
import pytest
from codec_layouts import DTYPES, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from memsched.codecs import CODECS, BlockSparse, Codec

# (out, in): one number, less than a four, a half byte, a block and a group and one more of each.
SHAPES = ((1, 1), (2, 3), (5, 31), (16, 16), (17, 33), (37, 45), (16, 128), (3, 193), (70, 260))
LOSSY = tuple(name for name in CODECS if name != "raw")
OF_MATRICES = tuple(n for n in CODECS if n.startswith(("svd", "sparse:block")))
OF_ROWS = tuple(n for n in CODECS if n not in OF_MATRICES)
CUT = tuple(name for name, codec in CODECS.items() if codec.cut)


def there_and_back(codec: Codec, array: np.ndarray) -> np.ndarray:
    return codec.decode(codec.encode(array), array.shape, array.dtype.name)


def assert_within_bound(codec: Codec, array: np.ndarray, decoded: np.ndarray) -> None:
    """The contract of `Codec.bound` and `Codec.floor`, row by row or block by block."""
    rows = codec.cut or len(array)
    for start in range(0, len(array), rows):
        exact = array[start : start + rows].astype(np.float64)
        wrong = decoded[start : start + rows].astype(np.float64) - exact
        root_mean_square = math.sqrt(np.square(wrong).mean())
        assert root_mean_square <= codec.bound * np.abs(exact).max() + codec.floor


def with_peak(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, int]:
    """What a call returns, and the most bytes that it held."""
    tracemalloc.start()
    try:
        result = call()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- sizes and layouts ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_an_encoding_has_the_size_and_shape_that_were_announced(name: str, dtype: str) -> None:
    codec = CODECS[name]
    for shape in SHAPES:
        packed = codec.encode(draw(shape, dtype))
        assert (packed.shape, packed.dtype.name) == codec.packed(shape, dtype)
        expected = layouts.size(name, *shape, np.dtype(DTYPES[dtype]).itemsize)
        assert packed.nbytes == codec.nbytes(shape, dtype) == expected


@pytest.mark.parametrize("name", CODECS)
def test_a_size_of_an_array_that_no_memory_holds_is_known(name: str) -> None:
    outputs, width = 1 << 24, 1 << 25
    assert CODECS[name].nbytes((outputs, width), "float32") == layouts.size(name, outputs, width, 4)


@pytest.mark.parametrize("name", CODECS)
def test_decoded_numbers_are_those_that_the_layout_means(name: str) -> None:
    codec = CODECS[name]
    for shape in SHAPES:
        packed = codec.encode(draw(shape))
        decoded = codec.decode(packed, shape, "float32")
        meant = layouts.read(name, packed, shape)
        if name.startswith("svd"):  # a sum of products in float32
            close = 1e-6 * layouts.magnitude(name, packed, shape).max()
            np.testing.assert_allclose(decoded, meant, rtol=0, atol=close)
        else:
            np.testing.assert_array_equal(decoded, meant.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_decoding_rounds_to_the_dtype_of_the_array(name: str, dtype: str) -> None:
    codec = CODECS[name]
    raw = draw((37, 45), dtype)
    packed = codec.encode(raw)
    decoded = codec.decode(packed, raw.shape, dtype)
    assert (decoded.shape, decoded.dtype) == (raw.shape, raw.dtype)
    if name != "raw":
        wide = codec.decode(packed, raw.shape, "float32")
        np.testing.assert_array_equal(decoded, wide.astype(raw.dtype))


@pytest.mark.parametrize("name", LOSSY)
def test_what_matters_is_the_numbers_and_not_their_dtype_or_their_strides(name: str) -> None:
    codec = CODECS[name]
    numbers = np.random.default_rng(0).integers(-100, 100, (35, 70)) / 16  # exact in 8 bits
    expected = codec.encode(numbers.astype(np.float32))
    for dtype in DTYPES.values():
        np.testing.assert_array_equal(codec.encode(numbers.astype(dtype)), expected)
    strided = np.repeat(numbers.T.astype(np.float32), 2, axis=1).T[::2]
    assert not strided.flags.c_contiguous
    np.testing.assert_array_equal(codec.encode(strided), expected)


@pytest.mark.parametrize("name", CODECS)
def test_neither_the_array_nor_the_encoding_is_written_to(name: str) -> None:
    codec = CODECS[name]
    raw = draw((20, 40))
    raw.setflags(write=False)
    packed = codec.encode(raw)
    packed.setflags(write=False)
    before = packed.tobytes()
    codec.decode(packed, raw.shape, "float32")
    np.testing.assert_array_equal(raw, draw((20, 40)))
    assert packed.tobytes() == before == codec.encode(raw).tobytes()


# ---- there and back ----


@pytest.mark.parametrize("name", CODECS)
def test_the_error_is_within_the_bound_for_matrices_that_are_hard_to_store(name: str) -> None:
    codec = CODECS[name]
    for what, array in layouts.matrices(name).items():
        decoded = there_and_back(codec, array)
        assert np.isfinite(decoded).all(), what
        assert_within_bound(codec, array, decoded)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=25)
@given(data=st.data())
def test_the_error_is_within_the_bound_for_any_finite_matrix(
    name: str, data: st.DataObject
) -> None:
    codec = CODECS[name]
    numbers = st.floats(-layouts.limit(name), layouts.limit(name), width=32, allow_subnormal=True)
    shape = data.draw(st.tuples(st.integers(1, 18), st.integers(1, 70)))
    array = data.draw(arrays.arrays(np.float32, shape, elements=numbers))
    decoded = there_and_back(codec, array)
    assert np.isfinite(decoded).all()
    assert_within_bound(codec, array, decoded)


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zeros(name: str) -> None:
    for shape in SHAPES:
        assert not there_and_back(CODECS[name], np.zeros(shape, np.float32)).any()


@pytest.mark.parametrize("name", ["raw", "fp16", "bf16", "sparse:2:4", "sparse:block=0.5"])
def test_what_has_been_decoded_once_is_kept_as_it_is(name: str) -> None:
    for array in layouts.matrices(name).values():
        once = there_and_back(CODECS[name], array)
        np.testing.assert_array_equal(there_and_back(CODECS[name], once), once)


@pytest.mark.parametrize("name", [n for n in CODECS if n.startswith("int")])
def test_numbers_on_a_grid_come_back(name: str) -> None:
    lowest, highest = {"int8": (-127, 127), "int4": (-8, 7)}[name[:4]]
    codes = np.random.default_rng(0).integers(lowest, highest, (9, 256), endpoint=True)
    codes[:, ::32], codes[:, 1::32] = lowest, highest
    array = (codes * 2.0**-5).astype(np.float32)
    # Sums over a group in float32 leave a scale uncertain by some units in its last place.
    np.testing.assert_allclose(there_and_back(CODECS[name], array), array, rtol=0, atol=1e-4)


def test_raw_keeps_every_bit_of_anything() -> None:
    odd = np.array([np.nan, -np.inf, -0.0, 1e-45], np.float32)
    for array in (odd, np.arange(6).reshape(2, 3), np.array(True), np.empty((0, 3), np.int8)):
        back = there_and_back(CODECS["raw"], array)
        assert (back.tobytes(), back.dtype, back.shape) == (
            array.tobytes(),
            array.dtype,
            array.shape,
        )


def test_two_of_four_keeps_the_two_largest() -> None:
    row = np.array([[1, -5, 2, 4, 0, 0, 0, 3, 2, 2, 2, 2, -7]], np.float32)
    kept = np.array([[0, -5, 0, 4, 0, 0, 0, 3, 2, 2, 0, 0, -7]], np.float32)
    np.testing.assert_array_equal(there_and_back(CODECS["sparse:2:4"], row), kept)
    codes = CODECS["sparse:2:4"].encode(row)[0, -2:]  # positions 1 3, 0 3, 0 1 and 0 1, ascending
    assert codes.tolist() == [0b1100_1101, 0b0100_0100]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_of_blocks_those_with_the_most_energy_are_kept(share: float) -> None:
    raw = draw((40, 75)) * np.exp(draw((40, 75), seed=1))
    decoded = there_and_back(BlockSparse(share), raw)
    for top in range(0, 40, 16):
        lefts = range(0, 75, 16)
        energies = [float(np.square(raw[top : top + 16, at : at + 16]).sum()) for at in lefts]
        largest = sorted(energies)[-math.ceil(share * len(energies)) :]
        for left, energy in zip(lefts, energies, strict=True):
            block = (slice(top, top + 16), slice(left, left + 16))
            expected = raw[block] if energy in largest else np.zeros_like(raw[block])
            np.testing.assert_array_equal(decoded[block], expected.astype(ml_dtypes.bfloat16))


# ---- parts, leading axes, memory ----


@pytest.mark.parametrize("width", [1, 33, 127, 128, 260, 9000])
@pytest.mark.parametrize("name", CUT)
def test_rows_that_are_encoded_alone_are_the_same_bytes(name: str, width: int) -> None:
    codec = CODECS[name]
    assert codec.cut
    raw = draw((3 * codec.cut + 5, width))
    whole = codec.encode(raw)
    for start, stop in ((0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (3, 4)):
        rows = raw[start * codec.cut : stop * codec.cut]
        np.testing.assert_array_equal(codec.encode(rows), whole[start:stop])
    np.testing.assert_array_equal(codec.encode(raw[2 * codec.cut :]), whole[2:])


@pytest.mark.parametrize("name", CUT)
@settings(max_examples=10)
@given(data=st.data())
def test_encodings_of_parts_are_parts_of_the_encoding(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]
    cut = codec.cut or 1
    count, width = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 300))
    raw = draw((count, width), seed=count)
    at = data.draw(st.integers(0, (count - 1) // cut)) * cut
    parts = [codec.encode(part) for part in (raw[:at], raw[at:]) if len(part)]
    np.testing.assert_array_equal(np.concatenate(parts), codec.encode(raw))


@pytest.mark.parametrize("name", OF_ROWS)
def test_a_cache_is_encoded_for_each_head_and_token(name: str) -> None:
    codec, cache = CODECS[name], draw((2, 3, 5, 80), "bfloat16")
    packed = codec.encode(cache)
    assert (packed.shape, packed.dtype.name) == codec.packed(cache.shape, "bfloat16")
    assert packed.shape[:-1] == (2, 3, 5)
    decoded = codec.decode(packed, cache.shape, "bfloat16")
    for place in np.ndindex(2, 3, 5):
        np.testing.assert_array_equal(packed[place], codec.encode(cache[place]))
        alone = codec.decode(packed[place], (80,), "bfloat16")
        np.testing.assert_array_equal(decoded[place], alone)


def test_a_cache_in_int8_has_one_scale_for_a_head_and_token() -> None:
    assert CODECS["int8"].nbytes((2, 3, 5, 80), "bfloat16") == 2 * 3 * 5 * (80 + 4)


@pytest.mark.parametrize("name", OF_ROWS)
def test_no_rows_are_no_bytes(name: str) -> None:
    codec, none = CODECS[name], np.zeros((2, 0, 5), np.float32)
    packed = codec.encode(none)
    assert packed.nbytes == codec.nbytes(none.shape, "float32") == 0
    assert codec.decode(packed, none.shape, "float32").shape == none.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOSSY)
def test_encoding_and_decoding_take_little_memory_beside_their_result(
    name: str, dtype: str
) -> None:
    codec, outputs = CODECS[name], 320 if name.startswith("svd") else 1024
    raw = draw((outputs, 1536), dtype)
    codec.encode(raw[:32, :32])  # loads what it needs
    small = 3 << 20  # some blocks of 65,536 numbers
    if name.startswith("svd"):  # the square of the smaller side, and its vectors
        small = (1 << 20) + 4 * outputs * (outputs + layouts.rank(name, outputs, 1536))
    packed, encoding = with_peak(lambda: codec.encode(raw))
    assert encoding <= packed.nbytes + small
    if dtype == "float32":
        assert encoding <= 2 * raw.nbytes
    decoded, decoding = with_peak(lambda: codec.decode(packed, raw.shape, dtype))
    assert decoding <= decoded.nbytes + (3 << 20)


def test_sizes_and_encodings_need_neither_jax_nor_scipy() -> None:
    code = (
        "import sys, numpy, memsched.codecs as m\n"
        "for c in m.CODECS.values(): c.nbytes((3, 5), 'bfloat16')\n"
        "for name in ('bf16', 'int8', 'int4:32', 'sparse:2:4', 'sparse:block=0.5'):\n"
        "    c = m.parse_codec(name)\n"
        "    c.decode(c.encode(numpy.ones((3, 5), 'f')), (3, 5), 'float32')\n"
        "print(*{'jax', 'scipy'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
