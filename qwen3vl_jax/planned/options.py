"""The command-line options that limit memory, for every script that has them."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3vl_jax.buckets import PREFILL_CHUNK
from qwen3vl_jax.errors import UsageError

LEVELS = ("minimal", "balanced", "aggressive")
KV_CODECS = ("raw", "int8")
NEEDED, FASTER, ALWAYS, NEVER = KV_BLOCKS = ("needed", "faster", "always", "never")
AUTO = "auto"
MOST_CHUNK = 1 << 20


def add_budget_options(parser: argparse.ArgumentParser) -> None:
    """Adds --device-memory and its like. Sizes are checked when they are used."""
    group = parser.add_argument_group(
        "memory",
        "With a limit, weights stay in their files and are brought as a plan says. Sizes are like "
        "512MB, 1.5GiB, or plain bytes.",
    )
    add = group.add_argument
    add(
        "--device-memory",
        metavar="SIZE",
        help="for weights, caches and computing; Python and JAX take up to 0.5 GB beside it",
    )
    add("--host-memory", metavar="SIZE", help="main memory beside an accelerator")
    add("--nvme-dir", type=Path, metavar="DIR", help="where arrays may be moved out to")
    add("--nvme-space", metavar="SIZE", help="how much of that directory; reserved at once")
    add(
        "--level",
        choices=LEVELS,
        default=LEVELS[0],
        help="minimal changes no bit; others encode raw weights: in memory, or, with limits, once "
        "into a store in --nvme-dir",
    )
    add(
        "--kv",
        choices=KV_CODECS,
        help="how KV caches are stored; int8 takes half of bfloat16's bytes (default: the level's)",
    )
    _add_forms(group)
    add(
        "--report",
        dest="reports",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="what the plan does, as FILE.txt, .json, .html or .perfetto.json; can be repeated",
    )
    add("--save-plan", type=Path, metavar="JSON", help="write the plan for generate.py --plan")
    add("--machine", type=Path, metavar="TOML", help="rates and sizes of the machine, unmeasured")
    add(
        "--plan-seconds",
        type=_seconds,
        metavar="S",
        help="try plans for about so long (default: in plan.py as long as is usual, a few seconds; "
        "1 for a run)",
    )


def _add_forms(group: argparse._ArgumentGroup) -> None:
    """Adds what changes the rounding of an answer: forms of KV caches, chunks of prompts."""
    add = group.add_argument
    add(
        "--kv-blocks",
        choices=KV_BLOCKS,
        default=NEEDED,
        help="whether KV caches lie in blocks, of which full ones rest in --nvme-dir: where needed "
        "to fit (default), where that is predicted to be faster, always, or never. Blocks change "
        "the rounding of an answer, as a larger batch does",
    )
    add(
        "--chunk",
        type=_chunk,
        default=PREFILL_CHUNK,
        metavar="N",
        help=f"tokens of a prompt that pass through the layers at once ({PREFILL_CHUNK}); auto: a "
        "power of two from 128 to 4096, whichever is predicted to be fastest for all of a request. "
        "It changes the rounding, too",
    )


def budget_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What those options say, as arguments of `Qwen3VL.from_pretrained` and of `Budgets`."""
    names = ("device_memory", "host_memory", "nvme_dir", "nvme_space", "level", "machine")
    more = ("plan_seconds", "kv", "kv_blocks", "chunk")
    return {name: getattr(options, name) for name in (*names, *more)}


def leaves_open(kv_blocks: str, chunk: int | str) -> bool:
    """Whether a form of a KV cache or a chunk is to be chosen, though the usual ones would fit."""
    return kv_blocks not in (NEEDED, NEVER) or chunk == AUTO


def check_forms(kv_blocks: str, chunk: int | str) -> None:
    """Whether there are such forms of a KV cache, and such chunks of a prompt.

    Raises:
        UsageError: there are not.
    """
    if kv_blocks not in KV_BLOCKS:
        raise UsageError(
            f"kv_blocks {ascii(kv_blocks)[:60]} is unknown; choose one of {', '.join(KV_BLOCKS)}"
        )
    counted = type(chunk) is int and 1 <= chunk <= MOST_CHUNK
    if not counted and chunk != AUTO:
        raise UsageError(
            f"chunk {ascii(chunk)[:60]} is no count from 1 to {MOST_CHUNK:,} tokens; give one, or "
            f"{AUTO!r}"
        )


def say_ignored(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """A line if the user's own calibration is damaged: nobody named it, so nothing is refused."""
    from memsched.detection.calibrated import damage

    found = damage() if options.machine is None else None
    if found is not None:
        say(f"ignored what was learned of this machine: {found}")


def _chunk(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or len(text) > len(str(MOST_CHUNK)) or not 1 <= int(text) <= MOST_CHUNK:
        raise argparse.ArgumentTypeError(
            f"{text[:60]} is no count from 1 to {MOST_CHUNK:,} tokens, and not {AUTO}"
        )
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, 0 or more")
    return seconds
