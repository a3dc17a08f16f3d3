"""Train the small demonstration model that examples/checkpoint ships, or measure it.

python scripts/train.py --demo --out RUN                 train; a run that was killed goes on
python scripts/train.py --demo --out RUN --export        write what is learnt so far
python scripts/train.py --demo --evaluate [--model DIR]  count right answers to unseen questions
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_jax import console

if TYPE_CHECKING:
    from qwen3vl_jax.train import Progress

_EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains or evaluates. Returns 0, 2 wrong usage, 4 bad input, 5 I/O, 130 Ctrl-C."""
    return console.main(_parse, lambda options, guard: _work(options), argv)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.described(__doc__)
    parser.add_argument("--demo", action="store_true", help="the demonstration model (needed)")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where the run lives (default: demo-run)"
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="measure a checkpoint, train nothing"
    )
    parser.add_argument(
        "--model", metavar="DIR", type=Path, help="what to measure (default: examples)"
    )
    parser.add_argument("--kv", choices=("raw", "int8"), help="how its KV caches are stored")
    parser.add_argument(
        "--export", action="store_true", help="write the weights of an unfinished run"
    )
    parser.add_argument("--questions", metavar="N", type=int, help="of each kind (default: 100)")
    arguments = parser.parse_args(argv)
    if not arguments.demo:
        parser.error("only the demonstration can be trained so far: add --demo")
    if arguments.evaluate and (arguments.export or arguments.out is not None):
        parser.error("--out and --export are for training; --evaluate takes --model DIR")
    asked = arguments.model, arguments.questions, arguments.kv
    if not arguments.evaluate and asked != (None, None, None):
        parser.error("--model, --questions and --kv are for --evaluate")
    if arguments.questions is not None and arguments.questions < 1:
        parser.error(f"--questions must be at least 1, found {arguments.questions}")
    return arguments


def _work(arguments: argparse.Namespace) -> int:
    if arguments.evaluate:
        from qwen3vl_jax.demo.evaluation import evaluate, table

        model = arguments.model or _EXAMPLE
        count, kv = arguments.questions or 100, arguments.kv
        print(table(evaluate(model, count=count, kv=kv, report=console.say)))
        return 0
    directory = arguments.out or Path("demo-run")
    if arguments.export:
        from qwen3vl_jax.demo import running

        print(f"{directory / running.CHECKPOINT}: step {running.export_newest(directory):,}")
        return 0
    _train(directory)
    return 0


def _train(directory: Path) -> None:
    from qwen3vl_jax.demo import running

    checkpoint = running.train_demo(directory, _show)
    print(f"checkpoint: {checkpoint}")
    curve = directory / "loss.png"
    try:
        running.draw_curve(directory / "metrics.jsonl", curve)
    except ImportError:
        console.say(
            "no loss curve: matplotlib is missing; pip install matplotlib, then run this again"
        )
    else:
        print(f"loss curve: {curve}")


def _show(progress: "Progress") -> None:
    from qwen3vl_jax.demo import recipe

    steps = recipe.SETTINGS.steps
    kinds = " ".join(
        f"{name} {value:.2f}" for name, value in progress.metrics.items() if name != "loss"
    )
    console.say(
        f"step {progress.step:,} of {steps:,}, {progress.seconds / 60:.1f} min, "
        f"loss {progress.metrics['loss']:.3f} | {kinds}"
    )


if __name__ == "__main__":
    console.leave(main())
