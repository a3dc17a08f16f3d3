"""A prompt cache on disk: what was computed of a prompt once need not be computed again.

Of a request, every chunk of tokens that has an entry is restored if that is predicted to be faster
than computing it and the pictures it reads; the same for the pictures that are still needed. Both
have the same bits. A cache can neither stop nor change an answer: what is damaged, or cannot be
written, is said in one line, and computed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen3vl_jax import text
from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.cache import KVCache
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import BadInputError, StorageError
from qwen3vl_jax.inputs import Part, cut, feature_count, parts, picture_pieces, prepare
from qwen3vl_jax.network import Chunk, Features
from qwen3vl_jax.prompt_files import Entries, nbytes_of
from qwen3vl_jax.prompt_items import Estimates, Item, chunk_item, decide, items_text, piece_item
from qwen3vl_jax.prompt_keys import Shown, chunk_keys, read_by, shown

Place = tuple[int, int]  # which array, and the slot or row from which on


@dataclasses.dataclass(frozen=True, slots=True)
class Recall:
    """A request, cut into what a prompt cache may have of it, and what it has."""

    cache: "PromptCache"
    tokens: Chunk
    parts: tuple[Part, ...]
    shown: tuple[Shown, ...]
    chunks: tuple[Item, ...]
    pieces: tuple[Item, ...]

    @property
    def all_restored(self) -> bool:
        """Whether no chunk is to be computed, so that no picture is looked at."""
        return all(item.restored for item in self.chunks)

    def restore_piece(self, index: int, features: Features) -> tuple[bool, Features]:
        """Whether a piece could be restored, and the features, which it consumes."""
        item = self.pieces[index]
        leaves, tree = jax.tree.flatten(features)
        rows = self._rows(index, leaves)
        done = item.restored and self.cache.read_into(item, leaves, rows, features)
        return done, jax.tree.unflatten(tree, leaves)

    def store_piece(self, index: int, features: Features) -> None:
        """Keeps the features of a piece that was encoded just now."""
        leaves = jax.tree.leaves(features)
        self.cache.write_from(self.pieces[index], leaves, self._rows(index, leaves), features)

    def restore_chunk(
        self, index: int, cache: KVCache, kept: Float[Array, "B 1 H"], beside: Any
    ) -> tuple[bool, KVCache, Float[Array, "B 1 H"]]:
        """Whether a chunk could be restored, and the cache and the last hidden values after it.

        Consumes both. If it could not, slots that nobody sees yet may have changed.

        Args:
            beside: other arrays that exist meanwhile.
        """
        part = self.parts[index]
        leaves, tree = jax.tree.flatten(cache.layers)
        arrays = [*leaves, jnp.zeros_like(kept)]
        slots = _slots(arrays, part, cache)
        done = self.cache.read_into(self.chunks[index], arrays, slots, beside)
        cache = dataclasses.replace(cache, layers=jax.tree.unflatten(tree, arrays[:-1]))
        if not done:
            return False, cache, kept
        new = cut(self.tokens, part.first, part.end, part.tokens).valid
        valid = text.mark_valid(cache.valid, new, np.int32(cache.length))
        kept = jnp.where(part.ends(self.tokens)[:, None, None], arrays[-1], kept)
        return True, cache.after(part.end - part.first, cache.layers, valid), kept

    def store_chunk(
        self, index: int, cache: KVCache, kept: Float[Array, "B 1 H"], beside: Any
    ) -> None:
        """Keeps what the cache has of a chunk that was computed just now."""
        arrays = [*jax.tree.leaves(cache.layers), kept]
        slots = _slots(arrays, self.parts[index], cache)
        self.cache.write_from(self.chunks[index], arrays, slots, beside)

    def _rows(self, index: int, leaves: Sequence[Array]) -> list[Place]:
        """Where the frames of a piece are in the features."""
        firsts = [int(frame[0]) for frame in self.shown[index].rows]
        return [(leaf, first) for leaf in range(len(leaves)) for first in firsts]


def _slots(arrays: Sequence[Array], part: Part, cache: KVCache) -> list[Place]:
    """Where a part of a prompt is in the layers of a cache; the last array is read as a whole."""
    first = part.first if cache.block_slots is None else part.first % cache.block_slots
    return [*((index, first) for index in range(len(arrays) - 1)), (len(arrays) - 1, 0)]


@dataclasses.dataclass(slots=True)
class PromptCache:
    """Where entries are, what is part of all their keys, and how to decide.

    `warn` gets one line when an entry is damaged or cannot be written. `latest` is the newest
    request, None if it continued another.
    """

    entries: Entries
    identity: str
    estimates: Estimates
    warn: Callable[[str], None]
    writable: bool = True
    latest: Recall | None = None

    def recall(
        self, config: Config, inputs: Mapping[str, Any], cache: KVCache, chunk_tokens: int
    ) -> Recall:
        """Decides for a request whose cache is empty.

        Raises:
            UsageError: as `inputs.prepare`.
        """
        tokens = prepare(config, inputs, start=cache.next_position, pictures=False)[0].tokens
        cuts = tuple(parts(tokens.input_ids.shape[1], cache, chunk_tokens))
        pictures = tuple(shown(self.identity, piece) for piece in picture_pieces(config, inputs))
        keys = chunk_keys(self.identity, cache, cuts, tokens, pictures)
        pieces = tuple(piece_item(one, config, cache) for one in pictures)
        chunks = tuple(
            chunk_item(key, part, config, cache) for key, part in zip(keys, cuts, strict=True)
        )
        read = [read_by(cut(tokens, p.first, p.end, p.tokens), pictures) for p in cuts]
        rows = feature_count(config, inputs)
        decide(
            self.entries,
            chunks,
            pieces,
            read,
            restoring_s=self.estimates.restoring_s,
            chunk_s=lambda index: self.estimates.chunk_s(cuts[index].tokens, cache),
            piece_s=lambda index: self.estimates.piece_s(pictures[index].shapes, rows),
        )
        self.entries.touch([item.key for item in (*chunks, *pieces) if item.restored])
        self.latest = Recall(self, tokens, cuts, pictures, chunks, pieces)
        return self.latest

    def text(self) -> str:
        """What became of the newest request."""
        if self.latest is None:
            return "Prompt cache: not asked, what was said before is in memory"
        return items_text((*self.latest.chunks, *self.latest.pieces))

    def to_dict(self) -> dict[str, Any]:
        """The same as data: "parts" of the prompt and of its pictures."""
        found = () if self.latest is None else (*self.latest.chunks, *self.latest.pieces)
        return {
            "directory": str(self.entries.directory),
            "used_bytes": self.entries.used_bytes,
            "parts": [item.to_dict() for item in found],
        }

    def read_into(
        self, item: Item, arrays: list[Array], places: Sequence[Place], beside: Any
    ) -> bool:
        """Puts what an entry has into these arrays; returns whether all of it could be read.

        What was put there before that failed stays.
        """
        read = self.entries.read(item.key, item.forms)
        try:
            self._check_room(item, beside)
            for place, first in places:
                put = _put_in(arrays[place], next(read), np.int32(first))
                arrays[place] = jax.block_until_ready(put)
        except (BadInputError, StorageError) as error:
            item.restored = False
            if isinstance(error, BadInputError):
                self.entries.forget(item.key)
            self.warn(f"prompt cache: {error}; {item.what} are computed again")
        return item.restored

    def write_from(
        self, item: Item, arrays: Sequence[Array], places: Sequence[Place], beside: Any
    ) -> None:
        """Makes an entry of parts of these arrays."""

        def copied() -> Iterator[np.ndarray]:
            for (place, first), (shape, _) in zip(places, item.forms, strict=True):
                yield np.asarray(_cut_out(arrays[place], np.int32(first), count=shape[-2]))

        if not self.writable:
            return
        try:
            self._check_room(item, beside)
            item.stored_bytes = self.entries.write(item.key, item.forms, copied())
        except StorageError as error:
            self.writable = False
            self.warn(f"prompt cache: {error}; nothing more is kept in this run")

    def _check_room(self, item: Item, beside: Any) -> None:
        """Raises StorageError if no array of an entry may lie in memory beside all others."""
        nbytes = 2 * max(nbytes_of([form]) for form in item.forms)
        if not self.estimates.make_room(nbytes, beside):
            raise StorageError(f"{nbytes:,} B for {item.what} are not within the budgets")


@functools.partial(jax.jit, donate_argnames="array")
def _put_in(
    array: Float[Array, "*rows S D"], part: Float[AnyArray, "*rows T D"], first: Int[AnyArray, ""]
) -> Float[Array, "*rows S D"]:
    return jax.lax.dynamic_update_slice_in_dim(array, part, first, array.ndim - 2)


@functools.partial(jax.jit, static_argnames="count")
def _cut_out(
    array: Float[Array, "*rows S D"], first: Int[AnyArray, ""], *, count: int
) -> Float[Array, "*rows T D"]:
    return jax.lax.dynamic_slice_in_dim(array, first, count, array.ndim - 2)
