"""Every codec on one matrix of normal numbers: bytes, error, speed of decoding and of products.

python scripts/bench_codecs.py
python scripts/bench_codecs.py --codec int8 svd:rank=256 --out 2048 --in 6144

| column      | what it is                                                                      |
|-------------|---------------------------------------------------------------------------------|
| bytes       | of the encoded matrix, and as a share of the same one in bfloat16               |
| error       | relative, Frobenius, of the bfloat16 numbers                                    |
| decode      | GB/s of bfloat16 numbers made, as readers of weights get them                   |
| one row     | GB/s of encoded bytes in a product with one row                                 |
| 512 rows    | GFLOP/s in a product with 512 rows; svd does less work than this counts         |

Products are those of the model (`linear`), in bfloat16: C++ where there is a kernel for the codec.
Raw is the bfloat16 matrix itself; bf16 is its codec, which matters to float32 models only. Medians
of runs over weights that do not fit the cache; one codec is measured after another.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from memsched.codecs import CODECS, Codec, parse_codec, relative_error
from qwen3vl_jax import console
from qwen3vl_jax.benchmark.turns import how_many, seconds_in_turn

if TYPE_CHECKING:
    import numpy as np

    from qwen3vl_jax.checkpoints.encodings import Encoding

DTYPE = "bfloat16"
MANY_ROWS = 512
MANY_ROWS_WEIGHTS = 4  # arithmetic binds there: what a cache holds makes no difference


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the last line is one JSON object."""
    return console.main(_parse, lambda options, guard: report(options), argv)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.described(__doc__)
    add = parser.add_argument
    add("--codec", nargs="+", default=list(CODECS), help="default: one of every kind")
    add("--out", type=int, default=6144, help="rows of the matrix (default %(default)s)")
    add("--in", type=int, default=2048, dest="inputs", help="default %(default)s")
    add("--repeats", type=int, default=4, help="runs over every weight (default %(default)s)")
    options = parser.parse_args(argv)
    numbers = {"--out": options.out, "--in": options.inputs, "--repeats": options.repeats}
    for flag, number in numbers.items():
        if number < 1:
            parser.error(f"{flag} must be 1 or more, not {number}")
    return options


def report(options: argparse.Namespace) -> int:
    """One line for every codec."""
    from qwen3vl_jax import kernels

    codecs = [parse_codec(name) for name in options.codec]
    matrix = _normal(options.out, options.inputs)
    head = f"{'codec':18s}{'bytes':>12s}{'share':>8s}{'error':>10s}{'decode':>9s}"
    print(f"{head}{'one row':>9s}{f'{MANY_ROWS} rows':>10s}")
    cases = []
    for codec in codecs:
        case = measure(codec, matrix, options.repeats)
        print(_line(case), flush=True)
        cases.append(case)
    shape = [options.out, options.inputs]
    print(json.dumps({"shape": shape, "kernels": kernels.status().reason, "cases": cases}))
    return 0


def measure(codec: Codec, matrix: "np.ndarray", repeats: int) -> dict[str, Any]:
    """All columns of one codec."""
    from qwen3vl_jax.checkpoints.encodings import Encoding, packed, unpacked

    encoding = Encoding(codec.name, matrix.shape, DTYPE)
    stored = packed(matrix, codec.name, encoding)
    few, many = _product_seconds(stored, encoding, repeats)
    return {
        "codec": codec.name,
        "nbytes": stored.nbytes,
        "share": stored.nbytes / matrix.nbytes,
        "error": relative_error(matrix, codec),
        "decode_GB_per_s": matrix.nbytes
        / _median_s(lambda: unpacked(stored, encoding), repeats)
        / 1e9,
        "one_row_GB_per_s": stored.nbytes / few / 1e9,
        "many_rows_GFLOP_per_s": 2 * MANY_ROWS * matrix.size / many / 1e9,
    }


def _product_seconds(
    stored: "np.ndarray", encoding: "Encoding", repeats: int
) -> tuple[float, float]:
    """Of one row, and of many, as the model multiplies."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qwen3vl_jax.linear import linear
    from qwen3vl_jax.parameters import as_weight

    # The same lines in another order: other bytes, the same range.
    turned = [jnp.asarray(np.roll(stored, n, axis=0)) for n in range(how_many(stored.nbytes))]
    raw = encoding.codec == "raw"
    weights = turned if raw else [as_weight(each, encoding) for each in turned]
    rows = jax.random.normal(jax.random.key(1), (MANY_ROWS, encoding.shape[1])).astype(DTYPE)
    few = seconds_in_turn({"": (linear, weights)}, rows[:1], repeats)
    many = seconds_in_turn({"": (linear, weights[:MANY_ROWS_WEIGHTS])}, rows, repeats)
    return few[""], many[""]


def _normal(outputs: int, inputs: int) -> "np.ndarray":
    import ml_dtypes
    import numpy as np

    drawn = np.random.default_rng(0).standard_normal((outputs, inputs), np.float32)
    return drawn.astype(ml_dtypes.bfloat16)


def _median_s(work: Callable[[], Any], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _line(case: dict[str, Any]) -> str:
    return (
        f"{case['codec']:18s}{case['nbytes']:12,}{case['share']:8.1%}{case['error']:10.5f}"
        f"{case['decode_GB_per_s']:9.2f}{case['one_row_GB_per_s']:9.2f}"
        f"{case['many_rows_GFLOP_per_s']:10.1f}"
    )


if __name__ == "__main__":
    console.leave(main())
