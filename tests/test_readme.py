"""README is true: its Python runs, .ci/run runs its commands, its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(ROOT.glob("*.md"))
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced blocks of README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def our_commands() -> Iterator[list[str]]:
    """Every call of one of our scripts in README, split into words."""
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                scripts = [word for word in words if word.startswith("scripts/")]
                if scripts:
                    yield words[words.index(scripts[0]) :]


def test_the_first_block_is_two_commands_that_set_everything_up() -> None:
    answer, test = blocks("bash")[0].splitlines()
    for command in (answer, test):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert " scripts/generate.py " in answer
    assert "'.[test]'" in test
    assert test.endswith(".venv/bin/python -m pytest -n 2 --dist worksteal")


def test_ci_takes_its_commands_from_readme() -> None:
    # The same extraction as in .ci/run, by the same program.
    extract = re.search(r"< <\((awk .*? README\.md)\)", (ROOT / ".ci" / "run").read_text())
    assert extract is not None
    done = subprocess.run(["bash", "-c", extract[1]], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == blocks("bash")[0]


def test_the_pictures_and_files_that_commands_name_are_there() -> None:
    named = [word for words in our_commands() for word in words if word.startswith("examples/")]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_flag_that_commands_use_is_in_the_help_of_its_script() -> None:
    used: dict[str, set[str]] = {}
    for script, *words in our_commands():
        used.setdefault(script, set()).update(word for word in words if word.startswith("--"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for script, flags in used.items():
        command = [sys.executable, str(ROOT / script), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        shown = set(re.findall(r"--[a-z-]+", done.stdout))
        assert flags <= shown, (script, done.stderr)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_python_block_runs(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(blocks("python")[number], "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    model, planner = ROOT / "qwen3vl_jax", ROOT / "memsched"
    places = [model, model / "processing", model / "checkpoints", model / "planned"]
    places += [planner, planner / "passes"]
    modules = {path.stem for place in places for path in place.glob("*.py")}
    modules -= {"__init__", "__main__"}
    folders = {f"{path.parent.name}/" for place in places for path in place.glob("*/__init__.py")}
    assert [name for name in sorted(modules | folders) if f"`{name}`" not in text] == []


def our_texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project: those that git knows or would know, or simply all."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, capture_output=True, text=True, cwd=ROOT)
    names = listed.stdout.split("\0") if listed.returncode == 0 else list(walked())
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".json", ".txt", ".cc", ""}:
            yield name, path.read_text(errors="replace")


def walked() -> Iterator[str]:
    """Files below the root, without environments and caches."""
    for path in ROOT.rglob("*"):
        name = path.relative_to(ROOT)
        if not any(part.startswith(".") and part != ".ci" for part in name.parts[:-1]):
            yield str(name)


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    # Put together here, so that this file does not hold what it looks for.
    foreign = ["/" + start for start in ("work/", "root/", "home/", "Users/")]
    found = [name for name, text in our_texts() if any(part in text for part in foreign)]
    assert found == []
