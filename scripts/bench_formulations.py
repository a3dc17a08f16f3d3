"""Which formulation of a product with an [out, in] weight is fastest here, by rows and dtype.

Prints GB/s of weight bytes: the best of several runs over weights that do not fit the cache, all
formulations in turn. The table in `qwen3vl_jax.linear.formulation` was chosen from such reports.

python scripts/bench_formulations.py --rows 1 4 --dtype bfloat16
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from qwen3vl_jax import console

DTYPES = ("bfloat16", "float16", "float32")
WEIGHTS = 4


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
    add("--repeats", type=int, default=8, help="runs over every weight (default %(default)s)")
    return parser.parse_args(argv)


def report(options: argparse.Namespace) -> int:
    """One line for every dtype and number of rows."""
    from qwen3vl_jax import kernels

    cases = []
    for dtype, rows in itertools.product(options.dtype, options.rows):
        case = measure(dtype, rows, options)
        speeds = "  ".join(f"{name} {speed:6.2f}" for name, speed in case["GB_per_s"].items())
        print(f"{dtype:9s}{rows:4d} rows  chosen: {case['chosen']:9s} GB/s: {speeds}", flush=True)
        cases.append(case)
    shape = [options.out, options.inputs]
    print(json.dumps({"shape": shape, "kernels": kernels.status().reason, "cases": cases}))
    return 0


def measure(dtype: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Best GB/s of every formulation, and which one `linear` takes."""
    import jax
    import jax.numpy as jnp

    from qwen3vl_jax import kernels
    from qwen3vl_jax.linear import FORMULATIONS, formulation

    keys = jax.random.split(jax.random.key(0), WEIGHTS + 1)
    shape = (options.out, options.inputs)
    weights = [jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys[1:]]
    x = jax.random.normal(keys[0], (rows, options.inputs), jnp.float32).astype(dtype)
    steps = {
        name: jax.jit(product).lower(x, weights[0]).compile()
        for name, product in FORMULATIONS.items()
        if kernels.usable() or name != "kernel"
    }
    best = dict.fromkeys(steps, float("inf"))
    for _, (name, step), weight in itertools.product(
        range(options.repeats), steps.items(), weights
    ):
        start = time.perf_counter()
        step(x, weight).block_until_ready()
        best[name] = min(best[name], time.perf_counter() - start)
    return {
        "dtype": dtype,
        "rows": rows,
        "chosen": formulation(rows, dtype, kernel=kernels.usable()),
        "GB_per_s": {name: weights[0].nbytes / taken / 1e9 for name, taken in best.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
