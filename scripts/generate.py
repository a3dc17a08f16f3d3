"""Answer questions about pictures and videos with a Qwen3-VL checkpoint.

python scripts/generate.py --image cat.jpg --prompt "What is this?"
python scripts/generate.py --model DIR --interactive
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_jax import console
from qwen3vl_jax.errors import BadInputError, Qwen3VLError, UsageError
from qwen3vl_jax.interrupts import Guard, Meaning

if TYPE_CHECKING:
    from qwen3vl_jax import Processor, Qwen3VL
    from qwen3vl_jax.chat import Chat
    from qwen3vl_jax.generation_settings import GenerationSettings

SHIPPED_CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "checkpoint"
MAX_STDIN_BYTES = 256 << 20
COMMANDS = "/image PATH, /clear, /stats, /quit"


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question, or many with --interactive. Returns the exit code of `console.run`."""
    try:
        options = _parser().parse_args(argv)
        _check(options)
    except UsageError as error:
        return console.failed(error, debug=False)
    except SystemExit as left:  # --help and --version
        return int(left.code or 0)
    work = _converse if options.interactive else _answer_once
    return console.run(lambda guard: work(options, guard), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    from qwen3vl_jax import __version__

    parser = console.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=SHIPPED_CHECKPOINT, metavar="DIR", help="a checkpoint; by default the shipped one")  # fmt: skip  # noqa: E501
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="by default the checkpoint's")
    _add_prompt(parser)
    _add_sampling(parser)
    add("--interactive", action="store_true", help=f"chat; {COMMANDS}; Ctrl-C stops an answer")
    add("--json", action="store_true", help="write one JSON object to stdout instead of the text")
    add("-q", "--quiet", action="store_true", help="no statistics and no progress on stderr")
    add("--debug", action="store_true", help="show a traceback on errors")
    add("--version", action="version", version=f"%(prog)s (qwen3vl-jax) {__version__}")
    return parser


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    add = group.add_argument
    # One list for both, so that pictures and videos keep their order.
    add("--image", dest="media", action="append", type=lambda path: ("image", path), metavar="PATH",
        help="a picture: a file, a data URL, or - for stdin; may be repeated")  # fmt: skip
    add("--video", dest="media", action="append", type=lambda path: ("video", path), metavar="PATH",
        help="a video file, or a folder of frames; may be repeated")  # fmt: skip
    frames = group.add_mutually_exclusive_group()
    frames.add_argument("--fps", type=float, metavar="N", help="frames per second of a video")
    frames.add_argument("--num-frames", type=int, metavar="N", help="frames of a video in all")
    add("--min-pixels", type=int, metavar="N", help="enlarge smaller pictures and frames")
    add("--max-pixels", type=int, metavar="N", help="shrink larger pictures and frames")
    text = group.add_mutually_exclusive_group()
    text.add_argument("-p", "--prompt", metavar="TEXT", help="the question; - reads stdin")
    text.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with the question")
    add("--system-prompt", "--system", metavar="TEXT", help="an instruction before everything")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "how it is answered (by default as the checkpoint's generation_config.json says)"
    )
    add = group.add_argument
    add("--max-new-tokens", "--max-tokens", "-n", type=int, metavar="N", help="length of an answer")
    heat = group.add_mutually_exclusive_group()
    heat.add_argument("--temperature", "--temp", type=float, metavar="T", help="0 is greedy")
    heat.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest that hold this chance")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest; 0 is from all")
    add("--min-p", type=float, metavar="P", help="leave out what is this much less likely")
    add("--repetition-penalty", type=float, metavar="R", help="above 1: against repeating")
    add("--presence-penalty", type=float, metavar="P", help="subtracted from what was said")
    add("--seed", type=int, metavar="S", help="makes sampling repeatable")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")


def _check(options: argparse.Namespace) -> None:
    """Raises UsageError for options that do not go together."""
    options.media = options.media or []
    kinds = {kind for kind, _ in options.media}
    from_stdin = [path for _, path in options.media if path == "-"]
    from_stdin += ["-"] if options.prompt == "-" else []
    if options.interactive and (options.json or from_stdin):
        raise UsageError("--interactive reads questions from stdin and writes text; drop --json or -")
    if len(from_stdin) > 1:
        raise UsageError("stdin can be read once; use - for one thing only")
    if ("video", "-") in options.media:
        raise UsageError("--video: a video cannot be read from stdin; name a file")
    if not options.interactive and options.prompt is None and options.prompt_file is None:
        raise UsageError("nothing is asked; give --prompt TEXT, --prompt-file FILE or --interactive")
    if "video" not in kinds and (options.fps is not None or options.num_frames is not None):
        raise UsageError("--fps and --num-frames are for videos; give --video, or drop them")
    limits = options.min_pixels is not None or options.max_pixels is not None
    if limits and not kinds and not options.interactive:
        raise UsageError("--min-pixels and --max-pixels need a picture; give --image or drop them")


def _answer_once(options: argparse.Namespace, guard: Guard) -> int:
    settings, chat, processor_s = _prepared(options)
    turn = chat.prepare([*_media(options), {"type": "text", "text": _prompt(options)}])
    model, load = _load(options)
    for piece in chat.ask(model, turn):
        if not options.json:
            print(piece, end="", flush=True)
    if not options.json:
        print(flush=True)
    _print_statistics(options, chat, settings, load)
    if options.json:
        print(json.dumps(_report(chat, settings, load)), flush=True)
    return 0


def _converse(options: argparse.Namespace, guard: Guard) -> int:
    """Answers line after line. A failed question is reported and forgotten."""
    settings, chat = _prepared(options)
    model, load = _load(options)
    media = _media(options)
    question = _prompt(options)
    while True:
        if question is None:
            question = _next_line(guard, waiting_pictures=len(media))
        match (question or "/quit").split(maxsplit=1) if question is not None else ["/quit"]:
            case _:
                pass
    return 0
