"""Arrays of a conversation that rest on disk, as weights do: full blocks of the KV cache.

Whoever drops the last reference to a `Sealed` has dropped the array, as with any other array.
"""

import collections
import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, DTypeLike

from memsched.program import ArraySpec
from memsched.runtime import Executor


class Sealed(jax.ShapeDtypeStruct):
    """An array that rests on disk under a name. Phases take it in the place of the array."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        super().__init__(shape, dtype)
        self.name = name


def sealed_names(arrays: Any) -> tuple[str, ...]:
    """Names of those arrays that are on disk, in order."""
    return tuple(leaf.name for leaf in jax.tree.leaves(arrays) if isinstance(leaf, Sealed))


class Shelf:
    """Writes arrays to disk under names that no two of them share, and forgets them.

    `specs` has what is known of all weights by name; it notes there what it writes.
    """

    def __init__(self, executor: Executor, specs: dict[str, ArraySpec]) -> None:
        self._executor = executor
        self._specs = specs
        self._numbers = itertools.count()
        # Filled wherever a last reference ends, emptied between passes.
        self._dropped: collections.deque[str] = collections.deque()

    def seal(self, label: str, array: Array) -> Sealed:
        """Writes an array; it may be changed afterwards."""
        name = f"{label}#{next(self._numbers)}"
        self._executor.seal(name, array)
        self._specs[name] = ArraySpec(name, array.shape, np.dtype(array.dtype).name, "weight")
        sealed = Sealed(name, array.shape, array.dtype)
        weakref.finalize(sealed, self._dropped.append, name).atexit = False
        return sealed

    def moved(self, label: str, arrays: Any, most_bytes: int) -> Any:
        """A pytree with all arrays on disk, and not in memory any more, if they take more bytes."""
        leaves, tree = jax.tree.flatten(arrays)
        if sum(leaf.nbytes for leaf in leaves) <= most_bytes:
            return arrays
        sealed = [self.seal(f"{label}.{index}", leaf) for index, leaf in enumerate(leaves)]
        for leaf in leaves:
            leaf.delete()
        return jax.tree.unflatten(tree, sealed)

    def forget_dropped(self) -> frozenset[str]:
        """Gives the space of what nobody refers to any more back; returns its names."""
        gone = set()
        while self._dropped:
            name = self._dropped.popleft()
            self._executor.release(name)
            del self._specs[name]
            gone.add(name)
        return frozenset(gone)


class Living:
    """Caches in memory, for as long as somebody refers to them."""

    def __init__(self) -> None:
        self._arrays: list[weakref.ref[Array]] = []

    def note(self, arrays: Iterable[Array]) -> None:
        """These lie in memory from now on."""
        known = [array for _, array in self._found()]
        self._arrays = [weakref.ref(array) for array in (*known, *arrays)]

    def nbytes_beside(self, own: Iterable[Any]) -> int:
        """Bytes of all but these arrays."""
        taken = {id(array) for array in own}
        return sum(array.nbytes for key, array in self._found() if key not in taken)

    def _found(self) -> list[tuple[int, Array]]:
        arrays = [reference() for reference in self._arrays]
        return [(id(a), a) for a in arrays if a is not None and not a.is_deleted()]
