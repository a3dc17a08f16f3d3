"""Which formulation of a product with an [out, in] weight is fastest here, by rows and dtype.

Prints GB/s of weight bytes, the best of several runs over weights that do not fit the cache, all
formulations in turn. `qwen3vl_jax.linear.formulation` was chosen from such tables.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the last line is one JSON object."""
    args = parse(argv)
    results = [
        measure(dtype, rows, args) for dtype, rows in itertools.product(args.dtype, args.rows)
    ]
    print(json.dumps({"out": args.out, "in": args.inputs, "GB_per_s": results}))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=int, default=6144, help="rows of the weight (default 6144)")
    parser.add_argument("--in", type=int, default=2048, dest="inputs", help="default 2048")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 512])
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["bfloat16", "float16", "float32"],
        choices=["bfloat16", "float16", "float32"],
    )
    parser.add_argument("--repeats", type=int, default=8, help="runs over every weight (default 8)")
    return parser.parse_args(argv)


def measure(dtype: str, rows: int, args: argparse.Namespace) -> dict[str, object]:
    """Best GB/s of every formulation, and which one `linear` takes."""
    import jax
    import jax.numpy as jnp

    from qwen3vl_jax import kernels
    from qwen3vl_jax.linear import FORMULATIONS, formulation

    key = jax.random.key(0)
    weights = [
        jax.random.normal(jax.random.fold_in(key, i), (args.out, args.inputs), jnp.float32).astype(
            dtype
        )
        for i in range(4)
    ]
    x = jax.random.normal(key, (rows, args.inputs), jnp.float32).astype(dtype)
    kernel = kernels.status().active
    steps = {
        name: jax.jit(product).lower(x, weights[0]).compile()
        for name, product in FORMULATIONS.items()
        if kernel or name != "kernel"
    }
    best = dict.fromkeys(steps, float("inf"))
    for _, (name, step), weight in itertools.product(range(args.repeats), steps.items(), weights):
        start = time.perf_counter()
        step(x, weight).block_until_ready()
        best[name] = min(best[name], time.perf_counter() - start)
    speeds = {name: round(weights[0].nbytes / seconds / 1e9, 2) for name, seconds in best.items()}
    chosen = formulation(rows, x.dtype, kernel=kernel)
    print(
        f"{dtype:9s} {rows:4d} rows  linear: {chosen:9s}",
        *(f"{n} {s:6.2f}" for n, s in speeds.items()),
    )
    return {"dtype": dtype, "rows": rows, "chosen": chosen, **speeds}


if __name__ == "__main__":
    sys.exit(main())
