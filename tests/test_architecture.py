"""The rules between modules, read from their source: nothing is imported here."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("memsched", "qwen3vl_jax")
SOURCES = sorted(path for name in (*PACKAGES, "scripts") for path in (ROOT / name).rglob("*.py"))
LONGEST_MODULE_LINES = 400
# Model code must never know the planner; one folder joins the two.
SEAM = ROOT / "qwen3vl_jax" / "planned"


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def dangerous_calls(path: Path) -> Iterator[str]:
    """Calls that run text, or that unpickle."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" | "compile" | "__import__" as name)):
                yield f"{path.name}:{node.lineno} {name}"
            case ast.keyword(arg="allow_pickle" | "trust_remote_code" as name, value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield f"{path.name}:{node.value.lineno} {name}"


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_the_rules_see_the_sources() -> None:
    assert len(SOURCES) > 20
    assert {"jax", "flax"} <= packages(ROOT / "qwen3vl_jax" / "network.py")


def test_the_planner_knows_no_model() -> None:
    foreign = {"flax", "qwen3vl_jax", "scripts", "torch", "transformers"}
    seen = {path.name: packages(path) & foreign for path in (ROOT / "memsched").rglob("*.py")}
    assert not any(seen.values()), seen


def _of_the_planner(module: str) -> bool:
    """Codecs are formats of arrays; they plan nothing."""
    return module.startswith("memsched") and not module.startswith("memsched.codecs")


def test_model_files_know_no_planner() -> None:
    knowing = [
        path.name
        for path in (ROOT / "qwen3vl_jax").rglob("*.py")
        if path.parent != SEAM and any(map(_of_the_planner, imported(path)))
    ]
    assert knowing == []


def test_the_referee_shares_nothing_with_those_it_judges() -> None:
    ours = {name for name in imported(ROOT / "memsched" / "referee.py") if "memsched" in name}
    modules = {".".join(name.split(".")[:2]) for name in ours}
    assert modules == {f"memsched.{name}" for name in ("errors", "machine", "plan", "program")}


def test_planning_needs_no_jax() -> None:
    planning = ["program", "plan", "machine", "plan_json", "referee", "passes", "cost", "packing"]
    files = [f for name in planning for f in (ROOT / "memsched").glob(f"{name}*")]
    sources = [f for file in files for f in (file.rglob("*.py") if file.is_dir() else [file])]
    assert len(sources) > 20
    assert [path.name for path in sources if {"jax", "jaxlib"} & packages(path)] == []


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_a_source_file_keeps_the_rules(path: Path) -> None:
    text = path.read_text()
    assert packages(path) & {"pickle", "marshal", "shelve", "torch", "torchvision"} == set()
    assert list(dangerous_calls(path)) == []
    assert "__future__.annotations" not in imported(path)
    assert text.count("\n") <= LONGEST_MODULE_LINES
    assert ast.get_docstring(ast.parse(text)), "a module says what it is in its first line"


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_no_function_is_longer_than_50_lines(path: Path) -> None:
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.body[0].lineno + 1 > 50
    }
    assert long == {}


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_sorted_and_all_there(name: str) -> None:
    package = __import__(name)
    assert package.__all__ == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("name", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(name: str) -> None:
    heavy = ["flax", "jax", "numpy", "orbax", "tensorstore", "torch", "transformers"]
    code = f"import sys, {name}; print(*(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_packages_and_changelog_have_one_version() -> None:
    versions = {__import__(name).__version__ for name in PACKAGES}
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if "## [" in line]
    top = next(line for line in headings if "Unreleased" not in line)
    assert versions == {top.split("[")[1].split("]")[0]}
