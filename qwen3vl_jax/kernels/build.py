"""From C++ sources to a loaded shared library, through a private cache directory.

The file's name carries a digest of what decides the binary: sources, flags, jaxlib. It appears
under that name by a rename, when it is complete: processes may race. What another user could have
written is not loaded.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

SOURCE = "kernels.cc"
HEADERS = (
    "attention_rows.h",
    "encoded.h",
    "encoded_rows.h",
    "integer_rows.h",
    "linear_rows.h",
    "many_rows.h",
    "pool.h",
    "vectors.h",
)
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
COMPILE_LIMIT_S = 120.0


class BuildError(Exception):
    """There is no library, for the reason given."""


def load_cached() -> ctypes.CDLL:
    """The library from this user's cache; where that cannot be used, built for this process alone.

    Raises:
        BuildError: if there is no compiler, or it fails.
        OSError: if the finished library cannot be loaded.
    """
    try:
        return load(_user_cache())
    except OSError:
        with tempfile.TemporaryDirectory(prefix="qwen3vl_jax-") as directory:
            return load(Path(directory))


def load(directory: Path) -> ctypes.CDLL:
    """The library in `directory`, compiled (3 to 5 s) unless it is there.

    Raises:
        BuildError: if there is no compiler, or it fails.
        OSError: if the directory or file is not private to this user, or cannot be used.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(directory)
    path = directory / f"kernels-{_digest()}.so"
    if not path.exists():
        _compile(path)
    _require_private(path)
    return ctypes.CDLL(str(path))


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command: $CXX, or the first that is installed.

    Raises:
        BuildError: if there is none.
    """
    if command := shlex.split(os.environ.get("CXX", "")):
        return tuple(command)
    for name in COMPILERS:
        if path := shutil.which(name):
            return (path,)
    raise BuildError(f"no C++ compiler was found (looked for $CXX, {', '.join(COMPILERS)})")


def _compile(path: Path) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    command = [*find_compiler(), *FLAGS, f"-I{jax.ffi.include_dir()}"]
    command += [str(Path(__file__).parent / SOURCE), "-o", str(unfinished)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMPILE_LIMIT_S
        )
        if done.returncode != 0:
            first = next(iter(done.stderr.splitlines()), "no message")
            raise BuildError(f"{command[0]} failed with exit code {done.returncode}: {first}")
        unfinished.chmod(0o700)
        unfinished.replace(path)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {COMPILE_LIMIT_S:.0f} s") from error
    except FileNotFoundError as error:
        raise BuildError(f"the compiler {command[0]} does not exist") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _digest() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256(repr((FLAGS, version("jaxlib"))).encode())
    for name in (SOURCE, *HEADERS):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:20]


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "qwen3vl_jax" / "kernels"


def _require_private(path: Path) -> None:
    found = path.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"'{path}' (owner {found.st_uid}, mode {found.st_mode & 0o777:o}) must belong to user "
            f"{os.geteuid()} and be writable by nobody else"
        )
