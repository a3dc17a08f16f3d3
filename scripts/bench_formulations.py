"""Which formulation of a product with an [out, in] weight is fastest here, by rows and dtype.

Prints GB/s of weight bytes: the median of several runs over weights that do not fit the cache, all
formulations in turn. The tables in `qwen3vl_jax.linear.formulation` and
`qwen3vl_jax.encoded.formulation` were chosen from such reports.

python scripts/bench_formulations.py --rows 1 4 --dtype bfloat16
python scripts/bench_formulations.py --rows 1 512 --dtype bfloat16 --codec int8 int4:32
python scripts/bench_formulations.py --rows 1 512 --dtype bfloat16 --slots 4096

With --slots it is attention over KV caches of so many slots, raw and int8, by tokens.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from qwen3vl_jax import console
from qwen3vl_jax.benchmark.turns import how_many, seconds_in_turn

DTYPES = ("bfloat16", "float16", "float32")
CODECS = ("int8", "int8:64", "int8:128", "int4:32", "int4:64", "int4:32:zero", "int4:64:zero")
HEADS, KEY_HEADS, HEAD_DIM = 16, 8, 128  # of attention: those of the 2B model


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the last line is one JSON object."""
    return console.main(_parse, lambda options, guard: report(options), argv)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.described(__doc__)
    add = parser.add_argument
    add("--out", type=int, default=6144, help="rows of the weight (default %(default)s)")
    add("--in", type=int, default=2048, dest="inputs", help="default %(default)s")
    add("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 512])
    add("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    add("--codec", nargs="+", default=[], choices=CODECS, help="measure weights packed so instead")
    add("--slots", type=int, help="measure attention over caches instead; --rows are its tokens")
    add("--repeats", type=int, default=8, help="runs over every weight (default %(default)s)")
    return parser.parse_args(argv)


def report(options: argparse.Namespace) -> int:
    """One line for every dtype and number of rows."""
    from qwen3vl_jax import kernels

    cases = []
    kinds = itertools.product(options.dtype, options.codec or [None], options.rows)
    for dtype, codec, rows in kinds:
        if options.slots:
            case = measure_attention(dtype, rows, options)
        elif codec is None:
            case = measure(dtype, rows, options)
        else:
            case = measure_encoded(dtype, codec, rows, options)
        unit = "ms" if "milliseconds" in case else "GB/s"
        found = case.get("milliseconds", case["GB_per_s"])
        speeds = "  ".join(f"{name} {speed:6.2f}" for name, speed in found.items())
        head = f"{dtype:9s}{codec or '':13s}{rows:4d} rows  chosen: {case['chosen']:9s}"
        print(f"{head} {unit}: {speeds}", flush=True)
        if "against_raw" in case:
            print(f"{'':13s}numbers/s against {dtype}: {case['against_raw']:.2f}", flush=True)
        cases.append(case)
    shape = [options.out, options.inputs]
    print(json.dumps({"shape": shape, "kernels": kernels.status().reason, "cases": cases}))
    return 0


def measure(dtype: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """GB/s of every formulation, and which one `linear` takes."""
    from qwen3vl_jax import kernels
    from qwen3vl_jax.linear import FORMULATIONS, NEED_KERNELS, formulation

    x, weights = _raw(dtype, rows, options)
    usable = {n: f for n, f in FORMULATIONS.items() if kernels.usable() or n not in NEED_KERNELS}
    seconds = seconds_in_turn(
        {name: (product, weights) for name, product in usable.items()}, x, options.repeats
    )
    return {
        "dtype": dtype,
        "rows": rows,
        "chosen": formulation(rows, dtype, kernel=kernels.usable(), widen=kernels.widen()),
        "GB_per_s": {name: weights[0].nbytes / taken / 1e9 for name, taken in seconds.items()},
    }


def measure_encoded(
    dtype: str, name: str, rows: int, options: argparse.Namespace
) -> dict[str, Any]:
    """The same for weights of random codes, and numbers/s of the chosen way against raw weights."""
    from functools import partial

    from memsched.codecs import Int4, Int8, parse_codec
    from qwen3vl_jax import kernels
    from qwen3vl_jax.encoded import formulation
    from qwen3vl_jax.kernels import products
    from qwen3vl_jax.linear import linear

    codec, shape, inputs = parse_codec(name), (options.out, options.inputs), options.inputs
    x, raw = _raw(dtype, rows, options)
    weights = _packed(codec, shape)
    ways: dict[str, Any] = {"plain": partial(codec.product, shape=shape)}
    if kernels.usable() and isinstance(codec, Int4):
        int4 = {"inputs": inputs, "group": codec.group, "zero": codec.zero}
        ways["few_rows"] = partial(products.few_rows_int4, **int4)
        ways["many_rows"] = partial(products.many_rows_int4, **int4)
    elif kernels.usable() and isinstance(codec, Int8):
        int8 = {"inputs": inputs, "group": codec.group or 0}
        ways["few_rows"] = partial(products.few_rows_int8, **int8)
        ways["many_rows"] = partial(products.many_rows_int8, **int8)
    cases = {way: (product, weights) for way, product in ways.items()}
    seconds = seconds_in_turn({"raw": (linear, raw), **cases}, x, options.repeats)
    chosen = formulation(rows, dtype, kernel=kernels.usable())
    return {
        "dtype": dtype,
        "codec": name,
        "rows": rows,
        "chosen": chosen,
        "against_raw": seconds["raw"] / seconds[chosen],
        "GB_per_s": {way: weights[0].nbytes / seconds[way] / 1e9 for way in ways},
    }


def measure_attention(dtype: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """GB/s of keys and values, raw and int8, that the last of these tokens see all of."""
    import jax
    import jax.numpy as jnp

    from qwen3vl_jax.cache import LayerCache
    from qwen3vl_jax.cache_attention import cached_attention
    from qwen3vl_jax.cache_rows import as_rows, row_dtype

    slots, chosen = options.slots, jnp.dtype(dtype)
    shape = (KEY_HEADS, slots, HEAD_DIM)
    count = 2 * how_many(2 * math.prod(shape) * chosen.itemsize)
    keys = jax.random.split(jax.random.key(0), count + 1)
    numbers = [jax.random.normal(key, shape).astype(chosen) for key in keys[1:]]
    queries = jax.random.normal(keys[0], (1, HEADS, tokens, HEAD_DIM)).astype(chosen)
    last, valid = jnp.arange(slots - tokens, slots, dtype=jnp.int32), jnp.ones((1, slots), bool)

    def attend(queries: jax.Array, rows: Sequence[jax.Array]) -> jax.Array:
        return cached_attention(queries, LayerCache(*rows), last, valid)

    cases = {}
    for kv in ("raw", "int8"):
        made = [as_rows(each, row_dtype(kv, chosen)) for each in numbers]
        cases[kv] = attend, list(zip(made[::2], made[1::2], strict=True))
    seconds = seconds_in_turn(cases, queries, options.repeats)
    nbytes = {kv: 2 * caches[0][0].nbytes for kv, (_, caches) in cases.items()}
    return {
        "dtype": dtype,
        "slots": slots,
        "rows": tokens,
        "chosen": "int8",
        "milliseconds": {kv: 1e3 * taken for kv, taken in seconds.items()},
        "against_raw": seconds["raw"] / seconds["int8"],
        "GB_per_s": {kv: nbytes[kv] / seconds[kv] / 1e9 for kv in cases},
    }


def _raw(dtype: str, rows: int, options: argparse.Namespace) -> tuple[Any, list[Any]]:
    import jax
    import jax.numpy as jnp

    shape = (options.out, options.inputs)
    count = how_many(math.prod(shape) * jnp.dtype(dtype).itemsize)
    keys = jax.random.split(jax.random.key(0), count + 1)
    weights = [jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys[1:]]
    return jax.random.normal(keys[0], (rows, options.inputs), jnp.float32).astype(dtype), weights


def _packed(codec: Any, shape: tuple[int, int]) -> list[Any]:
    """One encoded matrix, and its codes turned by some rows: other bytes, the same range."""
    import jax.numpy as jnp
    import numpy as np

    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    packed = codec.encode(values)
    return [jnp.asarray(np.roll(packed, turn, axis=0)) for turn in range(how_many(packed.nbytes))]


if __name__ == "__main__":
    console.leave(main())
