"""`trace` reads the steps of a function: names, in-place arrays, kernels, and what it refuses."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from memsched.program import ArraySpec, Program
from memsched.tracing.function import Kernels, trace
from qwen3vl_jax.cache import new_cache
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.network import abstract_network, named_arrays
from qwen3vl_jax.phases import part, phases

S = jax.ShapeDtypeStruct
SQUARE, ROWS = S((4, 4), jnp.float32), S((2, 4), jnp.float32)


@jax.jit
def layer(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ weights["kernel"]) + weights["bias"][None]


@functools.partial(jax.jit, donate_argnums=(0, 2))
def remember(cache: jax.Array, place: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`cache` and `x` are updated; of `x`, the sum with what was remembered."""
    return jax.lax.dynamic_update_slice(cache, x, (place, jnp.int32(0))), x + cache[:2]


def network(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for weights in params:
        x = layer(weights, x)
    return x


def shapes(count: int) -> list[dict[str, Any]]:
    return [{"bias": S((4,), jnp.float32), "kernel": SQUARE} for _ in range(count)]


def execute(program: Program, kernels: Kernels, given: dict[str, Any]) -> list[np.ndarray]:
    """Runs all steps in order; a donated array is forgotten at once."""
    held = {name: jnp.array(value) for name, value in given.items()}
    for step in program.steps:
        arguments = [held[name] for name in step.inputs]
        for name in step.updates:
            del held[name]
        results = kernels[step.kernel](*arguments)
        held.update(zip(step.results, results, strict=True))
    return [np.asarray(held[name]) for name in program.outputs]


def random_like(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    """Values for all given arrays."""
    rng = np.random.default_rng(seed)
    arrays = [program.arrays[name] for name in program.given]
    return {
        array.name: rng.normal(size=array.shape).astype(array.dtype)
        if array.dtype in ("float32", "bfloat16")
        else np.zeros(array.shape, array.dtype)
        for array in arrays
    }


def test_each_jitted_call_is_a_step_and_equal_layers_share_a_kernel() -> None:
    program, kernels = trace(network, shapes(3), ROWS, kinds=("weight", "input"))
    assert [step.name for step in program.steps] == ["0.layer", "1.layer", "2.layer"]
    assert {step.kernel for step in program.steps} == set(kernels) == {"layer"}
    assert program.steps[1].reads == ("params.1.bias", "params.1.kernel", "0.layer.0")
    assert program.steps[1].writes == ("1.layer.0",)
    assert program.outputs == ("2.layer.0",)
    assert program.arrays["params.0.kernel"] == ArraySpec(
        "params.0.kernel", (4, 4), "float32", "weight"
    )
    assert program.of_kind("input") == ("x",)
    assert [step.flops for step in program.steps] == [2 * 2 * 4 * 4] * 3


@pytest.mark.parametrize(("scope", "times"), [("repeats=2.5", 2.5), ("repeats", 1), ("a", 1)])
def test_a_loop_of_unknown_length_counts_as_often_as_its_author_says(
    scope: str, times: float
) -> None:
    @jax.jit
    def loop(matrix: jax.Array, x: jax.Array, count: jax.Array) -> jax.Array:
        with jax.named_scope(scope):
            return jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x @ matrix), x)

    program, _ = trace(loop, SQUARE, ROWS, S((), jnp.int32))
    assert program.steps[0].flops == times * 2 * 2 * 4 * 4


def test_the_steps_one_after_another_give_the_bits_of_the_function() -> None:
    program, kernels = trace(network, shapes(5), ROWS)
    given = random_like(program)
    params = [
        {name: jnp.asarray(given[f"params.{i}.{name}"]) for name in ("bias", "kernel")}
        for i in range(5)
    ]
    (found,) = execute(program, kernels, given)
    np.testing.assert_array_equal(found, network(params, jnp.asarray(given["x"])))


def test_donated_arguments_are_updates_under_one_name() -> None:
    def decode(cache: jax.Array, place: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(2):
            cache, x = remember(cache, place, x)
        return x, cache

    cache, place = S((8, 4), jnp.float32), S((), jnp.int32)
    program, kernels = trace(decode, cache, place, ROWS, kinds=("cache", "input", "embedding"))
    assert [(step.reads, step.writes, step.updates) for step in program.steps] == [
        (("place",), (), ("cache", "x")),
        (("place",), (), ("cache", "x")),
    ]
    assert program.outputs == ("x", "cache")
    assert len(kernels) == 1
    given = random_like(program)
    want = decode(*(jnp.array(given[name]) for name in ("cache", "place", "x")))
    for found, expected in zip(execute(program, kernels, given), want, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_kernel_consumes_what_it_updates_and_nothing_else() -> None:
    program, kernels = trace(remember, S((8, 4), jnp.float32), S((), jnp.int32), ROWS)
    place, cache, x = jnp.int32(3), jnp.ones((8, 4)), jnp.ones((2, 4))
    address = cache.unsafe_buffer_pointer()
    new_cache, _ = kernels[program.steps[0].kernel](place, cache, x)
    assert new_cache.unsafe_buffer_pointer() == address
    assert [array.is_deleted() for array in (cache, x, place)] == [True, True, False]


def test_one_function_may_be_jitted_with_and_without_donation() -> None:
    def double(x: jax.Array) -> jax.Array:
        return 2 * x

    keeps, consumes = jax.jit(double), jax.jit(double, donate_argnums=0)
    program, kernels = trace(lambda x: consumes(keeps(x)), ROWS)
    assert [(step.writes, step.updates) for step in program.steps] == [
        (("0.double.0",), ()),
        ((), ("0.double.0",)),
    ]
    assert len(kernels) == 2


def test_results_of_one_shape_keep_the_name_of_what_they_are_made_of() -> None:
    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def optimise(
        momentum: jax.Array, weight: jax.Array, mean: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, ...]:
        momentum = 0.9 * momentum + gradient
        mean = 0.5 * mean + 0.5 * gradient * gradient
        return weight - momentum / jnp.sqrt(mean), mean, momentum

    def advance(
        weight: jax.Array, mean: jax.Array, momentum: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, ...]:
        return optimise(momentum, weight, mean, gradient)

    program, kernels = trace(advance, ROWS, ROWS, ROWS, ROWS)
    assert program.outputs == ("weight", "mean", "momentum")
    given = {name: np.abs(value) for name, value in random_like(program).items()}
    arguments = [jnp.array(given[name]) for name in ("weight", "mean", "momentum", "gradient")]
    for found, want in zip(execute(program, kernels, given), advance(*arguments), strict=True):
        np.testing.assert_array_equal(found, want)


def test_numbers_are_bound_to_kernels_that_share_one_compiled_function() -> None:
    scale = jax.jit(lambda x, factor: x * factor)

    def scaled(x: jax.Array) -> jax.Array:
        for factor in (2.0, 3.0, 2.0):
            x = scale(x, factor)
        return x

    program, kernels = trace(scaled, ROWS)
    assert [step.kernel for step in program.steps] == ["lambda", "lambda#2", "lambda"]
    assert [step.reads for step in program.steps] == [("x",), ("0.lambda.0",), ("1.lambda.0",)]
    assert kernels["lambda"].function is kernels["lambda#2"].function
    given = random_like(program)
    (found,) = execute(program, kernels, given)
    np.testing.assert_array_equal(found, scaled(jnp.asarray(given["x"])))


def test_small_arrays_that_are_closed_over_belong_to_the_kernel() -> None:
    table = np.arange(4, dtype=np.float32)
    inner = jax.jit(lambda x: x + table[None])
    outer = jax.jit(lambda x, row: x * row)
    program, kernels = trace(lambda x: outer(inner(x), table[None]), ROWS, names=("x",))
    assert program.given == ("x",)
    (found,) = execute(program, kernels, {"x": np.ones((2, 4), np.float32)})
    np.testing.assert_array_equal(found, (1 + table) * table * np.ones((2, 1), np.float32))


def test_what_a_step_does_not_look_at_is_not_read() -> None:
    outer = jax.jit(lambda params, x: layer(params[1], x))
    program, kernels = trace(outer, shapes(3), ROWS, names=("params", "x"))
    assert program.given == ("params.1.bias", "params.1.kernel", "x")
    given = random_like(program)
    (found,) = execute(program, kernels, given)
    weights = {name: jnp.asarray(given[f"params.1.{name}"]) for name in ("bias", "kernel")}
    np.testing.assert_array_equal(found, layer(weights, jnp.asarray(given["x"])))


def test_what_a_step_only_passes_on_is_no_array_of_its_own() -> None:
    inner = jax.jit(lambda x, factor: (x, factor * x, factor))

    @jax.jit
    def outer(x: jax.Array, y: jax.Array, factor: float) -> tuple[jax.Array, ...]:
        kept, scaled, factor = inner(x, factor)
        return y, scaled, kept, scaled, factor

    def forward(x: jax.Array, y: jax.Array) -> jax.Array:
        y, first, x, second, factor = outer(x, y, 2.0)
        return add(first, second, x, y, factor)

    add = jax.jit(lambda first, second, x, y, factor: first + second + 10 * x + 100 * y + factor)
    program, kernels = trace(forward, ROWS, ROWS)
    assert [(step.reads, step.writes) for step in program.steps] == [
        (("x",), ("0.outer.1",)),
        (("0.outer.1", "x", "y"), ("1.lambda.0",)),
    ]
    given = {"x": np.ones((2, 4), np.float32), "y": np.ones((2, 4), np.float32)}
    (found,) = execute(program, kernels, given)
    np.testing.assert_array_equal(found, np.full((2, 4), 2 + 2 + 10 + 100 + 2, np.float32))


def test_a_step_that_only_passes_on_is_none() -> None:
    identity = jax.jit(lambda x, y: (x, y))
    join = jax.jit(lambda x, y: x + y, donate_argnums=0)
    program, _ = trace(lambda x, y: join(*identity(x, y)), ROWS, ROWS)
    assert [step.name for step in program.steps] == ["0.lambda"]
    assert program.outputs == ("x",)


def test_the_old_value_of_an_updated_array_is_an_array_of_its_own() -> None:
    advance = jax.jit(lambda x: (x, x + 1), donate_argnums=0)
    program, kernels = trace(advance, ROWS, names=("x",))
    assert program.outputs == ("0.lambda.0", "x")
    before, after = execute(program, kernels, {"x": np.ones((2, 4), np.float32)})
    np.testing.assert_array_equal(before, np.ones((2, 4)))
    np.testing.assert_array_equal(after, np.full((2, 4), 2.0))


def test_an_array_may_be_passed_twice() -> None:
    twice = jax.jit(lambda x, y: x + 2 * y)
    program, kernels = trace(lambda x: twice(x, x), ROWS)
    assert program.steps[0].reads == ("x",)
    (found,) = execute(program, kernels, {"x": np.ones((2, 4), np.float32)})
    np.testing.assert_array_equal(found, np.full((2, 4), 3, np.float32))


def test_a_training_step_is_a_program() -> None:
    error = jax.jit(lambda x, y: ((x - y) ** 2).mean())

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return error(network(params[:1], network(params, x)), y)

    step = jax.value_and_grad(loss)
    program, kernels = trace(step, shapes(3), ROWS, ROWS, kinds=("weight", "input", "input"))
    assert len(program.outputs) == 1 + 6
    # Every residual is an array of its own, and the gradients of a layer used twice are added.
    assert sum(step.name.endswith("add_any") for step in program.steps) == 2
    assert len(kernels) < len(program.steps)
    given = random_like(program)
    params = [
        {name: jnp.asarray(given[f"params.{i}.{name}"]) for name in ("bias", "kernel")}
        for i in range(3)
    ]
    want = jax.tree.leaves(step(params, jnp.asarray(given["x"]), jnp.asarray(given["y"])))
    for found, expected in zip(execute(program, kernels, given), want, strict=True):
        np.testing.assert_array_equal(found, expected)


@jax.custom_vjp
def clipped(x: jax.Array) -> jax.Array:
    """Its gradient is cut off."""
    return 3 * x


clipped.defvjp(lambda x: (3 * x, ()), lambda _, gradient: (jnp.clip(gradient, -1, 1),))


def test_rematerialisation_and_own_derivatives_belong_to_their_step() -> None:
    block = jax.jit(lambda w, x: clipped(jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x)))
    total = jax.jit(lambda x: (2 * x).sum())

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return total(block(w, block(w, x)))

    program, kernels = trace(jax.grad(loss), SQUARE, ROWS, names=("w", "x"))
    given = random_like(program)
    want = jax.grad(loss)(jnp.asarray(given["w"]), jnp.asarray(given["x"]))
    np.testing.assert_array_equal(execute(program, kernels, given)[0], want)


def test_fills_and_conversions_of_autodiff_are_steps() -> None:
    half = jax.jit(lambda x: x.astype(jnp.bfloat16))
    first = jax.jit(lambda pair: pair[0].sum())

    def loss(x: jax.Array, unused: jax.Array) -> jax.Array:
        return first((half(x).astype(jnp.float32), unused))

    program, kernels = trace(jax.grad(loss, argnums=(0, 1)), ROWS, SQUARE)
    assert program.outputs[1] in program.arrays
    found = execute(program, kernels, random_like(program))
    np.testing.assert_array_equal(found[0], np.ones((2, 4)))
    np.testing.assert_array_equal(found[1], np.zeros((4, 4)))


@dataclasses.dataclass(frozen=True)
class Pair:
    """A pytree of one array and one field that is none."""

    value: Any
    name: str


jax.tree_util.register_dataclass(Pair, data_fields=["value"], meta_fields=["name"])


class Perceptron(nnx.Module):
    """Three layers of Flax."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])


def test_a_flax_module_is_traced_under_the_paths_of_its_parameters() -> None:
    apply = jax.jit(lambda linear, x: jnp.maximum(linear(x), 0.0))

    def forward(model: Perceptron, x: jax.Array) -> jax.Array:
        for linear in model.layers:
            x = apply(linear, x)
        return x

    model = nnx.eval_shape(lambda: Perceptron(nnx.Rngs(0)))
    program, kernels = trace(forward, model, ROWS, names=("model", "x"))
    assert program.given == (
        *(f"model.layers.{i}.{name}" for i in range(3) for name in ("bias", "kernel")),
        "x",
    )
    assert len(kernels) == 1


@pytest.mark.parametrize(
    ("argument", "root", "names"),
    [
        ({"b": [ROWS, ROWS]}, "p", ("p.b.0", "p.b.1")),
        ({"b": [ROWS, ROWS]}, "", ("b.0", "b.1")),
        ((ROWS, Pair(ROWS, "x")), "model.layers", ("model.layers.0", "model.layers.1")),
    ],
    ids=["dict", "no root", "dataclass"],
)
def test_names_are_paths(argument: Any, root: str, names: tuple[str, ...]) -> None:
    add = jax.jit(lambda tree: sum(jax.tree.leaves(tree)))
    program, _ = trace(add, argument, names=(root,))
    assert program.given == names


def test_kinds_may_be_given_by_prefix_and_the_longest_counts() -> None:
    add = jax.jit(lambda tree: sum(jax.tree.leaves(tree)))
    tree = {"a": {"b": ROWS, "bc": ROWS}, "c": ROWS}
    program, _ = trace(add, tree, kinds=({"": "weight", "tree.a": "input", "tree.a.b": "feature"},))
    assert {name: array.kind for name, array in program.arrays.items()} == {
        "tree.a.b": "feature",
        "tree.a.bc": "input",
        "tree.c": "weight",
        "0.lambda.0": "activation",
    }


def tiny_config(name: str, scratch: Path) -> Config:
    return load_config(tiny.checkpoint(name, scratch))


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_decoding_step_of_the_model(name: str, tmp_path: Path) -> None:
    config = tiny_config(name, tmp_path)
    text = config.text
    network = abstract_network(config, dtype="bfloat16")
    given = {
        "x": S((2, 1, text.hidden_size), jnp.bfloat16),
        "positions": S((3, 2, 1), jnp.int32),
        "cache": new_cache(text, batch=2, capacity=64, dtype=jnp.bfloat16).layers,
        "valid": S((2, 64), jnp.bool_),
        "new_valid": S((2, 1), jnp.bool_),
        "start": S((), jnp.int32),
    }
    phase = phases(config)["decode"]
    assert set(phase.arrays) == set(given)
    program, kernels = trace(
        phase.function,
        *(part(network, path) for path in phase.weights),
        *(given[name] for name in phase.arrays),
        names=(*phase.weights, *phase.arrays),
        kinds=(*("weight" for _ in phase.weights), *phase.arrays.values()),
    )
    weights = set(program.of_kind("weight"))
    paths = {path for path in named_arrays(network) if path.startswith(phase.weights)}
    assert weights == paths
    assert len(weights) > 10
    for path in weights:
        array = named_arrays(network)[path]
        assert program.arrays[path] == ArraySpec(path, array.shape, "bfloat16", "weight")
    layers = [
        step
        for step in program.steps
        if "cache.0.keys" in step.updates or "cache.1.keys" in step.updates
    ]
    assert [step.updates for step in layers[:2]] == [
        ("x", "cache.0.keys", "cache.0.values"),
        ("x", "cache.1.keys", "cache.1.values"),
    ]
    assert layers[0].kernel == layers[1].kernel
    caches = [
        f"cache.{i}.{part}" for i in range(text.num_hidden_layers) for part in ("keys", "values")
    ]
    assert program.outputs[1:] == (*caches, "valid")
    assert len(kernels) < len(program.steps) or name == "moe"


def test_thousands_of_arrays_take_seconds() -> None:
    """12,000 arrays in 48 layers, as in the 30B model."""
    mix = jax.jit(lambda params, x: x * params[0] + params[-1])

    def forward(params: list[list[jax.Array]], x: jax.Array) -> jax.Array:
        for group in params:
            x = mix(group, x)
        return x

    params = [[S((1, 4), jnp.float32)] * 250 for _ in range(48)]
    start = time.perf_counter()
    program, kernels = trace(forward, params, ROWS)
    seconds = time.perf_counter() - start
    assert (len(program.steps), len(kernels), len(program.given)) == (48, 1, 97)
    assert seconds < 30, "1 s on a machine that is idle"
