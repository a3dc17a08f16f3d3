"""A model in less memory than it has: rounds of measurements under limits, and what they say.

Each limit is one process in a control group of its own. Between the rounds of a process its disk
is measured with the very files of the model: a fraction is the bound over the time, both of one
round.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.benchmark.capped_group import memory_group
from qwen3vl_jax.benchmark.capped_process import Child, ChildError, child

PARTS = ("decode", "lookup", "prompt", "fits")
# What Python, JAX, compiled programs and reading take beside the plan's memory: 220 MB when there
# is a prompt to decode, more with the programs of drafts or of pictures, some for library files.
OWN_BYTES = {"decode": 330_000_000, "lookup": 360_000_000, "prompt": 430_000_000}
SHORT_PROMPT = 16  # tokens before those that are decoded
LOOKUP_TOKENS = 64
LOOKUP_ROOM = 256  # slots of its cache
DISK_S = 1.0
# Bytes that a plan may read beyond what does not fit: the process itself, the ring, caches.
ALLOWED_BYTES = 500_000_000
SPARE_BYTES = 2_000_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What is measured, and with what.

    Attributes:
        store: a converted checkpoint, in `codec`; what is read from disk lies there.
        weight_bytes: of the raw model.
        text_bytes: the same without vision.
        disk: bytes per second of reading the store for so many seconds.
        own_bytes: of a limit, what the process itself takes for each part; the rest is planned.
        parts: which of `PARTS`.
        groups: control groups below which limits may be set.
        peer: the same weights as a Hugging Face directory, if transformers is to decode, too.
    """

    store: Path
    dtype: str
    weight_bytes: int
    text_bytes: int
    own_bytes: Mapping[str, int]
    new_tokens: int
    repeats: int
    prompt_tokens: int
    image: tuple[int, int]
    parts: tuple[str, ...]
    groups: tuple[Path, ...]
    disk: Callable[[float], float]
    say: Callable[[str], None]
    peer: Path | None = None
    codec: str = "raw"

    @property
    def limited_parts(self) -> tuple[str, ...]:
        """Those that a limit is set for."""
        return tuple(part for part in OWN_BYTES if part in self.parts)

    def of_codec(self, codec: str, store: Path, disk: Callable[[float], float]) -> "Task":
        """The same for another store, of what has to do with limits only."""
        parts = self.limited_parts
        return dataclasses.replace(
            self, store=store, codec=codec, disk=disk, parts=parts, peer=None
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """Some tokens in a row, and what the disk could do before and after."""

    disk_bytes_per_s: float
    seconds: float
    compute_s: float
    plan_bytes: int
    read_bytes: int
    weight_bytes: int

    @property
    def bound_s(self) -> float:
        """Seconds of a token that no order of these reads and steps can beat."""
        return max(self.compute_s, self.plan_bytes / self.disk_bytes_per_s)


def measure(task: Task, limits: Iterable[int]) -> dict[str, Any]:
    """All parts of a task, under each limit; what fits is compared with the plain model last."""
    found: dict[str, Any] = {}
    with child(None) as plain:
        if {"prompt", "fits"} & set(task.parts):
            task.say("loading the model into memory, to compare with")
            _order(task, plain, "load", None)
        found["caps"] = [_capped(task, limit, plain) for limit in limits]
        if "fits" in task.parts:
            found["fits"] = _fitting(task, plain)
    return found


def _capped(task: Task, limit: int, plain: Child) -> dict[str, Any]:
    """Every part under one limit, each in a process of its own; one that fails says why."""
    found: dict[str, Any] = {"cap_bytes": limit, "codec": task.codec}
    found |= {"device_memory": {}, "errors": {}}
    measured: dict[str, Callable[[Child], dict[str, Any]]] = {
        "decode": lambda process: summary(_decode_rounds(task, process), limit),
        "lookup": lambda process: {"lookup": _lookup(task, process)},
        "prompt": lambda process: {"prompt": _prompt(task, process, plain)},
    }
    peaks: list[dict[str, Any]] = []
    for part in (part for part in measured if part in task.parts):
        budget = found["device_memory"][part] = limit - task.own_bytes[part]
        task.say(f"{part}: limit {limit:,} B, of which {budget:,} B are planned")
        with memory_group(limit, task.groups) as group:
            found["limited"] = group is not None
            try:
                with child(group) as process:
                    found |= _order(task, process, "load", budget)
                    found |= measured[part](process)
                    peaks.append(process.order("peaks"))
            except ChildError as error:
                found["errors"][part] = str(error)
            if group is not None and group.peak_bytes is not None:
                peaks.append({"peak_bytes": group.peak_bytes})
    for name in ("process_bytes", "ledger_bytes", "peak_bytes"):
        found[name] = max((peak[name] for peak in peaks if name in peak), default=None)
    if task.peer is not None:
        found["transformers"] = _peer(task, task.peer, limit)
    return found


def _peer(task: Task, folder: Path, limit: int) -> dict[str, Any]:
    """transformers under the same limit, decoding as many tokens once."""
    task.say("transformers under the same limit")
    try:
        with memory_group(limit, task.groups) as group, child(group) as process:
            process.order("load_transformers", path=str(folder), dtype=task.dtype)
            return process.order(
                "decode_transformers", text_tokens=SHORT_PROMPT, tokens=task.new_tokens
            )
    except ChildError as error:
        return {"error": str(error)}


def _decode_rounds(task: Task, capped: Child) -> list[Round]:
    counted = task.repeats * (task.new_tokens + 1)
    capped.order("start", text_tokens=SHORT_PROMPT, new_tokens=counted + 2)
    capped.order("decode", tokens=1)
    rounds = []
    after = task.disk(DISK_S)
    for number in range(task.repeats):
        task.say(f"decoding, round {number + 1} of {task.repeats}")
        before = after
        run = capped.order("decode", tokens=task.new_tokens)
        after = task.disk(DISK_S)
        # The better of two: a bound that a busy neighbour lowered would flatter us.
        rounds.append(Round(max(before, after), **run))
    return rounds


def summary(rounds: list[Round], limit: int) -> dict[str, Any]:
    """Medians over the rounds; a fraction is bound over time, both of the same round."""

    def median(value: Callable[[Round], float]) -> float:
        return float(statistics.median(map(value, rounds)))

    last = rounds[-1]
    return {
        "tokens_per_s": 1 / median(lambda round_: round_.seconds),
        "seconds": median(lambda round_: round_.seconds),
        "least_s": min(round_.seconds for round_ in rounds),
        "most_s": max(round_.seconds for round_ in rounds),
        "compute_s": median(lambda round_: round_.compute_s),
        "disk_bytes_per_s": median(lambda round_: round_.disk_bytes_per_s),
        "bound_s": median(lambda round_: round_.bound_s),
        "fraction": median(lambda round_: round_.bound_s / round_.seconds),
        "plan_bytes": last.plan_bytes,
        "read_bytes": median(lambda round_: round_.read_bytes),
        "weight_bytes": last.weight_bytes,
        "wanted_bytes": max(0, last.weight_bytes - limit + ALLOWED_BYTES),
    }


def _lookup(task: Task, capped: Child) -> dict[str, Any]:
    """An answer with drafts and one without: the same tokens, in fewer passes."""
    task.say("answering a repetitive prompt, with and without drafts")
    fewer = max(4, LOOKUP_TOKENS // 8)
    found = {}
    for name, draft, tokens in (
        ("warm", "prompt-lookup", LOOKUP_TOKENS),
        ("drafted", "prompt-lookup", LOOKUP_TOKENS),
        ("plain", None, fewer),
    ):
        found[name] = capped.order("answer", tokens=tokens, draft=draft, room=LOOKUP_ROOM)
    drafted, plain = found["drafted"], found["plain"]
    pairs = zip(drafted["tokens"], plain["tokens"], strict=False)
    return {
        "tokens_per_s": drafted["tokens_per_s"],
        "plain_tokens_per_s": plain["tokens_per_s"],
        "times": drafted["tokens_per_s"] / plain["tokens_per_s"],
        "tokens": LOOKUP_TOKENS,
        "passes": drafted["passes"],
        "accepted": drafted["accepted"],
        "same_tokens": all(one == other for one, other in pairs),
    }


def _prompt(task: Task, capped: Child, plain: Child) -> dict[str, Any]:
    """The long prompt under the limit and in memory, in turn."""
    width, height = task.image
    arguments = {"text_tokens": task.prompt_tokens, "width": width, "height": height}
    runs: dict[str, list[dict[str, Any]]] = {"capped": [], "plain": []}
    for number in range(task.repeats + 1):
        task.say(f"prompt, round {number} of {task.repeats}" + (": warming up" * (number == 0)))
        for name, process in (("capped", capped), ("plain", plain)):
            runs[name].append(process.order("prompt", **arguments))
    counted = {name: found[1:] for name, found in runs.items()}
    seconds = {name: [sum(run.values()) for run in found] for name, found in counted.items()}
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    return {
        "seconds": statistics.median(seconds["capped"]),
        "vision_s": statistics.median(run["vision_s"] for run in counted["capped"]),
        "prefill_s": statistics.median(run["prefill_s"] for run in counted["capped"]),
        "in_memory_s": statistics.median(seconds["plain"]),
        "in_memory_vision_s": statistics.median(run["vision_s"] for run in counted["plain"]),
        "ratio": statistics.median(ratios),
    }


def _fitting(task: Task, plain: Child) -> dict[str, Any]:
    """Decoding with everything in memory: planned and plain, in turn."""
    budget = task.weight_bytes + SPARE_BYTES
    with child(None) as planned:
        task.say(f"a budget of {budget:,} B, in which everything fits")
        _order(task, planned, "load", budget)
        counted = (task.repeats + 1) * (task.new_tokens + 1)
        seconds: dict[str, list[float]] = {"planned": [], "plain": []}
        for process in (planned, plain):
            process.order("start", text_tokens=SHORT_PROMPT, new_tokens=counted)
        for number in range(task.repeats + 1):
            task.say(f"decoding, round {number} of {task.repeats}")
            for name, process in (("planned", planned), ("plain", plain)):
                run = process.order("decode", tokens=task.new_tokens)
                seconds[name].append(run["seconds"])
    pairs = list(zip(*seconds.values(), strict=True))[1:]
    return {
        "seconds": statistics.median(ours for ours, _ in pairs),
        "plain_s": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
    }


def _order(task: Task, process: Child, do: str, budget: int | None) -> dict[str, Any]:
    return process.order(do, path=str(task.store), dtype=task.dtype, device_memory=budget)
