"""Names of given arrays: the paths of a pytree's leaves, and which kind of array each is."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax

from memsched.errors import ProgramError
from memsched.program import KINDS, Kind

# Flax's parameters, and encoded arrays in them, are pytree nodes with one leaf; its name says
# nothing.
WRAPPERS = frozenset({"raw_value", "value", "packed"})


def path_name(path: Sequence[Any]) -> str:
    """A path in a pytree as "layers.0.weight", without the wrappers of an array."""
    count = len(path)
    while count and _is_wrapper(path[count - 1]):
        count -= 1
    return ".".join(map(_part, path[:count]))


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """The leaves of all arguments, and the tree that they make.

    Of each leaf: its name, which argument it belongs to, and its place inside that argument.
    """

    leaves: list[Any]
    tree: Any
    names: list[str]
    owners: list[int]
    places: list[str]


def array_names(arguments: Sequence[Any], roots: Sequence[str]) -> Given:
    """Flattens the arguments. A name is the argument's root and the place in it.

    Raises:
        ProgramError: two arrays have one name, or one has none.
    """
    if len(roots) != len(arguments):
        raise ProgramError(
            f"names: {len(roots)} given for {len(arguments)} arguments; each needs one"
        )
    found, tree = jax.tree_util.tree_flatten_with_path(tuple(arguments))
    owners = [path[0].idx for path, _ in found]
    places = [path_name(path[1:]) for path, _ in found]
    names = [
        f"{roots[owner]}.{place}".strip(".") for owner, place in zip(owners, places, strict=True)
    ]
    for name, count in Counter(names).items():
        if count > 1 or not name:
            raise ProgramError(
                f"arrays: {count} have the name {name!r}: give every argument a root of its own"
            )
    return Given([leaf for _, leaf in found], tree, names, owners, places)


def named_arrays(tree: Any, root: str = "") -> dict[str, Any]:
    """Every array of a pytree under the name that `trace` gives it as an argument called `root`."""
    given = array_names((tree,), (root,))
    return dict(zip(given.names, given.leaves, strict=True))


def kinds_of(
    given: Sequence[str], owners: Sequence[int], kinds: Sequence[str | Mapping[str, str]]
) -> dict[str, Kind]:
    """The kind of every given array. `owners` says which argument each belongs to.

    Raises:
        ProgramError: an unknown kind, a prefix of no array, or an array that has no kind.
    """
    found: dict[str, Kind] = {}
    unused = {
        (owner, prefix)
        for owner, kind in enumerate(kinds)
        if isinstance(kind, Mapping)
        for prefix in kind
    }
    for name, owner in zip(given, owners, strict=True):
        kind = kinds[owner]
        if isinstance(kind, Mapping):
            prefix = _longest_prefix(name, kind)
            unused.discard((owner, prefix))
            kind = kind[prefix]
        if kind not in KINDS or kind == "activation":
            known = ", ".join(known for known in KINDS if known != "activation")
            raise ProgramError(f"array {name!r}: kind {kind!r} is not one of {known}")
        found[name] = cast(Kind, kind)
    for owner, prefix in sorted(unused):
        raise ProgramError(f"kinds of argument {owner}: no array is named {prefix!r} or below it")
    return found


def _is_wrapper(key: Any) -> bool:
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name in WRAPPERS


def _longest_prefix(name: str, kinds: Mapping[str, str]) -> str:
    parts = name.split(".")
    for count in range(len(parts), -1, -1):
        if (prefix := ".".join(parts[:count])) in kinds:
            return prefix
    raise ProgramError(
        f"array {name!r}: no prefix of it has a kind; add one, or '' for all the rest"
    )


def _part(key: Any) -> str:
    match key:
        case jax.tree_util.SequenceKey(idx=index):
            return str(index)
        case jax.tree_util.DictKey(key=name):
            return str(name)
        case jax.tree_util.GetAttrKey(name=name):
            return str(name)
        case jax.tree_util.FlattenedIndexKey(key=index):
            return str(index)
    return str(key)
