"""How large the errors are, against those of rounding to the nearest and of the best there is.

The references are written here in plain NumPy: rounding to nearest as torchao and bitsandbytes do,
bitsandbytes' NF4, the singular value decomposition in float64.
"""

import math
from collections.abc import Callable, Mapping

import codec_layouts as layouts
import numpy as np
import pytest
from codec_layouts import draw

from memsched.codecs import CODECS, Svd, rank_for_energy, relative_error
from memsched.errors import CodecError, ProgramError

GROUPED = tuple(name for name in CODECS if name.startswith("int"))
Reference = Callable[[np.ndarray], np.ndarray]
KINDS = ("normal", "heavy tails", "offset", "uniform", "rows of many sizes", "outliers")
# The 16 points of NF4: quantiles of normal numbers. Source: QLoRA, arXiv:2305.14314, appendix E.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
NF4_GROUP = 64


def data(name: str) -> np.ndarray:
    generator = np.random.default_rng(0)
    shape = (96, 384)
    match name:
        case "normal":
            drawn = generator.standard_normal(shape)
        case "heavy tails":
            drawn = generator.standard_t(3, shape)
        case "offset":
            drawn = generator.standard_normal(shape) + 3
        case "uniform":
            drawn = generator.uniform(-1, 1, shape)
        case "rows of many sizes":
            drawn = generator.standard_normal(shape) * np.logspace(-4, 4, 96)[:, None]
        case _:
            drawn = np.where(generator.random(shape) < 0.01, 50, 1) * generator.standard_normal(
                shape
            )
    return drawn.astype(np.float32)


def symmetric(points: float, low: int, high: int, stored: type) -> Reference:
    """The largest magnitude of a group is `points` steps away from zero."""

    def rounded(groups: np.ndarray) -> np.ndarray:
        scale = (np.abs(groups).max(axis=1, keepdims=True) / points).astype(stored)
        scale = scale.astype(np.float32)
        return np.clip(np.rint(groups / scale), low, high) * scale

    return rounded


def from_minimum(groups: np.ndarray) -> np.ndarray:
    """16 points from the smallest to the largest of a group, both terms in float16."""
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    scale = ((high - low) / 15).astype(np.float16).astype(np.float32)
    low = low.astype(np.float16).astype(np.float32)
    return np.clip(np.rint((groups - low) / scale), 0, 15) * scale + low


def references(name: str) -> Mapping[str, Reference]:
    """Ways to round that store as many bytes."""
    if name.startswith("int8"):
        return {"absmax / 127": symmetric(127, -127, 127, np.float32)}
    if name.endswith("zero"):
        return {"minimum and maximum": from_minimum}
    return {f"absmax / {points}": symmetric(points, -8, 7, np.float16) for points in (7, 7.5, 8)}


def groups_of(name: str, array: np.ndarray) -> np.ndarray:
    """One group a row; the rows of `data` are whole groups."""
    size = next((int(part) for part in name.split(":")[1:] if part.isdigit()), array.shape[1])
    return array.reshape(-1, size)


def decoded(name: str, array: np.ndarray) -> np.ndarray:
    codec = CODECS[name]
    return codec.decode(codec.encode(array), array.shape, "float32")


def squares(wrong: np.ndarray) -> np.ndarray:
    """Sums of squares of rows."""
    return np.square(wrong.astype(np.float64)).sum(axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GROUPED)
def test_the_error_is_no_larger_than_that_of_rounding_to_the_nearest(name: str, kind: str) -> None:
    array = data(kind)
    groups = groups_of(name, array)
    ours = squares(decoded(name, array).reshape(groups.shape) - groups)
    for what, reference in references(name).items():
        theirs = squares(reference(groups) - groups)
        assert ours.sum() <= theirs.sum(), what


def nf4(groups: np.ndarray) -> np.ndarray:
    """The nearest of the 16 points, times the largest magnitude of a group, a float32."""
    scale = np.abs(groups).max(axis=1, keepdims=True)
    return NF4[np.abs((groups / scale)[:, :, None] - NF4).argmin(axis=2)] * scale


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("int4:64:zero", kind) for kind in KINDS),
        # On heavy tails 0.1235 against 0.1215: one of 32 numbers is far from all others.
        *(("int4:32", kind) for kind in KINDS if kind != "heavy tails"),
    ],
)
def test_the_error_is_no_larger_than_that_of_nf4_in_as_many_bytes(name: str, kind: str) -> None:
    array = data(kind)
    assert CODECS[name].nbytes(array.shape, "float32") == array.size * (1 / 2 + 4 / NF4_GROUP)
    groups = array.reshape(-1, NF4_GROUP)
    ours = squares(decoded(name, array).reshape(groups.shape) - groups)
    assert ours.sum() <= squares(nf4(groups) - groups).sum()


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
@pytest.mark.parametrize("name", GROUPED)
def test_no_group_is_worse_than_on_the_usual_grid(name: str, kind: str) -> None:
    groups = groups_of(name, data(kind))
    ours = squares(decoded(name, data(kind)).reshape(groups.shape) - groups)
    usual = next(iter(references(name).values()))
    # Scales are rounded after they were chosen, and a number at a midpoint may turn with them.
    assert np.all(ours <= 1.005 * squares(usual(groups) - groups))


@pytest.mark.parametrize(
    ("name", "near"),
    [("int8", 1.03), ("int8:64", 1.15), ("int8:128", 1.1), ("int4:32", 1.01), ("int4:64", 1.01)],
)
def test_the_error_is_near_that_of_the_best_scales_there_are(name: str, near: float) -> None:
    """The best of 700 for each group. With 8 bits, as many would be needed to find them."""
    groups = groups_of(name, data("normal"))
    low, high = (-127, 127) if name.startswith("int8") else (-8, 7)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    best = np.full(len(groups), np.inf)
    for reach in np.linspace(0.5, 1.2, 700, dtype=np.float32):
        scale = peak * reach / np.float32(low)
        wrong = np.clip(np.rint(groups / scale), low, high) * scale - groups
        best = np.minimum(best, squares(wrong))
    ours = squares(decoded(name, data("normal")).reshape(groups.shape) - groups)
    assert ours.sum() <= near * best.sum()


# ---- the reported error ----


@pytest.mark.parametrize("name", CODECS)
def test_the_reported_error_is_that_of_all_numbers_at_once(name: str) -> None:
    array = draw((500, 300))  # three blocks
    codec = CODECS[name]
    back = codec.decode(codec.encode(array), array.shape, "float32").astype(np.float64)
    expected = np.linalg.norm(back - array) / np.linalg.norm(array.astype(np.float64))
    assert relative_error(array, codec) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", layouts.DTYPES)
def test_the_reported_error_of_a_matrix_that_was_worked_out_by_hand(dtype: str) -> None:
    matrix = np.array([[1, 3, 1, 1], [2, 0, 2, 1]]).astype(layouts.DTYPES[dtype])
    # Of the squares 1 9 1 1 and 4 0 4 1, the last two and the last are lost: 3 of 21.
    assert relative_error(matrix, CODECS["sparse:2:4"]) == pytest.approx(math.sqrt(3 / 21))


@pytest.mark.parametrize("name", CODECS)
def test_nothing_is_lost_of_zeros_and_of_nothing(name: str) -> None:
    assert relative_error(np.zeros((20, 20), np.float32), CODECS[name]) == 0
    if not name.startswith(("svd", "sparse:block")):
        assert relative_error(np.zeros((2, 0, 5), np.float32), CODECS[name]) == 0


@pytest.mark.parametrize("name", ["raw", "fp16", "bf16"])
def test_one_number_and_no_axis_have_an_error(name: str) -> None:
    assert relative_error(np.array(0.1, np.float32), CODECS[name]) <= CODECS[name].bound
    assert relative_error(np.zeros((3, 0), np.float32), CODECS[name]) == 0


def test_raw_has_no_error_whatever_it_holds() -> None:
    odd = np.array([np.nan, np.inf], np.float32)
    assert relative_error(odd, CODECS["raw"]) == 0
    assert relative_error(np.arange(3), CODECS["raw"]) == 0


@pytest.mark.parametrize("name", ["svd:rank=64", "sparse:block=0.5"])
def test_an_array_that_cannot_be_encoded_has_no_error(name: str) -> None:
    with pytest.raises(ProgramError, match="is no matrix"):
        relative_error(np.ones((2, 3, 4), np.float32), CODECS[name])
    with pytest.raises(CodecError, match=r"^w: 1 NaN"):
        relative_error(np.array([[np.nan, 1]], np.float32), CODECS[name], "w")


def test_leading_axes_do_not_matter() -> None:
    cache = draw((2, 3, 50, 64))
    assert relative_error(cache, CODECS["int8"]) == relative_error(
        cache.reshape(-1, 64), CODECS["int8"]
    )


# ---- svd ----


def with_spectrum(outputs: int, width: int, values: np.ndarray) -> np.ndarray:
    """A matrix with these singular values."""
    left, _ = np.linalg.qr(draw((outputs, len(values)), seed=1).astype(np.float64))
    right, _ = np.linalg.qr(draw((width, len(values)), seed=2).astype(np.float64))
    return (left * values @ right.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (64, 64), (300, 20), (1, 9)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_no_matrix_of_this_rank_is_nearer(rank: int, shape: tuple[int, int]) -> None:
    array = draw(shape) * np.float32(1e-3)
    values = np.linalg.svd(array.astype(np.float64), compute_uv=False)
    best = math.sqrt(np.square(values[rank:]).sum() / np.square(values).sum())
    error = relative_error(array, Svd(rank=rank))
    # Two factors in bfloat16, each off by at most 2^-9 of a number: this much beside the rank.
    assert best * (1 - 1e-6) <= error <= math.hypot(best, 2.0**-8)


@pytest.mark.parametrize("shape", [(80, 50), (50, 80)])
def test_the_rank_follows_from_the_energy(shape: tuple[int, int]) -> None:
    values = 2.0 ** -np.arange(10)
    array = with_spectrum(*shape, values)
    shares = np.cumsum(values**2) / (values**2).sum()
    for rank in range(1, 7):
        assert rank_for_energy(array, float(shares[rank - 1]) - 1e-5) == rank
        assert rank_for_energy(array, float(shares[rank - 1]) + 1e-5) == rank + 1
    error = relative_error(array, Svd(rank=rank_for_energy(array, 0.99)))
    assert error <= math.sqrt(1 - 0.99)


def test_a_matrix_of_low_rank_loses_only_what_rounding_takes() -> None:
    array = with_spectrum(70, 40, np.array([3.0, 2.0, 1.0]))
    assert rank_for_energy(array, 0.99999) == 3
    assert relative_error(array, Svd(rank=3)) <= 2.0**-8
    assert relative_error(array, Svd(rank=30)) <= 2.0**-8


def test_zeros_have_rank_one() -> None:
    assert rank_for_energy(np.zeros((3, 4), np.float32), 1.0) == 1


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan])
def test_a_share_of_energy_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ProgramError, match=r"^w: a share of energy is above 0 and at most 1"):
        rank_for_energy(draw((3, 4)), share, "w")


def test_the_rank_of_what_is_no_finite_matrix_is_refused() -> None:
    with pytest.raises(ProgramError, match="is no matrix"):
        rank_for_energy(draw((3,)), 0.5)
    with pytest.raises(CodecError, match=r"^w: 0 NaN and 1 infinite"):
        rank_for_energy(np.array([[np.inf, 1]], np.float32), 0.5, "w")
