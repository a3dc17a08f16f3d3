"""What the layouts of memsched.codecs say, read byte by byte, and matrices that are hard to store.

Nothing here is shared with the codecs: a change of layout has to be made here a second time.
"""

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SIDE = 16  # of the blocks of sparse:block
# What float16 terms and float32 sums can reach; the other codecs reach all of float32.
LIMITS = {"fp16": 65504.0, "int4": 7 * 65504.0, "int4:zero": 65504.0, "svd": 2.0**100}


def draw(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values.astype(DTYPES[dtype])


def ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def limit(name: str) -> float:
    """The largest number that the codec takes."""
    kind = name.partition(":")[0] + (":zero" if name.endswith("zero") else "")
    return LIMITS.get(kind, float(np.finfo(np.float32).max))


def size(name: str, outputs: int, width: int, itemsize: int) -> int:
    """Bytes of a matrix, counted from its parts."""
    match name.split(":"):
        case ["raw"]:
            return outputs * width * itemsize
        case ["fp16" | "bf16"]:
            return outputs * width * 2
        case ["int8", *group]:
            return outputs * (width + 4 * ceil(width, int(group[0]) if group else width))
        case ["int4", group]:
            return outputs * (ceil(width, 2) + 2 * ceil(width, int(group)))
        case ["int4", group, "zero"]:
            return outputs * (ceil(width, 2) + 4 * ceil(width, int(group)))
        case ["svd", _]:
            return rank(name, outputs, width) * 2 * (outputs + width)
        case ["sparse", "2", "4"]:
            return outputs * (2 * 2 * ceil(width, 4) + ceil(ceil(width, 4), 2))
        case ["sparse", _]:
            blocks = ceil(width, SIDE)
            kept = math.ceil(blocks * value(name))
            return ceil(outputs, SIDE) * (ceil(blocks, 8) + kept * SIDE * SIDE * 2)
    raise AssertionError(f"the layout of {name} is not written down in this file")


def value(name: str) -> float:
    """The number at the end of a name."""
    return float(name.partition("=")[2])


def rank(name: str, outputs: int, width: int) -> int:
    side = min(outputs, width)
    wanted = value(name) if "rank" in name else math.ceil(side * value(name))
    return min(int(wanted), side)


def read(name: str, packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The float64 matrix that is meant."""
    outputs, width = shape
    if name in ("raw", "fp16", "bf16"):
        return packed.astype(np.float64)
    lines = [line.tobytes() for line in packed]
    match name.split(":"):
        case ["int8", *group]:
            numbers = [_int8(line, width, int(group[0]) if group else width) for line in lines]
        case ["int4", group, *zero]:
            numbers = [_int4(line, width, int(group), bool(zero)) for line in lines]
        case ["sparse", "2", "4"]:
            numbers = [_two_of_four(line, width) for line in lines]
        case ["svd", _]:
            right, left = factors(packed, shape)
            return left.T @ right
        case ["sparse", _]:
            return np.concatenate([_blocks(line, width) for line in lines])[:outputs]
        case _:
            raise AssertionError(f"the layout of {name} is not written down in this file")
    return np.array(numbers, np.float64).reshape(shape)


def factors(packed: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The right [rank, in] and the left [rank, out] vectors of an svd."""
    both = np.array([_bfloat16(line.tobytes()) for line in packed])
    return both[:, : shape[1]], both[:, shape[1] :]


def magnitude(name: str, packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The sum of the magnitudes of what each number of the matrix is the sum of."""
    if name.startswith("svd"):
        right, left = factors(packed, shape)
        return np.abs(left).T @ np.abs(right)
    return np.abs(read(name, packed, shape))


def _bfloat16(data: bytes) -> np.ndarray:
    """bfloat16 is the upper half of float32."""
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)


def _int8(line: bytes, width: int, group: int) -> list[float]:
    codes, scales = np.frombuffer(line[:width], "i1"), np.frombuffer(line[width:], "<f4")
    return [float(code) * float(scales[at // group]) for at, code in enumerate(codes)]


def _int4(line: bytes, width: int, group: int, zero: bool) -> list[float]:
    codes: list[int] = []
    for start in range(0, width, 32):
        half = ceil(min(32, width - start), 2)
        run = line[start // 2 : start // 2 + half]
        codes += [byte % 16 for byte in run] + [byte // 16 for byte in run]
        del codes[width:]
    terms = np.frombuffer(line[ceil(width, 2) :], "<f2").astype(np.float64).tolist()
    if zero:
        pairs = [(terms[2 * (at // group)], terms[2 * (at // group) + 1]) for at in range(width)]
        return [code * scale + minimum for code, (scale, minimum) in zip(codes, pairs, strict=True)]
    return [(code - 8) * terms[at // group] for at, code in enumerate(codes)]


def _two_of_four(line: bytes, width: int) -> list[float]:
    fours = ceil(width, 4)
    kept, codes = _bfloat16(line[: 4 * fours]), line[4 * fours :]
    row = [0.0] * (4 * fours)
    for four in range(fours):
        code = codes[four // 2] // 16 ** (four % 2) % 16
        row[4 * four + code % 4] = kept[2 * four]
        row[4 * four + code // 4] = kept[2 * four + 1]
    return row[:width]


def _blocks(line: bytes, width: int) -> np.ndarray:
    across = ceil(width, SIDE)
    bitmap = ceil(across, 8)
    kept = iter(_bfloat16(line[bitmap:]).reshape(-1, SIDE, SIDE))
    rows = np.zeros((SIDE, across * SIDE))
    for block in range(across):
        if line[block // 8] >> block % 8 & 1:
            rows[:, block * SIDE : (block + 1) * SIDE] = next(kept)
    assert next(kept, None) is None, "more blocks than bits"
    return rows[:, :width]


def matrices(name: str) -> Mapping[str, np.ndarray]:
    """Finite matrices in float32 that are easy to get wrong."""
    draw = np.random.default_rng(0)
    top = limit(name)
    normal = draw.standard_normal((37, 197)).astype(np.float32)
    steps = 10.0 ** draw.uniform(-30, math.log10(min(top, 1e30)), normal.shape)
    spike = normal * np.float32(1e-3)
    spike[3, 100], spike[20, 5] = 900, -900
    return {
        "normal": normal,
        "heavy tails": draw.standard_t(2, (33, 129)).astype(np.float32),
        "all to one side": normal + np.float32(20),
        "all zero": np.zeros((19, 65), np.float32),
        "zero rows": normal * (np.arange(37) % 2)[:, None].astype(np.float32),
        "all equal": np.full((17, 64), -0.3, np.float32),
        "one number": np.array([[-2.5]], np.float32),
        "one row": normal[:1],
        "one column": normal[:, :1].copy(),
        "two signs of one magnitude": np.sign(normal),
        "one large number in a row": spike,
        "huge range": (np.sign(normal) * steps).astype(np.float32),
        "the largest": np.sign(normal) * np.float32(top),
        "denormal": (normal * np.float32(1e-40)).astype(np.float32),
        "the smallest": np.sign(normal) * np.float32(1e-45),
        "about what float16 rounds to zero": normal * np.float32(6e-8),
        "negative zeros": np.full((3, 33), -0.0, np.float32),
    }
