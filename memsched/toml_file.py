"""Reading TOML files that people write: small ones only, and failures in one line."""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memsched.errors import ProgramError

LARGEST_FILE_BYTES = 1 << 20


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """The tables of a file.

    Args:
        kind: what the file describes, for messages.

    Raises:
        ProgramError: the file cannot be read, is too large, or is no TOML.
    """
    try:
        with path.open("rb") as file:
            body = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise ProgramError(f"{kind} {path}: {error.strerror}; give a TOML file") from error
    if len(body) > LARGEST_FILE_BYTES:
        raise ProgramError(f"{kind} {path}: larger than {LARGEST_FILE_BYTES:,} B")
    try:
        return tomllib.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise ProgramError(f"{kind} {path}: not TOML: {error}") from error


def refuse_unknown(where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    """Names the nearest known key.

    Raises:
        ProgramError: a table has a key that there is not.
    """
    names = list(known)
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise ProgramError(f"{where}{key} is unknown; did you mean {near!r}?")
