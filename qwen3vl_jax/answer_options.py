"""The command-line options of a question and its answer, and which of them go together."""

import argparse
from collections.abc import Callable
from pathlib import Path

from qwen3vl_jax.errors import UsageError


def add_question(parser: argparse.ArgumentParser) -> None:
    """Adds what is asked."""
    group = parser.add_argument_group("the question")
    add = group.add_argument
    # Both go to one list, so that pictures and videos keep their order.
    for kind, text in (("image", "a picture: a file, a data URL or -"), ("video", "a video file")):
        add(
            f"--{kind}",
            dest="media",
            action="append",
            type=_of_kind(kind),
            metavar="PATH",
            help=f"{text}; may be repeated",
        )
    frames = group.add_mutually_exclusive_group()
    frames.add_argument("--fps", type=_above_zero(float), metavar="N", help="frames per second")
    frames.add_argument("--num-frames", type=_above_zero(int), metavar="N", help="frames in all")
    add("--min-pixels", type=_above_zero(int), metavar="N", help="enlarge what has fewer")
    add("--max-pixels", type=_above_zero(int), metavar="N", help="shrink what has more")
    text_group = group.add_mutually_exclusive_group()
    text_group.add_argument("-p", "--prompt", metavar="TEXT", help="the text; - reads stdin")
    text_group.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with the text")
    add("--system-prompt", "--system", metavar="TEXT", help="an instruction before everything")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds how it is answered."""
    group = parser.add_argument_group(
        "the answer", "What is not given is as the checkpoint's generation_config.json says."
    )
    add = group.add_argument
    add("--max-new-tokens", "--max-tokens", "-n", type=int, metavar="N", help="its length at most")
    heat = group.add_mutually_exclusive_group()
    heat.add_argument("--temperature", "--temp", type=float, metavar="T", help="0 is greedy")
    heat.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; 0: from all")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest that hold this chance")
    add("--min-p", type=float, metavar="P", help="drop what has less than P x the best chance")
    add("--repetition-penalty", type=float, metavar="R", help="over 1: against repeating")
    add("--presence-penalty", type=float, metavar="P", help="over 0: against repeating itself")
    add("--seed", type=int, metavar="S", help="makes sampling repeatable")
    add("--draft", choices=("prompt-lookup",), help="guess from what was said, verify at once")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")


def _of_kind(kind: str) -> Callable[[str], tuple[str, str]]:
    return lambda path: (kind, path)


def _above_zero(number: type[int] | type[float]) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        value = number(text)
        if not 0 < value < 1 << 40:
            raise argparse.ArgumentTypeError(f"{text} is not a number over 0")
        return value

    return parse


def check_options(options: argparse.Namespace) -> None:
    """Raises UsageError for options that do not go together; makes `media` a list."""
    options.media = options.media or []
    kinds = {kind for kind, _ in options.media}
    stdin_uses = [path for _, path in options.media if path == "-"].count("-")
    stdin_uses += options.prompt == "-"
    sized = options.min_pixels is not None or options.max_pixels is not None
    timed = options.fps is not None or options.num_frames is not None
    greedy = options.greedy or options.temperature == 0
    filters = (options.top_k, options.top_p, options.min_p)
    rules = (
        (stdin_uses > 1, "stdin can be read once; use - for one thing only"),
        (("video", "-") in options.media, "a video cannot come from stdin; name a file"),
        (options.interactive and stdin_uses, "--interactive reads from stdin; name a file, not -"),
        (options.interactive and options.json, "--json is for one answer; drop --interactive"),
        (timed and "video" not in kinds, "--fps and --num-frames are for videos; give --video"),
        (
            sized and not kinds and not options.interactive,
            "--min-pixels and --max-pixels are for pictures; give --image or --video",
        ),
        (
            greedy and filters != (None, None, None),
            "greedy draws nothing, so --top-k, --top-p and --min-p mean nothing; drop them",
        ),
        (
            options.interactive and (options.dry_run or options.learn or options.reports),
            "--dry-run, --learn and --report are for one answer; drop --interactive",
        ),
        (
            options.learn and options.dry_run,
            "--learn needs a run, and --dry-run makes none; drop one of them",
        ),
        (
            options.prompt_cache is not None and options.dry_run,
            "--prompt-cache needs a run, and --dry-run makes none; drop one of them",
        ),
        (
            options.prompt_cache_space is not None and options.prompt_cache is None,
            "--prompt-cache-space limits a prompt cache; give --prompt-cache DIR",
        ),
        (
            not options.interactive and options.prompt is None and options.prompt_file is None,
            "nothing is asked; give --prompt TEXT, --prompt-file FILE or --interactive",
        ),
    )
    for broken, message in (*rules, *_plan_rules(options)):
        if broken:
            raise UsageError(message)


def _plan_rules(options: argparse.Namespace) -> tuple[tuple[bool, str], ...]:
    """What is wrong, and the message, of options that write plans or carry them out."""
    return (
        (
            options.plan is not None and options.adapt,
            "--plan is carried out as it is, --adapt plans anew; drop one of them",
        ),
        (
            options.plan is not None and options.interactive,
            "--plan is for one answer; drop --interactive",
        ),
        (
            options.plan is not None and options.draft is not None,
            "--plan has no passes that verify drafts; drop --draft",
        ),
        (
            options.plan is not None and options.dry_run,
            "--plan is carried out, --dry-run plans anew; drop one of them",
        ),
        (
            options.save_plan is not None and not options.dry_run,
            "--save-plan writes what --dry-run has planned; add --dry-run",
        ),
    )
