"""What the tests of scripts/convert.py share."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "convert.py"


def _load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("convert", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


CONVERT = _load().main


def convert(*arguments: object) -> int:
    """The script in this process; returns its exit code."""
    code = CONVERT([str(argument) for argument in arguments])
    assert isinstance(code, int)
    return code


def environment(**more: str) -> dict[str, str]:
    """For a process of its own: finds our packages wherever it is started."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def files(folder: Path) -> dict[str, bytes]:
    """Relative name -> content of all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def nothing_left(folder: Path) -> bool:
    """Whether no unfinished work lies in a folder."""
    return not any(path.name.endswith(".partial") for path in folder.iterdir())
