"""Answer questions about pictures and videos with a Qwen3-VL checkpoint.

python scripts/generate.py --image cat.jpg --prompt "What is this?"
python scripts/generate.py --model DIR --interactive
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memsched.errors import MemschedError
from qwen3vl_jax import console
from qwen3vl_jax.answer_options import add_question, add_settings, check_options
from qwen3vl_jax.errors import Qwen3VLError
from qwen3vl_jax.interrupts import Guard, Meaning
from qwen3vl_jax.planned.options import add_budget_options, budget_arguments, say_ignored
from qwen3vl_jax.progress import ProgressBar, Silent

if TYPE_CHECKING:
    from qwen3vl_jax import Qwen3VL
    from qwen3vl_jax.chat import Chat, Turn
    from qwen3vl_jax.generation_settings import GenerationSettings
    from qwen3vl_jax.planned.saved import SavedPlans

SHIPPED_CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "checkpoint"
# One more than a picture may have: the reader of pictures then says that it is too large.
MAX_STDIN_BYTES = (64 << 20) + 1
COMMANDS = "/image PATH, /clear, /stats, /quit"

Part = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, and what it took to get it there."""

    model: "Qwen3VL"
    seconds: float
    read_bytes: int | None


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question, or many with --interactive. Returns an exit code of `console.run`."""
    return console.main(_parse, _work, argv)


def _work(options: argparse.Namespace, guard: Guard) -> int:
    return (_converse if options.interactive else _answer_once)(options, guard)


# ---- the command line ----


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.described(__doc__)
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=SHIPPED_CHECKPOINT,
        metavar="DIR",
        help="a checkpoint directory (default: the small one that is shipped)",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add_question(parser)
    add_settings(parser)
    add_budget_options(parser)
    add("--interactive", action="store_true", help=f"chat: {COMMANDS}; Ctrl-C stops an answer")
    add("--max-context", type=int, metavar="N", help="room for so many tokens, and no more")
    add("--prompt-cache", type=Path, metavar="DIR", help="keep what prompts take, and look there")
    add("--prompt-cache-space", metavar="SIZE", help="how much of that directory; default: 4GB")
    add("--plan", type=Path, metavar="JSON", help="carry out what --save-plan has written")
    add("--learn", action="store_true", help="add what is measured to the machine's calibration")
    add("--adapt", action="store_true", help="give memory back while others need it")
    add("--dry-run", action="store_true", help="say what it would take; open no weight")
    add("--json", action="store_true", help="write one JSON object to stdout, not the text")
    add("-q", "--quiet", action="store_true", help="no statistics and no progress on stderr")
    options = parser.parse_args(argv)
    check_options(options)
    return options


# ---- one answer ----


def _answer_once(options: argparse.Namespace, guard: Guard) -> int:
    saved = _checked_files(options)
    parts = _question(options)
    settings, chat = _prepared(options)
    turn = chat.prepare(parts)
    if options.dry_run:
        return _print_forecast(options, turn, settings)
    loaded = _load(options)
    if saved is not None:
        from qwen3vl_jax.planned.saving import adopt

        adopt(loaded.model, saved, turn.inputs, settings.max_new_tokens)
    with _adapting(options, loaded.model):
        for piece in chat.ask(loaded.model, turn):
            if not options.json:
                print(piece, end="", flush=True)
    if not options.json:
        print(flush=True)
    if not options.quiet:
        _print_statistics(chat, settings, loaded)
    if options.json:
        print(json.dumps(_report(chat, settings, loaded)), flush=True)
    if options.reports:
        from qwen3vl_jax.planned.dry_run import write_report

        for path in options.reports:
            write_report(path, loaded.model.plan)
    if options.learn:
        from qwen3vl_jax.planned.learning import learn

        console.say(learn(loaded.model, options.machine).text())
    loaded.model.close()
    return 0


def _adapting(options: argparse.Namespace, model: "Qwen3VL") -> AbstractContextManager[object]:
    """Lets a model adapt to memory pressure, if that is asked for."""
    if not options.adapt:
        return contextlib.nullcontext()
    from qwen3vl_jax.planned.adapt import adapting

    return adapting(model, say=None if options.quiet else console.say)


def _checked_files(options: argparse.Namespace) -> "SavedPlans | None":
    """Reads --plan, and sees that --report and --save-plan can be written, before anything else."""
    if options.reports:
        from qwen3vl_jax.planned.dry_run import check_reports

        check_reports(options.reports)
    if options.learn:
        from qwen3vl_jax.planned.learning import check_learning

        check_learning(options.machine)
    if options.save_plan is not None:
        from memsched.whole_file import check_target

        check_target(options.save_plan)
    if options.plan is None:
        return None
    from qwen3vl_jax.planned.saved import read_plans

    return read_plans(options.plan)


def _print_forecast(
    options: argparse.Namespace, turn: "Turn", settings: "GenerationSettings"
) -> int:
    from qwen3vl_jax.planned.dry_run import dry_run_of, print_dry_run

    say_ignored(options, console.say)
    budgets = _budgets(options)
    found = dry_run_of(options.model, options.dtype, turn.inputs, settings.max_new_tokens, budgets)
    return print_dry_run(
        found, reports=options.reports, save_plan=options.save_plan, as_json=options.json
    )


def _question(options: argparse.Namespace) -> list[Part]:
    parts = [_media_part(options, kind, source) for kind, source in options.media]
    if options.prompt is None and options.prompt_file is None:
        return parts
    return [*parts, {"type": "text", "text": _prompt(options)}]


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt not in (None, "-"):
        return str(options.prompt)
    file = None if options.prompt == "-" else Path(options.prompt_file)
    return console.read_text(file, MAX_STDIN_BYTES)


def _media_part(options: argparse.Namespace, kind: str, source: str) -> Part:
    part: Part = {
        "type": kind,
        kind: sys.stdin.buffer.read(MAX_STDIN_BYTES) if source == "-" else source,
        "min_pixels": options.min_pixels,
        "max_pixels": options.max_pixels,
    }
    if kind == "video":
        part |= {"fps": options.fps, "num_frames": options.num_frames}
    return part


def _prepared(options: argparse.Namespace) -> tuple["GenerationSettings", "Chat"]:
    """Settings and a chat, before any weight is read: mistakes should show at once."""
    import secrets

    from qwen3vl_jax.generation_settings import load_settings

    filtered = (options.top_k, options.top_p, options.min_p) != (None, None, None)
    sample = None if options.temperature is not None or not filtered else True
    settings = load_settings(options.model).override(
        max_new_tokens=options.max_new_tokens,
        do_sample=False if options.greedy else sample,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        seed=secrets.randbits(32) if options.seed is None else options.seed,
        stop_strings=options.stop,
        draft=options.draft,
    )
    from qwen3vl_jax import Processor

    processor = Processor.from_pretrained(options.model)
    from qwen3vl_jax.chat import Chat

    return settings, Chat(processor, settings, system=options.system_prompt)


def _budgets(options: argparse.Namespace) -> dict[str, Any]:
    return budget_arguments(options) | {"max_context": options.max_context}


def _opened(options: argparse.Namespace) -> "Qwen3VL":
    """A model; one with plans, whatever is free, where they are given or to be reported."""
    budgets = _budgets(options)
    wanted = options.plan is not None or bool(options.reports)
    display = Silent() if options.quiet else ProgressBar()
    if wanted or options.adapt or options.learn:
        from qwen3vl_jax.planned.loading import Budgets, load

        limits = Budgets(**budgets)
        return load(options.model, dtype=options.dtype, budgets=limits, display=display)
    from qwen3vl_jax import Qwen3VL

    return Qwen3VL.from_pretrained(options.model, dtype=options.dtype, display=display, **budgets)


def _remembering(options: argparse.Namespace) -> "Qwen3VL":
    """A model with a prompt cache; a place that cannot be one shows before any weight is read."""
    from qwen3vl_jax.planned.recalling import entries_in, keep_prompts

    place = options.prompt_cache, options.prompt_cache_space
    entries_in(*place)
    model = _opened(options)
    keep_prompts(model, options.model, *place, encoded_by=(None, options.level), warn=console.say)
    return model


def _load(options: argparse.Namespace) -> Loaded:
    say_ignored(options, console.say)
    if not options.quiet:
        console.say(f"loading {options.model}")
    started, read_before = time.perf_counter(), console.read_bytes()
    model = _remembering(options) if options.prompt_cache is not None else _opened(options)
    model.wait()
    read = console.read_bytes()
    return Loaded(
        model,
        time.perf_counter() - started,
        None if read is None or read_before is None else read - read_before,
    )


# ---- statistics ----


def _print_statistics(chat: "Chat", settings: "GenerationSettings", loaded: Loaded) -> None:
    answer = chat.last
    if answer is None:
        console.say("no answer yet")
        return
    computed_s = answer.vision_s + answer.prefill_s
    rate = "" if answer.tokens_per_s is None else f", {answer.tokens_per_s:.1f} tokens/s"
    seed = "" if settings.greedy else f", seed {settings.seed}"
    console.say(
        f"Prompt: {answer.prompt_tokens} tokens, {answer.prompt_tokens / computed_s:.1f} tokens/s "
        f"(vision {answer.vision_s:.2f} s, prefill {answer.prefill_s:.2f} s)\n"
        f"Generation: {len(answer.tokens)} tokens{rate}{seed}\n"
        f"Peak memory: {console.peak_process_bytes() / 1e9:.2f} GB; "
        f"loaded in {loaded.seconds:.2f} s; {chat.cached_tokens} tokens in the cache"
    )
    if loaded.model.prompt_cache is not None:
        console.say(loaded.model.prompt_cache.text())


def _report(chat: "Chat", settings: "GenerationSettings", loaded: Loaded) -> dict[str, Any]:
    from qwen3vl_jax.planned.dry_run import run_figures

    answer = chat.last
    assert answer is not None
    planned = run_figures(loaded.model)
    kept = loaded.model.prompt_cache
    return planned | {
        "prompt_cache": None if kept is None else kept.to_dict(),
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "ending": answer.ending,
        "seed": None if settings.greedy else settings.seed,
        "seconds": {
            "load": loaded.seconds,
            "vision": answer.vision_s,
            "prefill": answer.prefill_s,
            "decode": answer.decode_s,
        },
        "decode_tokens_per_s": answer.tokens_per_s,
        "peak_bytes": {
            "process": console.peak_process_bytes(),
            **planned.get("peak_bytes", {}),
        },
        "read_bytes": planned.get("read_bytes", loaded.read_bytes),
    }


# ---- a conversation ----


def _converse(options: argparse.Namespace, guard: Guard) -> int:
    """Answers line after line until /quit or Ctrl-D."""
    settings, chat = _prepared(options)
    waiting = _question(options)
    loaded = _load(options)
    with _adapting(options, loaded.model):
        _talk(options, guard, settings, chat, loaded, waiting)
    return 0


def _talk(
    options: argparse.Namespace,
    guard: Guard,
    settings: "GenerationSettings",
    chat: "Chat",
    loaded: Loaded,
    waiting: list[Part],
) -> None:
    if options.prompt is not None or options.prompt_file is not None:
        _answer_aloud(chat, loaded, waiting, guard)
        waiting = []
    for line in _typed_lines(guard):
        match line.split(maxsplit=1):
            case []:
                pass
            case ["/quit"]:
                break
            case ["/clear"]:
                chat.clear()
                waiting = []
            case ["/stats"]:
                _print_statistics(chat, settings, loaded)
            case ["/image", path]:
                waiting.append(_media_part(options, "image", path))
            case [word, *_] if word.startswith("/"):
                console.say(f"{word} cannot be done; there are {COMMANDS}")
            case _:
                _answer_aloud(chat, loaded, [*waiting, {"type": "text", "text": line}], guard)
                waiting = []


def _answer_aloud(chat: "Chat", loaded: Loaded, parts: list[Part], guard: Guard) -> None:
    """Prints one answer. A question that fails is reported and forgotten."""
    try:
        with guard.meaning(Meaning.STOP):
            turn = chat.prepare(parts)
            for piece in chat.ask(loaded.model, turn, lambda: guard.stop_requested):
                print(piece, end="", flush=True)
            print(flush=True)
    except (Qwen3VLError, MemschedError) as error:
        console.failed(error, debug=False)


def _typed_lines(guard: Guard) -> Iterator[str]:
    """Lines from a terminal, with editing, or from a pipe; ends at the end of input."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then has history and editing
        console.say(f"Ctrl-D leaves, Ctrl-C stops an answer; {COMMANDS}")
    while True:
        try:
            with guard.meaning(Meaning.RAISE):
                line = input("> ") if terminal else sys.stdin.readline()
        except KeyboardInterrupt:
            console.say("\nCtrl-D leaves")
            continue
        except EOFError:
            return
        if not terminal and not line:
            return
        yield line.strip()


if __name__ == "__main__":
    console.leave(main())
