"""scripts/train.py: what is refused, and how."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--demo"),
        (["--demo", "--evaluate", "--out", "x"], "--model DIR"),
        (["--demo", "--evaluate", "--export"], "--model DIR"),
        (["--demo", "--questions", "3"], "--evaluate"),
        (["--demo", "--kv", "int8"], "--evaluate"),
        (["--demo", "--evaluate", "--questions", "0"], "at least 1"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_why(arguments: list[str], says: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_exported_from_a_directory_without_a_run(tmp_path: Path) -> None:
    done = script("--demo", "--out", str(tmp_path), "--export")
    assert done.returncode == 2, done.stderr
    assert "holds no training run" in done.stderr
    assert not list(tmp_path.iterdir())
