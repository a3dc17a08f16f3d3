"""From what a user names (path, file URL, data URL, bytes) to bytes, within a cap."""

import base64
import binascii
import errno
import io
import json
import os
import stat
import urllib.parse
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import BadInputError, MediaError, StorageError

SHOWN_CHARACTERS = 80


def describe(source: object) -> str:
    """A short name of a source for messages: never its content, never a memory address."""
    if isinstance(source, str | os.PathLike):
        text = os.fsdecode(os.fspath(source))
        shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
        return ascii(shown)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source):,} bytes"
    return f"an object of type {type(source).__name__}"


def local_path(source: str | os.PathLike[str]) -> Path:
    """The file that a path or a `file://` URL names.

    Raises:
        MediaError: for a URL of another kind. Nothing is ever fetched from a network here.
    """
    text = os.fspath(source)
    if text.startswith("file://"):
        url = urllib.parse.urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise MediaError(f"{describe(source)}: a file URL names a file of this machine only")
        text = urllib.parse.unquote(url.path)
    elif "://" in text[:16]:
        raise MediaError(
            f"{describe(source)}: URLs are not fetched; download it and pass the file's path"
        )
    if "\0" in text:
        raise MediaError(f"{describe(source)}: a path has no NUL character")
    return Path(text)


def open_regular_file(path: Path, *, max_bytes: int) -> io.BufferedReader:
    """Open a regular file of at most `max_bytes` bytes for reading.

    Raises:
        MediaError: no such file, not a regular one (a FIFO would wait for ever), empty, too large.
        StorageError: the file system refuses to open it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise MediaError(f"{describe(path)}: no such file") from error
        raise StorageError(f"{describe(path)}: {os.strerror(error.errno or 0)}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= max_bytes:
        os.close(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{describe(path)}: not a regular file")
        raise MediaError(
            f"{describe(path)}: {status.st_size:,} bytes, but 1 to {max_bytes:,} are allowed"
        )
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, *, max_bytes: int) -> bytes:
    """All bytes of a regular file; errors as `open_regular_file`."""
    with open_regular_file(path, max_bytes=max_bytes) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise StorageError(f"{describe(path)}: {os.strerror(error.errno or 0)}") from error
    if len(data) > max_bytes:
        raise MediaError(f"{describe(path)}: grew over {max_bytes:,} bytes while it was read")
    return data


def read_data_url(url: str, *, max_bytes: int) -> bytes:
    """The bytes inside `data:<type>;base64,<text>`; the cap holds before they are decoded."""
    head, comma, text = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise MediaError("a data URL looks like 'data:image/png;base64,...'")
    if len(text) > (max_bytes + 2) // 3 * 4 + 1024:
        raise MediaError(f"a data URL of {len(text):,} characters; {max_bytes:,} bytes are allowed")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError("a data URL whose text is not base64") from error
    return checked_bytes(data, max_bytes=max_bytes)


def checked_bytes(data: bytes | bytearray | memoryview, *, max_bytes: int) -> bytes:
    """The same bytes, if there are 1 to `max_bytes` of them."""
    if not 0 < len(data) <= max_bytes:
        raise MediaError(f"{len(data):,} bytes, but 1 to {max_bytes:,} are allowed")
    return bytes(data)


def read_json_object(path: Path, *, max_bytes: int, error: type[BadInputError]) -> dict[str, Any]:
    """A JSON file that holds one object, without duplicate keys, NaN or Infinity.

    Raises:
        error: the file is too large, not JSON, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        text = read_file(path, max_bytes=max_bytes).decode()
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except MediaError as reason:
        raise error(str(reason)) from reason
    except (ValueError, RecursionError) as reason:
        raise error(f"{describe(path)}: not a JSON file that can be trusted: {reason}") from reason
    if not isinstance(value, dict):
        raise error(f"{describe(path)}: holds a {type(value).__name__}, not an object")
    return value
