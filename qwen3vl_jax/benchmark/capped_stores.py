"""What is measured under limits: the checkpoint's stores, raw and encoded, and their disk."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from memsched.sizes import parse_size
from qwen3vl_jax.benchmark.capped import Task
from qwen3vl_jax.benchmark.work import Workload
from qwen3vl_jax.checkpoints.conversion import to_store
from qwen3vl_jax.checkpoints.encodings import everywhere
from qwen3vl_jax.config import load_config
from qwen3vl_jax.planned.figures import disk_reader
from qwen3vl_jax.weights import table


def size(text: str) -> int:
    """Bytes of a size like 1.5GB.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def limit(text: str) -> int | float:
    """The same, or the part of 30%.

    Raises:
        argparse.ArgumentTypeError: neither.
    """
    if not text.endswith("%"):
        return size(text)
    try:
        percent = float(text[:-1])
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 1000:
        raise argparse.ArgumentTypeError(f"{text}: a size like 2GB or a part like 30% is wanted")
    return percent / 100


def limit_bytes(limit: int | float, task: Task) -> int:
    """A limit as it is set: a part is one of the raw text weights, beside the process itself."""
    if isinstance(limit, int):
        return limit
    return int(limit * task.text_bytes) + max(task.own_bytes[part] for part in task.limited_parts)


def raw_bytes(work: Workload) -> tuple[int, int]:
    """Of all weights, and of those without vision."""
    item_bytes = {"float32": 4}.get(work.dtype, 2)
    sizes = {entry.path: math.prod(entry.shape) * item_bytes for entry in table(work.config)}
    text = sum(size for path, size in sizes.items() if not path.startswith("visual."))
    return sum(sizes.values()), text


def store_of(checkpoint: Path, codec: str, say: Callable[[str], None]) -> Path:
    """The checkpoint converted to our store, beside it; made unless it is there."""
    form = "" if codec == "raw" else f"-{codec.replace(':', '-')}"
    store = checkpoint.with_name(f"{checkpoint.name}-store{form}")
    if not store.exists():
        say(f"converting to {store}")
        codecs = None if codec == "raw" else everywhere(load_config(checkpoint), codec)
        to_store(checkpoint, store, dtype="keep", progress=_Quiet(), codecs=codecs)
    return store


def disk_of(store: Path) -> Callable[[float], float]:
    """Bytes per second of reading a store for so many seconds."""
    return disk_reader((store / "arrays").rglob("c*"))


class _Quiet:
    """Progress that nobody sees."""

    def stage(self, name: str, total_bytes: int) -> None:
        """A new bar."""

    def advance(self, nbytes: int) -> None:
        """More bytes."""
