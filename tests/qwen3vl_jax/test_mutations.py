"""Every known porting mistake, put into our source, is noticed by the parity check.

The steps run without jit here: the mathematics is what is broken, and a primitive compiled once
serves all mutations.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny

import qwen3vl_jax
from qwen3vl_jax import weights
from qwen3vl_jax.checkpoints import opening
from qwen3vl_jax.config import Config, load_config

PACKAGE = Path(qwen3vl_jax.__file__).parent
CASES = ("batch_left", "image_video")
CASES_OF = {"dense": CASES, "moe": ("text",)}


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One mistake: (text there, text instead) in a module; `checkpoint` shows it."""

    name: str
    module: str
    checkpoint: str
    edits: tuple[tuple[str, str], ...]


def read_mutations() -> list[Mutation]:
    """The blocks of data/mutations.txt, which explains its format."""
    text = (Path(__file__).parents[1] / "data" / "mutations.txt").read_text()
    found = []
    for block in text.split("\n== ")[1:]:
        heading, *lines = [line for line in block.splitlines() if not line.startswith("#")]
        name, module, checkpoint = heading.split(" | ")
        signs = [(line[0], line[1:]) for line in lines if line]
        runs = [
            "\n".join(line for _, line in run)
            for _, run in itertools.groupby(signs, key=lambda signed: signed[0])
        ]
        edits = tuple(zip(runs[0::2], runs[1::2], strict=True))
        found.append(Mutation(name, module, checkpoint, edits))
    return found


MUTATIONS = read_mutations()


class Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports some modules of the package from given source texts."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name in self.texts else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.texts[module.__name__], module.__name__, "exec"), module.__dict__)


def source(name: str) -> str:
    return (PACKAGE / f"{name}.py").read_text()


def imports(name: str) -> set[str]:
    """Modules of the package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.ImportFrom) and node.module == "qwen3vl_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qwen3vl_jax."):
            found.add(str(node.module).split(".")[1])
    return found


def dependents(changed: str) -> set[str]:
    """`changed` and every module that imports it, directly or not."""
    graph = {path.stem: imports(path.stem) for path in PACKAGE.glob("*.py")}
    found: set[str] = set()
    following = {changed}
    while following:
        found |= following
        following = {name for name, needs in graph.items() if needs & found} - found
    return found - {"__init__"}


def edited(mutation: Mutation) -> str:
    text = source(mutation.module)
    for old, new in mutation.edits:
        count = text.count(old)
        assert count == 1, f"{mutation.module}.py has this {count} times, wanted once: {old}"
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    """The package with one mistake in it; afterwards the true modules are back."""
    stale = dependents(mutation.module)
    texts = {f"qwen3vl_jax.{name}": source(name) for name in stale}
    texts[f"qwen3vl_jax.{mutation.module}"] = edited(mutation)
    true_modules = {name: sys.modules.pop(name) for name in texts if name in sys.modules}
    true_names = {name: vars(qwen3vl_jax).pop(name) for name in stale & vars(qwen3vl_jax).keys()}
    finder = Sources(texts)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in texts:
            sys.modules.pop(name, None)
        sys.modules.update(true_modules)
        for name in stale:
            vars(qwen3vl_jax).pop(name, None)
        vars(qwen3vl_jax).update(true_names)


@functools.cache
def weights_of(checkpoint: str) -> tuple[Config, dict[str, jax.Array]]:
    """Configuration and arrays, read by the true modules."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny.checkpoint(checkpoint, Path(scratch))
        config = load_config(folder)
        with opening.open_checkpoint(folder, config) as opened:
            table = weights.table(config)
            return config, {entry.path: jnp.array(opened.read(entry)) for entry in table}


def differences(checkpoint: str) -> Iterator[float]:
    """Relative difference of logits of one case after another, with the modules now importable."""
    config, arrays = weights_of(checkpoint)
    network_module = importlib.import_module("qwen3vl_jax.network")
    prepare = importlib.import_module("qwen3vl_jax.inputs").prepare
    network = network_module.network_from_arrays(
        network_module.abstract_network(config, dtype=jnp.float32), arrays
    )
    for case in CASES_OF[checkpoint]:
        given, answer = tiny.inputs(case), tiny.answers(checkpoint)[case]["logits"]
        real = given["attention_mask"].astype(bool)
        with jax.disable_jit():
            batch = jax.device_put(prepare(config, given)[0])
            logits = np.asarray(network_module.forward(network, batch, config))
        yield parity.relative(logits[real], answer[real])


@pytest.mark.parametrize("checkpoint", CASES_OF)
def test_without_a_mutation_all_is_equal(checkpoint: str) -> None:
    weights_of(checkpoint)
    with mutated(Mutation("none", "layers", checkpoint, ())):
        assert max(differences(checkpoint)) < parity.TOLERANCE


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_noticed(mutation: Mutation) -> None:
    weights_of(mutation.checkpoint)
    with mutated(mutation):
        # The first case that shows it is enough.
        assert any(found > parity.TOLERANCE for found in differences(mutation.checkpoint))


def test_all_mutations_are_read() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == 27
    assert all(old != new for mutation in MUTATIONS for old, new in mutation.edits)


def test_a_mutation_of_a_line_that_is_gone_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"rope.py has this 0 times"):
        edited(Mutation("none", "rope", "dense", (("no such line", ""),)))
