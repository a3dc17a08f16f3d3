"""Which names are codecs, and which arrays a codec refuses."""

import codec_layouts as layouts
import numpy as np
import pytest
from codec_layouts import DTYPES, draw

from memsched.codecs import CODECS, BlockSparse, Codec, Svd, parse_codec
from memsched.errors import CodecError, ProgramError

LOSSY = tuple(name for name in CODECS if name != "raw")
LIMITED = tuple(n for n in LOSSY if layouts.limit(n) < float(np.finfo(np.float32).max))
OF_MATRICES = tuple(n for n in CODECS if n.startswith(("svd", "sparse:block")))
OF_NUMBERS = ("raw", "fp16", "bf16")  # these take any shape


# ---- names ----


@pytest.mark.parametrize("name", CODECS)
def test_a_name_means_its_entry_and_an_entry_says_its_name(name: str) -> None:
    codec = parse_codec(name)
    assert codec is CODECS[name]
    assert codec.name == name
    assert isinstance(codec, Codec)
    assert hash(codec) == hash(parse_codec(name))


@pytest.mark.parametrize(
    ("text", "codec", "name"),
    [
        ("svd:rank=7", Svd(rank=7), "svd:rank=7"),
        ("svd:rank=64", Svd(rank=64), "svd:rank=64"),
        ("svd:fraction=1", Svd(fraction=1.0), "svd:fraction=1.0"),
        ("svd:fraction=1e-3", Svd(fraction=0.001), "svd:fraction=0.001"),
        ("sparse:block=0.125", BlockSparse(0.125), "sparse:block=0.125"),
    ],
)
def test_a_number_in_a_name_may_vary(text: str, codec: Codec, name: str) -> None:
    assert parse_codec(text) == codec
    assert codec.name == name
    assert parse_codec(name) == codec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int9", r"codec 'int9' is unknown; did you mean 'int8'\? All: raw, fp16, bf16, int8"),
        ("", "codec '' is unknown"),
        ("INT8", "codec 'INT8' is unknown"),
        ("int4", "codec 'int4' is unknown; did you mean 'int4:32'"),
        ("int8=64", "codec 'int8=64' is unknown"),
        ("svd:rank", "codec 'svd:rank' is unknown; did you mean 'svd:rank=64'"),
        ("svd:rank=0", "'svd:rank=0': a rank is a whole number from 1, not '0'"),
        ("svd:rank=-3", "a rank is a whole number from 1, not '-3'"),
        ("svd:rank=2.5", "a rank is a whole number from 1, not '2.5'"),
        ("svd:rank=٣", "a rank is a whole number from 1"),
        ("svd:rank=99999999999", "a rank is a whole number from 1"),
        ("svd:fraction=", "a share is above 0 and at most 1, not ''"),
        ("svd:fraction=0", "a share is above 0 and at most 1, not '0'"),
        ("sparse:block=1.01", "a share is above 0 and at most 1, not '1.01'"),
        ("sparse:block=nan", "a share is above 0 and at most 1, not 'nan'"),
        ("sparse:block=half", "a share is above 0 and at most 1, not 'half'"),
    ],
)
def test_another_name_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ProgramError, match=says) as refused:
        parse_codec(text)
    assert "\n" not in str(refused.value)


# ---- refusals ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSY)
def test_not_a_number_and_infinity_are_refused_by_name(name: str, dtype: str) -> None:
    codec, raw = CODECS[name], draw((700, 200), dtype)
    raw[699, 199], raw[698, 0] = np.nan, -np.inf
    with pytest.raises(CodecError) as refused:
        codec.encode(raw, "layers.0.weight")
    assert str(refused.value) == (
        "layers.0.weight: 1 NaN and 1 infinite numbers in one block of rows; "
        f"codec {name} needs finite numbers: mend them, or leave the array raw"
    )


@pytest.mark.parametrize("name", LIMITED)
def test_what_a_codec_cannot_reach_is_refused_by_name(name: str) -> None:
    codec, limit = CODECS[name], np.float32(layouts.limit(name))
    near = 2.0**-7 if name.startswith("svd") else 0  # two factors in bfloat16
    largest = np.full((2, 40), limit)
    decoded = codec.decode(codec.encode(largest), largest.shape, "float32")
    np.testing.assert_allclose(decoded, largest, rtol=near)
    beyond = np.zeros((2, 40), np.float32)
    beyond[1, 39] = -np.nextafter(limit, np.float32(np.inf))
    with pytest.raises(
        CodecError, match=r"^norm: a number of magnitude .*reaches .*use bf16, int8"
    ):
        codec.encode(beyond, "norm")


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int8, np.complex64, bool])
@pytest.mark.parametrize("name", LOSSY)
def test_other_dtypes_are_refused_by_name(name: str, dtype: type) -> None:
    says = f"^ids: codec {name} takes bfloat16, float16, float32, not {np.dtype(dtype).name}$"
    with pytest.raises(ProgramError, match=says):
        CODECS[name].encode(np.zeros((2, 40), dtype), "ids")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
@pytest.mark.parametrize("name", [n for n in CODECS if n not in OF_NUMBERS])
def test_arrays_without_rows_are_refused(name: str, shape: tuple[int, ...]) -> None:
    for call in (
        lambda: CODECS[name].nbytes(shape, "float32"),
        lambda: CODECS[name].encode(np.zeros(shape, np.float32)),
    ):
        with pytest.raises(ProgramError, match=f"codec {name}: shape .*; it needs"):
            call()


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (0, 40)])
@pytest.mark.parametrize("name", OF_MATRICES)
def test_codecs_of_matrices_refuse_other_arrays(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ProgramError, match=f"codec {name}: shape .* is no matrix"):
        CODECS[name].encode(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,)])
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_codecs_of_numbers_take_any_shape(name: str, shape: tuple[int, ...]) -> None:
    codec, ones = CODECS[name], np.ones(shape, np.float32)
    packed = codec.encode(ones)
    np.testing.assert_array_equal(codec.decode(packed, shape, "float32"), ones)
    assert codec.nbytes(shape, "float32") == packed.nbytes
