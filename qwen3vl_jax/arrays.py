"""Kinds of arrays in annotations."""

from typing import TYPE_CHECKING

import jax
import numpy as np

AnyArray = np.ndarray | jax.Array  # on the host or on a device: a step takes either

# Fields of what phases take and return: while a phase is planned they hold shapes instead.
if TYPE_CHECKING:
    Leaf = jax.Array
    AnyLeaf = AnyArray
else:
    Leaf = jax.Array | jax.ShapeDtypeStruct
    AnyLeaf = np.ndarray | Leaf
