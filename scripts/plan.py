"""Say what a model would take on a machine: memory, bytes moved, seconds. No weight is opened.

python scripts/plan.py configs/models/qwen3-vl-2b-instruct.json --device-memory 1.5GB
python scripts/plan.py DIR --machine configs/machines/desktop-24gb.toml --images 448x448
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_jax import console
from qwen3vl_jax.planned.options import add_budget_options, budget_arguments

if TYPE_CHECKING:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, and print it. Returns an exit code of `console.run`."""
    return console.main(_parse, lambda options, guard: plan(options), argv)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.described(__doc__)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a checkpoint directory or a config.json")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    group = parser.add_argument_group("the request")
    add = group.add_argument
    add("--prompt-tokens", type=_positive, default=512, metavar="N", help="of text (512)")
    add("--new-tokens", type=_positive, default=128, metavar="N", help="of the answer (128)")
    add(
        "--images",
        type=_picture,
        nargs="+",
        default=[],
        metavar="WxH",
        help="pictures on top of the text, in pixels",
    )
    add("--batch", type=_positive, default=1, metavar="B", help="so many such requests at once")
    add("--max-context", type=_positive, metavar="N", help="room for so many tokens of each")
    add_budget_options(parser)
    add = parser.add_argument
    add("--json", action="store_true", help="write one JSON object to stdout, not the text")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _picture(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text}: a size like 448x448 is wanted")
    return int(width), int(height)


def plan(options: argparse.Namespace) -> int:
    """Plans what the options ask for, and prints it."""
    from qwen3vl_jax.config import load_config
    from qwen3vl_jax.planned.dry_run import check_report, dry_run, print_dry_run
    from qwen3vl_jax.planned.loading import Budgets
    from qwen3vl_jax.planned.request import Request

    check_report(options.report)
    request = Request(
        options.prompt_tokens,
        options.new_tokens,
        tuple(options.images),
        options.batch,
        options.max_context,
    )
    budgets = Budgets(**budget_arguments(options))
    found = dry_run(load_config(options.model), request, budgets, dtype=options.dtype)
    return print_dry_run(found, report=options.report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
