"""Sizes as people write them, and as messages show them."""

import re
from fractions import Fraction

from memsched.errors import ProgramError

LARGEST_BYTES = 1 << 60
"""No size that anybody means is larger."""

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([A-Za-z]{0,3})")


def parse_size(text: str) -> int:
    """Bytes of "512MB" (powers of 1000), "1.5GiB" (powers of 1024) or "1000000".

    A fraction of a byte is dropped. Capitals do not matter.

    Raises:
        ProgramError: it is no such size, or larger than 1 EiB.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ProgramError(f"size {text[:40]!r} is none: write 512MB, 1.5GiB or plain bytes")
    nbytes = int(Fraction(match[1]) * unit)
    if nbytes > LARGEST_BYTES:
        raise ProgramError(
            f"size {text[:40]!r} is {nbytes:,} B; the largest is {LARGEST_BYTES:,} B"
        )
    return nbytes


def format_size(nbytes: int) -> str:
    """Exact bytes, and from 1 MiB on what that is about: `1,610,612,736 B (1.50 GiB)`."""
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB")):
        if abs(nbytes) >= 1024**power:
            return f"{nbytes:,} B ({nbytes / 1024**power:,.2f} {name})"
    return f"{nbytes:,} B"
