"""What a prompt cache may have of a request, and whether it is worth bringing."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from qwen3vl_jax.cache import KVCache
from qwen3vl_jax.config import Config
from qwen3vl_jax.inputs import Part
from qwen3vl_jax.prompt_files import Entries, Form, nbytes_of
from qwen3vl_jax.prompt_keys import Shown


@runtime_checkable
class Estimates(Protocol):
    """Predicts seconds, and keeps budgets."""

    def restoring_s(self, nbytes: int) -> float:
        """To bring so many bytes from the disk to where they are read."""

    def chunk_s(self, tokens: int, cache: KVCache) -> float:
        """To take a chunk of a prompt in."""

    def piece_s(self, piece: Any, rows: int) -> float:
        """To encode a piece, of which only shapes count. There are `rows` of features."""

    def make_room(self, nbytes: int, beside: Any) -> bool:
        """Before so many bytes are allocated in every memory, beside a cache and these arrays.

        Returns whether that is within the budgets.
        """


@dataclasses.dataclass(slots=True)
class Item:
    """A chunk of tokens, or pictures that are encoded together.

    `restoring_s` and `computing_s` are predicted, if there is an entry. What became of it is
    `restored`, which begins as the decision, `needed` and `stored_bytes`.
    """

    what: str
    key: str
    forms: tuple[Form, ...]
    restoring_s: float | None = None
    computing_s: float | None = None
    restored: bool = False
    needed: bool = True
    stored_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        return nbytes_of(self.forms)

    def to_dict(self) -> dict[str, Any]:
        """For a script's JSON."""
        names = ("what", "nbytes", "restored", "needed", "restoring_s", "computing_s")
        return {name: getattr(self, name) for name in (*names, "stored_bytes")}


def items_text(items: Sequence[Item]) -> str:
    """A line of what was restored, and one of what was there but is faster to compute."""
    restored = [item for item in items if item.restored]
    slower = [item for item in items if item.restoring_s is not None and not item.restored]
    slower = [item for item in slower if item.needed]
    idle = sum(not item.needed for item in items)
    lines = [
        f"Prompt cache: {len(restored)} of {len(items)} parts restored{_seconds(restored)}, "
        f"{idle} not needed, {sum(item.stored_bytes for item in items):,} B stored"
    ]
    if slower:
        lines.append(f"Prompt cache: {len(slower)} computed all the same{_seconds(slower)}")
    return "\n".join(lines)


def _seconds(items: Sequence[Item]) -> str:
    if not items:
        return ""
    restoring_s = sum(item.restoring_s or 0.0 for item in items)
    computing_s = sum(item.computing_s or 0.0 for item in items)
    nbytes = sum(item.nbytes for item in items)
    return f" ({nbytes:,} B: predicted {restoring_s:.3g} s, to compute {computing_s:.3g} s)"


def chunk_item(key: str, part: Part, config: Config, cache: KVCache) -> Item:
    """Keys and values of a part of a prompt, layer by layer, and the last hidden values."""
    dtype = _dtype(cache)
    forms = [
        ((*leaf.shape[:-2], part.tokens, leaf.shape[-1]), dtype)
        for leaf in jax.tree.leaves(cache.layers)
    ]
    last = (cache.batch, 1, config.text.hidden_size), dtype
    return Item(f"tokens {part.first:,} to {part.end - 1:,}", key, (*forms, last))


def piece_item(one: Shown, config: Config, cache: KVCache) -> Item:
    """The features of every frame, set by set."""
    frames, tokens = one.rows.shape
    sets = 1 + len(config.vision.deepstack_visual_indexes)
    form = (tokens, config.text.hidden_size), _dtype(cache)
    return Item(f"{frames} x {one.patches:,} patches", one.key, (form,) * frames * sets)


def decide(
    entries: Entries,
    chunks: Sequence[Item],
    pieces: Sequence[Item],
    read: Sequence[Sequence[int]],
    *,
    restoring_s: Callable[[int], float],
    chunk_s: Callable[[int], float],
    piece_s: Callable[[int], float],
) -> None:
    """Says of every item whether it is to be restored, and of pictures whether they are needed.

    To compute a chunk takes the pictures that it reads, too.

    Args:
        read: the pieces that each chunk reads.
        restoring_s: predicted seconds to bring so many bytes.
        chunk_s: predicted seconds to compute a chunk by its index; `piece_s` the same of a piece.
    """

    def least_s(index: int) -> float:
        found = pieces[index].restoring_s if pieces[index].restored else None
        return piece_s(index) if found is None else found

    def with_pictures_s(index: int) -> float:
        return chunk_s(index) + sum(map(least_s, read[index]))

    # Pictures first: what they take is part of what a chunk takes.
    for items, computing_s in ((pieces, piece_s), (chunks, with_pictures_s)):
        for index, item in enumerate(items):
            if entries.has(item.key, item.forms):
                item.restoring_s, item.computing_s = restoring_s(item.nbytes), computing_s(index)
                item.restored = item.restoring_s <= item.computing_s
    computed = [found for item, found in zip(chunks, read, strict=True) if not item.restored]
    for index, item in enumerate(pieces):
        item.needed = any(index in found for found in computed)
        item.restored = item.restored and item.needed


def _dtype(cache: KVCache) -> np.dtype:
    return np.dtype(jax.tree.leaves(cache.layers)[0].dtype)
