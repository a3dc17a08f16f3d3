"""Where the bytes of an array lie in files, for a reader that streams them past this package."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` of one file from `offset` on, of which the first `used_bytes` are the array's.

    With `checksum`, four more bytes are the little-endian CRC-32C of all `nbytes`.
    """

    path: Path
    offset: int
    nbytes: int
    used_bytes: int
    checksum: bool
