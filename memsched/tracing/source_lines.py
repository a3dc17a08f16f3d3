"""Where in the user's code something was computed: the innermost line outside of the libraries."""

import functools
import sysconfig
import traceback
from pathlib import Path

import jax.extend.core as jex

LIBRARIES = ("beartype", "flax", "jax", "jaxlib", "jaxtyping", "optax")
_STANDARD = sysconfig.get_paths()["stdlib"]
_OURS = Path(__file__).parents[1]


def line_of(equation: jex.JaxprEqn) -> str:
    """The line that an equation comes from, as "file:line"."""
    found = equation.source_info.traceback
    if found is None:
        return "an unknown line"
    for frame in found.frames:  # the innermost first
        if not _of_a_library(frame.file_name):
            return f"{frame.file_name}:{frame.line_num}"
    return "an unknown line"


def line_of_error(error: BaseException) -> str:
    """The line at which an exception left the user's code, as "file:line"."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _of_a_library(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return "an unknown line"


@functools.cache
def _of_a_library(file: str) -> bool:
    path = Path(file)
    if file.startswith("<") or _OURS in path.parents:
        return True
    parts = path.parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1] in LIBRARIES
    return file.startswith(_STANDARD)
