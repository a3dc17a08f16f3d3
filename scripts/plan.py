"""Say what a model would take on a machine: memory, bytes moved, seconds. No weight is opened.

python scripts/plan.py configs/models/qwen3-vl-2b-instruct.json --device-memory 1.5GB
python scripts/plan.py DIR --machine configs/machines/desktop-24gb.toml --images 448x448
python scripts/plan.py DIR --machine configs/machines/i5-10210u-sm61-nvme.toml --aot
python scripts/plan.py DIR --level balanced --device-memory 1.5GB
python scripts/plan.py DIR --sweep device-memory=1GB..24GB --report sweep.html
python scripts/plan.py --compare before.json after.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_jax import console
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.planned.options import add_budget_options, budget_arguments, say_ignored

if TYPE_CHECKING:
    from memsched.aot import Compiler
    from qwen3vl_jax.planned.loading import Budgets
    from qwen3vl_jax.planned.request import Request

MOST_DIGITS = 18
# --batch auto.
AUTO = 0
# What a sweep sets at every point, by its axis.
SWEPT = {
    "device-memory": ("--device-memory",),
    "host-memory": ("--host-memory",),
    "batch": ("--batch",),
    "context": ("--prompt-tokens", "--max-context"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, and print it. Returns an exit code of `console.run`."""
    return console.main(_parse, lambda options, guard: plan(options), argv)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.described(__doc__)
    add = parser.add_argument
    add(
        "model",
        type=Path,
        nargs="?",
        metavar="MODEL",
        help="a checkpoint directory or a config.json",
    )
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
    add(
        "--batch",
        type=_batch,
        default=1,
        metavar="B",
        help="so many such requests at once; auto plans several and takes the most tokens/s",
    )
    add("--max-context", type=_positive, metavar="N", help="room for so many tokens of each")
    add_budget_options(parser)
    parser.add_argument(
        "--aot",
        action="store_true",
        help="let XLA compile every step for the GPU of --machine, which need not be here, and say "
        "what workspace it takes (needs the extra aot)",
    )
    _add_many_plans(parser)
    add = parser.add_argument
    add("--json", action="store_true", help="write one JSON object to stdout, not the text")
    options = parser.parse_args(argv)
    _check(options, _given(parser, argv, options))
    return options


def _add_many_plans(parser: argparse.ArgumentParser) -> None:
    """Adds what makes more than one plan, or reads them."""
    group = parser.add_argument_group("many plans")
    add = group.add_argument
    add(
        "--sweep",
        metavar="AXIS=LOW..HIGH",
        help="device-memory, host-memory, disk-rate, batch or context; --report takes .png, too",
    )
    add("--points", type=_positive, default=9, metavar="N", help="values of a sweep (9)")
    add(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A.json", "B.json"),
        help="what differs between two files of --report or --save-plan",
    )


def _given(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, options: argparse.Namespace
) -> list[str]:
    """What the command line names, whether or not it says the same as a default."""
    named = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(options))))
    words = {"model": "MODEL", "reports": "--report"}
    return [
        words.get(name, f"--{name.replace('_', '-')}")
        for name, value in vars(named).items()
        if value is not None
    ]


def _check(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Raises UsageError for options that do not go together."""
    compared = options.compare is not None
    unread = [name for name in given if name not in ("--compare", "--json", "--debug")]
    rules = (
        (
            options.model is None and not compared,
            "MODEL is missing; name a directory or a config.json",
        ),
        (
            compared and bool(unread),
            f"--compare reads two files and nothing else; drop {', '.join(unread)}",
        ),
        (
            options.aot and options.machine is None,
            "--aot compiles for the GPU of a file; add --machine, or leave --aot out",
        ),
        (
            options.aot and (options.sweep, options.save_plan) != (None, None),
            "--aot is for one plan, of a GPU that is not here; drop --sweep and --save-plan",
        ),
        (
            options.batch == AUTO and (options.aot or options.sweep is not None),
            "--batch auto plans several batches; drop --aot and --sweep, or give a count",
        ),
        (
            "--points" in given and options.sweep is None,
            "--points is how many values a sweep has; add --sweep, or drop it",
        ),
        *(() if options.sweep is None else _sweep_rules(options, given)),
    )
    for broken, message in rules:
        if broken:
            raise UsageError(message)


def _sweep_rules(options: argparse.Namespace, given: Sequence[str]) -> tuple[tuple[bool, str], ...]:
    """What does not go together with --sweep."""
    axis = options.sweep.partition("=")[0]
    unread = [name for name in SWEPT.get(axis, ()) if name in given]
    return (
        (
            options.level != "minimal",
            "--sweep plans one form of a model at every point; convert it with scripts/convert.py "
            "--codec auto, and sweep the store, or drop --level",
        ),
        (options.save_plan is not None, "--save-plan writes one plan; drop --sweep"),
        (bool(unread), f"--sweep {axis} says it for every point; drop {', '.join(unread)}"),
    )


def _positive(text: str) -> int:
    # Python reads no number of thousands of digits.
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"{text[:60]}: a count is wanted")
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _batch(text: str) -> int:
    """A count, or `AUTO`."""
    if text == "auto":
        return AUTO
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text[:60]}: a count or auto is wanted")
    return _positive(text)


def _picture(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text}: a size like 448x448 is wanted")
    return int(width), int(height)


def plan(options: argparse.Namespace) -> int:
    """Plans what the options ask for, and prints it."""
    if options.compare is not None:
        return _compare(options)
    say_ignored(options, console.say)
    if options.sweep is not None:
        return _sweep(options)
    from memsched.whole_file import check_target
    from qwen3vl_jax.checkpoints.opening import described
    from qwen3vl_jax.planned.best_batch import dry_run_best_batch
    from qwen3vl_jax.planned.dry_run import check_reports, dry_run, print_dry_run
    from qwen3vl_jax.planned.loading import Budgets

    check_reports(options.reports)
    if options.save_plan is not None:
        check_target(options.save_plan)
    compiler = _compiler(options.machine) if options.aot else None
    budgets = Budgets(**budget_arguments(options))
    request = _request(options, budgets)
    config, encodings = described(options.model)
    how: dict[str, Any] = {"dtype": options.dtype, "encodings": encodings}
    if options.batch == AUTO:
        found = dry_run_best_batch(config, request, budgets, **how, say=console.say)
    else:
        found = dry_run(config, request, budgets, **how, compiler=compiler)
    return print_dry_run(
        found, reports=options.reports, save_plan=options.save_plan, as_json=options.json
    )


def _compiler(machine: Path) -> "Compiler":
    """For the GPU that a file describes; on a terminal it says what it compiles."""
    import jax

    # For all but compiling; with a GPU's platform JAX would ask for a driver.
    jax.config.update("jax_platforms", "cpu")
    from memsched.aot import Compiler, absent_device
    from memsched.profiles import load_machine

    def say(kernel: str) -> None:
        if sys.stderr.isatty():
            console.say(f"compiling {kernel}")

    return Compiler(absent_device(load_machine(machine)), say)


def _request(options: argparse.Namespace, budgets: "Budgets") -> "Request":
    from qwen3vl_jax.planned.request import Request

    return Request(
        options.prompt_tokens,
        options.new_tokens,
        tuple(options.images),
        options.batch or 1,
        options.max_context,
        **budgets.forms,
    )


def _compare(options: argparse.Namespace) -> int:
    from memsched.report.difference import difference, rows_dict, view
    from memsched.report.rendering import show
    from qwen3vl_jax.planned.saved import read_report

    one, other = options.compare
    found = difference(read_report(one), read_report(other), names=(str(one), str(other)))
    if options.json:
        print(json.dumps(rows_dict(found)), flush=True)
    else:
        show(view(found))
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from memsched.cost.learned import describe
    from memsched.report.rendering import show
    from qwen3vl_jax.checkpoints.opening import described
    from qwen3vl_jax.parameters import named_dtype
    from qwen3vl_jax.planned import sweep_report
    from qwen3vl_jax.planned.dry_run import check_reports, planned_machine
    from qwen3vl_jax.planned.loading import Budgets
    from qwen3vl_jax.planned.sweep import parse_sweep, run_sweep

    sweep = parse_sweep(options.sweep, options.points)
    check_reports(options.reports, sweep_report.FORMATS)
    if any(path.suffix == ".png" for path in options.reports):
        sweep_report.check_png()
    config, encodings = described(options.model)
    dtype = named_dtype(options.dtype or config.dtype)
    budgets = Budgets(**budget_arguments(options))
    machine, cost = planned_machine(budgets)
    points = run_sweep(
        sweep,
        config,
        _request(options, budgets),
        machine,
        dtype,
        console.say,
        cost=cost,
        encodings=encodings,
        plan_seconds=options.plan_seconds,
    )
    title = f"{config.model_type}, {dtype.name}, on {machine.name}: {sweep.axis}"
    swept = sweep_report.Swept(title, describe(cost), sweep, points)
    for path in options.reports:
        sweep_report.write_sweep(path, swept)
    if options.json:
        print(json.dumps(sweep_report.sweep_dict(swept)), flush=True)
    else:
        show(sweep_report.sweep_view(swept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
