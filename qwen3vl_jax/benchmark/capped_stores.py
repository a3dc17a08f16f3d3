"""What is measured under limits: the checkpoint's stores, raw and encoded, and their disk."""

import math
from collections.abc import Callable
from pathlib import Path

from qwen3vl_jax.benchmark.capped import Task
from qwen3vl_jax.benchmark.work import Workload
from qwen3vl_jax.checkpoints.conversion import to_store
from qwen3vl_jax.checkpoints.encodings import everywhere
from qwen3vl_jax.config import load_config
from qwen3vl_jax.planned.figures import disk_reader
from qwen3vl_jax.progress import Silent
from qwen3vl_jax.weights import table


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
        to_store(checkpoint, store, dtype="keep", progress=Silent(), codecs=codecs)
    return store


def disk_of(store: Path) -> Callable[[float], float]:
    """Bytes per second of reading a store for so many seconds."""
    return disk_reader((store / "arrays").rglob("c*"))
