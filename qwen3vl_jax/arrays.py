"""Kinds of arrays in annotations."""

import jax
import numpy as np

AnyArray = np.ndarray | jax.Array  # on the host or on a device: a step takes either
