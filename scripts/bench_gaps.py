"""How far planned decoding is from the bound that no schedule beats: models by machines.

Prints a line for each pair: predicted seconds of a new token, their bound, the gap, which lane sets
the bound, and seconds of a core to plan and to bound. No weight is read.

python scripts/bench_gaps.py
python scripts/bench_gaps.py --machines configs/machines/h200.toml --new-tokens 16
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen3vl_jax import console

CONFIGS = Path(__file__).parents[1] / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    return console.main(_parse, lambda options, guard: report(options), argv)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.described(__doc__)
    add = parser.add_argument
    models, machines = CONFIGS.glob("models/*.json"), CONFIGS.glob("machines/*.toml")
    add("--models", type=Path, nargs="+", default=sorted(models), help="all shipped by default")
    add("--machines", type=Path, nargs="+", default=sorted(machines), help="all shipped by default")
    add("--prompt-tokens", type=int, default=512, help="default %(default)s")
    add("--new-tokens", type=int, default=128, help="default %(default)s")
    return parser.parse_args(argv)


def report(options: argparse.Namespace) -> int:
    """One line for each machine and model."""
    from memsched.cost import Roofline
    from memsched.profiles import load_machine
    from qwen3vl_jax.config import load_config
    from qwen3vl_jax.parameters import named_dtype
    from qwen3vl_jax.planned.gaps import decode_gap
    from qwen3vl_jax.planned.request import Request

    request = Request(options.prompt_tokens, options.new_tokens, ((448, 448),))
    print(f"{'machine':20s} {'model':27s} {'seconds':>10s} {'bound':>10s} {'gap':>7s}  set by")
    for machine in options.machines:
        for model in options.models:
            config = load_config(model)
            dtype = named_dtype(config.dtype)
            gap = decode_gap(config, request, dtype, load_machine(machine), Roofline())
            said = "does not fit"
            if gap is not None:
                said = (
                    f"{gap.seconds:10.5f} {gap.bound_s:10.5f} {gap.share:7.2%}  {gap.lane:12s} "
                    f"planned in {gap.planned_s:.2f} s, bounded in {gap.bounded_s:.2f} s"
                )
            print(f"{machine.stem:20s} {model.stem:27s} {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
