"""All codecs by name, and the names with a number that may vary.

| name | what is stored |
|---|---|
| raw | the array itself |
| fp16, bf16 | each number in 16 bits |
| int8, int8:64, int8:128 | 8 bits, one float32 scale for a row or for so many numbers of it |
| int4:32, int4:64 | 4 bits, one float16 scale for so many numbers of a row |
| int4:32:zero, int4:64:zero | the same, and a float16 minimum: for numbers that lie to one side |
| svd:rank=R, svd:fraction=F | two factors of rank R, or of the fraction F of the smaller side |
| sparse:2:4 | the two largest of every four numbers of a row |
| sparse:block=S | the share S of the 16 x 16 blocks of every 16 rows |
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from memsched.codecs.block_sparse import BlockSparse
from memsched.codecs.codec import Codec
from memsched.codecs.int4 import Int4
from memsched.codecs.int8 import Int8
from memsched.codecs.plain import Narrow, Raw
from memsched.codecs.svd import Svd
from memsched.codecs.two_of_four import TwoOfFour
from memsched.errors import ProgramError

CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "raw": Raw(),
        "fp16": Narrow("fp16", "float16", 2.0**-11),
        "bf16": Narrow("bf16", "bfloat16", 2.0**-8),
        "int8": Int8(),
        "int8:64": Int8(64),
        "int8:128": Int8(128),
        "int4:32": Int4(32),
        "int4:64": Int4(64),
        "int4:32:zero": Int4(32, zero=True),
        "int4:64:zero": Int4(64, zero=True),
        "svd:rank=64": Svd(rank=64),
        "svd:fraction=0.25": Svd(fraction=0.25),
        "sparse:2:4": TwoOfFour(),
        "sparse:block=0.5": BlockSparse(0.5),
    }
)

Fitted = Int8 | Int4  # their `encode` takes weights of an array's columns


def parse_codec(text: str) -> Codec:
    """The codec of this name.

    Raises:
        ProgramError: no codec has this name, or its number is out of range.
    """
    if text in CODECS:
        return CODECS[text]
    kind, given, number = text.partition("=")
    if given:
        match kind:
            case "svd:rank":
                return Svd(rank=_rank(text, number))
            case "svd:fraction":
                return Svd(fraction=_share(text, number))
            case "sparse:block":
                return BlockSparse(_share(text, number))
    longer = [name for name in CODECS if name.startswith(text)]
    near = (longer or difflib.get_close_matches(text, CODECS, n=1, cutoff=0.0))[0]
    raise ProgramError(
        f"codec {text!r} is unknown; did you mean {near!r}? All: {', '.join(CODECS)}"
    )


def _rank(text: str, number: str) -> int:
    if not (number.isascii() and number.isdigit() and len(number) < 10 and int(number)):
        raise ProgramError(f"codec {text!r}: a rank is a whole number from 1, not {number!r}")
    return int(number)


def _share(text: str, number: str) -> float:
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ProgramError(f"codec {text!r}: a share is above 0 and at most 1, not {number!r}")
    return share
