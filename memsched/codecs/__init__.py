"""Formats in which an array takes fewer bytes, and can be multiplied with as it is.

    codec = parse_codec("int4:64")
    packed = codec.encode(weight, "layers.0.mlp.down_proj.weight")
    product = codec.product(rows, packed, weight.shape)

`CODECS` holds one of every kind. Those with a number that may vary (`svd:rank=64`) are spelled with
any other number too. Nothing here needs JAX, apart from `product`.
"""

from memsched.codecs.block_sparse import BlockSparse
from memsched.codecs.codec import Codec
from memsched.codecs.error import relative_error
from memsched.codecs.int4 import Int4
from memsched.codecs.int8 import Int8
from memsched.codecs.names import CODECS, Fitted, parse_codec
from memsched.codecs.plain import Narrow, Raw
from memsched.codecs.svd import Svd, rank_for_energy
from memsched.codecs.two_of_four import TwoOfFour
from memsched.errors import CodecError

__all__ = [
    "CODECS",
    "BlockSparse",
    "Codec",
    "CodecError",
    "Fitted",
    "Int4",
    "Int8",
    "Narrow",
    "Raw",
    "Svd",
    "TwoOfFour",
    "parse_codec",
    "rank_for_energy",
    "relative_error",
]
