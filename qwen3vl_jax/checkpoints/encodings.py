"""Arrays that rest in fewer bytes: which ones may, and in which of the formats of memsched.codecs.

An encoded array is one array of another shape and dtype (`packed`), which follow from the codec,
the raw shape and the raw dtype. Model and plans use it as it lies; readers of weights get it
decoded.

A tied model's head is its embedding table, of which rows are looked up. So the head gets an encoded
copy of its own, `lm_head.weight`, and the table stays raw.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np

from memsched.codecs import Codec, Fitted, parse_codec
from qwen3vl_jax.checkpoints.files import DTYPES, STORED_DTYPES, aligned_empty
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.weights import Entry, arrays

HEAD = "lm_head.weight"
# Rows of these are looked up, one by one.
TABLES = ("language_model.embed_tokens.weight", "visual.pos_embed.weight")
# What --codec int4 means: 4.5 bits for each number.
SHORT_NAMES = {"int4": "int4:32"}
PIECE_NUMBERS = 1 << 21  # what one thread encodes at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Encoding:
    """The codec of an array by its name, and shape and dtype of what it stands for."""

    codec: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def format(self) -> Codec:
        """The codec itself."""
        return parse_codec(self.codec)

    @property
    def packed(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of the array that is stored."""
        return self.format.packed(self.shape, self.dtype)

    @property
    def keeps_rows(self) -> bool:
        """Whether row i of what is stored is row i of the raw array, so that it can be cut."""
        return self.format.cut == 1

    @property
    def saves(self) -> bool:
        """Whether it takes fewer bytes than the raw array."""
        raw_bytes = math.prod(self.shape) * DTYPES[self.dtype].itemsize
        return self.format.nbytes(self.shape, self.dtype) < raw_bytes

    def part(self, rows: tuple[int, int] | None) -> "Encoding":
        """That of a half-open range of rows; None are all."""
        if rows is None:
            return self
        return dataclasses.replace(self, shape=(rows[1] - rows[0], *self.shape[1:]))


Encodings = Mapping[str, Encoding]
NOTHING_ENCODED: Encodings = MappingProxyType({})


def codec_name(text: str) -> str:
    """The full name of a codec.

    Raises:
        memsched.errors.ProgramError: there is none of this name.
    """
    return parse_codec(SHORT_NAMES.get(text, text)).name


def encodable(config: Config) -> tuple[Entry, ...]:
    """Arrays that may be encoded: those that are only multiplied with. All have two axes."""
    found = arrays(with_own_head(config))
    return tuple(e for e in found if len(e.shape) == 2 and e.path not in TABLES)


def everywhere(config: Config, codec: str) -> dict[str, str]:
    """One codec for the matrices of all decoder layers, routers excepted, and for the head.

    The head is read in blocks of rows; it stays raw where the codec's rows cannot be cut.
    """
    name = codec_name(codec)
    return {
        entry.path: name
        for entry in encodable(config)
        if not entry.path.startswith("visual.")
        and not entry.path.endswith(".mlp.gate.weight")
        and not (entry.path == HEAD and parse_codec(name).cut != 1)
    }


def encodings_of(
    config: Config, codecs: Mapping[str, str], dtype_of: Callable[[Entry], np.dtype]
) -> dict[str, Encoding]:
    """The encodings that make arrays smaller; those of others are left out.

    Args:
        codecs: the codec's name for each path.
        dtype_of: the raw dtype of an array.

    Raises:
        UsageError: a path that cannot be encoded, or not so; or nothing would become smaller.
        memsched.errors.ProgramError: a codec that does not exist.
    """
    entries = {entry.path: entry for entry in encodable(config)}
    found = {}
    for path, codec in codecs.items():
        name = codec_name(codec)
        if path not in entries:
            raise UsageError(
                f"{path!r} cannot be encoded: it is no matrix of this model that is only "
                "multiplied with; leave it out"
            )
        if name == "raw":
            continue
        encoding = Encoding(name, entries[path].shape, dtype_of(entries[path]).name)
        if path == HEAD and not encoding.keeps_rows:
            raise UsageError(
                f"{path!r} cannot be {name}: it is read in blocks of rows; choose int8 or int4"
            )
        if encoding.saves:
            found[path] = encoding
    if codecs and not found:
        raise UsageError("these codecs make no array smaller; choose others, or none")
    return found


def fault_of(encodings: Encodings, config: Config) -> str | None:
    """What is wrong with encodings that a file names for arrays of the model, if anything."""
    allowed = {entry.path for entry in encodable(config)}
    for path in sorted(encodings.keys() - allowed):
        return f"{path!r} is encoded, which it cannot be"
    if HEAD in encodings and not encodings[HEAD].keeps_rows:
        return f"{HEAD!r} is {encodings[HEAD].codec}, whose rows cannot be cut"
    return None


def with_own_head(config: Config) -> Config:
    """The same model with a head that is not its embedding table."""
    return dataclasses.replace(config, tie_word_embeddings=False)


def as_encoded(config: Config, encodings: Mapping[str, object]) -> Config:
    """The model as it runs with these encodings: a tied head that is encoded is one of its own."""
    return with_own_head(config) if HEAD in encodings else config


def decoded_bytes(entries: Iterable[Entry], dtype_of: Callable[[Entry], np.dtype]) -> int:
    """What arrays take as numbers."""
    return sum(math.prod(entry.shape) * dtype_of(entry).itemsize for entry in entries)


def encoding_of(entry: Entry, encodings: Encodings) -> Encoding | None:
    """That of an array, or of the rows of one; None of a raw one."""
    found = encodings.get(entry.array)
    return None if found is None else found.part(entry.rows)


def form_of(entry: Entry, encodings: Encodings, dtype: np.dtype) -> tuple[tuple[int, ...], str]:
    """Shape and dtype that an array rests in, if `dtype` is that of raw ones."""
    found = encoding_of(entry, encodings)
    return (entry.shape, dtype.name) if found is None else found.packed


def resting_bytes(entries: Iterable[Entry], encodings: Encodings, dtype: np.dtype) -> int:
    """What arrays take as they rest."""
    forms = (form_of(entry, encodings, dtype) for entry in entries)
    return sum(math.prod(shape) * STORED_DTYPES[name].itemsize for shape, name in forms)


def origin(entry: Entry, config: Config) -> Entry:
    """Where a raw checkpoint has the values of an array: a tied head's are in the table."""
    if entry.array != HEAD or not config.tie_word_embeddings:
        return entry
    path = TABLES[0] + entry.path.removeprefix(HEAD)
    return dataclasses.replace(entry, path=path, hf_name=f"model.{TABLES[0]}")


def origins(config: Config, encodings: Encodings) -> dict[Entry, list[Entry]]:
    """Every array of a raw checkpoint, and the arrays of an encoded store that are made of it."""
    found: dict[Entry, list[Entry]] = {}
    for entry in arrays(as_encoded(config, encodings)):
        found.setdefault(origin(entry, config), []).append(entry)
    return found


def packed(
    values: np.ndarray, name: str, encoding: Encoding, weights: np.ndarray | None = None
) -> np.ndarray:
    """The array to store for `values`, of any dtype of ours. Pieces are encoded by several threads.

    `weights` of the columns are for codecs that are `Fitted`.

    Raises:
        memsched.errors.CodecError: NaN, infinite or too large numbers; the line has the name.
    """
    codec = encoding.format
    if codec.cut is None:
        return _encode(codec, values, name, weights)
    shape, dtype = encoding.packed
    result = aligned_empty(shape, STORED_DTYPES[dtype])

    def put(rows: slice, lines: slice) -> None:
        result[lines] = _encode(codec, values[rows], name, weights)

    _by_pieces(put, encoding)
    return result


def _encode(codec: Codec, values: np.ndarray, name: str, weights: np.ndarray | None) -> np.ndarray:
    if weights is None:
        return codec.encode(values, name)
    assert isinstance(codec, Fitted), f"{codec.name} takes no weights"
    return codec.encode(values, name, weights=weights)


def unpacked(stored: np.ndarray, encoding: Encoding) -> np.ndarray:
    """The decoded array, at a 64-byte aligned address."""
    codec = encoding.format
    result = aligned_empty(encoding.shape, DTYPES[encoding.dtype])
    if codec.cut is None:
        result[...] = codec.decode(stored, encoding.shape, encoding.dtype)
        return result

    def put(rows: slice, lines: slice) -> None:
        part = result[rows]
        part[...] = codec.decode(stored[lines], part.shape, encoding.dtype)

    _by_pieces(put, encoding)
    return result


def _by_pieces(put: Callable[[slice, slice], None], encoding: Encoding) -> None:
    """Calls `put` for pieces of rows and for the lines that they are packed in."""
    (outputs, width), cut = encoding.shape, encoding.format.cut or 1
    step = max(1, PIECE_NUMBERS // (width * cut))
    pieces = [
        (slice(line * cut, (line + step) * cut), slice(line, line + step))
        for line in range(0, -(-outputs // cut), step)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(put, *zip(*pieces, strict=True)))
