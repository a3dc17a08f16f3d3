"""Phases can be planned: they compute in steps only, and the model reaches weights through them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qwen3vl_jax import Qwen3VL, text
from qwen3vl_jax.cache import LayerCache
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.inputs import picture_pieces
from qwen3vl_jax.network import Qwen3VLNetwork, abstract_network, empty_features
from qwen3vl_jax.phases import Direct, Phase, Runner, part, phases
from qwen3vl_jax.weights import block_rows

GetModel = Callable[..., Qwen3VL]
B, T, S, FEATURES = 2, 5, 64, 16
PHASES = sorted(phases(load_config(tiny.DATA / "dense")))
UPDATED = {
    "vision": {"features"},
    "prefill": {"cache", "valid", "kept"},
    "decode": {"cache", "valid"},
    "verify": {"cache", "valid"},
}


def arguments(config: Config, tokens: int) -> dict[str, Any]:
    """An argument of every name that phases have."""
    size, heads = config.text.hidden_size, config.text.num_key_value_heads
    keys = jnp.zeros((B * heads, S, config.text.head_dim))
    given = tiny.inputs("image")
    return {
        "x": jnp.zeros((B, tokens, size)),
        "positions": np.zeros((3, B, tokens), np.int32),
        "feature_rows": np.zeros((B, tokens), np.int32),
        "features": empty_features(FEATURES, config, jnp.float32),
        "cache": tuple(
            LayerCache(keys.copy(), keys.copy()) for _ in range(config.text.num_hidden_layers)
        ),
        "valid": jnp.zeros((B, S), bool),
        "new_valid": np.ones((B, tokens), bool),
        "start": np.array(3, np.int32),
        "kept": jnp.zeros((B, 1, size)),
        "place": np.zeros(B, np.int32),
        "here": np.ones(B, bool),
        "piece": next(picture_pieces(config, given)),
    }


@functools.cache
def empty_network(checkpoint: str, blocks: int) -> Qwen3VLNetwork:
    config = load_config(tiny.DATA / checkpoint)
    rows = block_rows(config.text.vocab_size, blocks)
    return abstract_network(config, dtype=jnp.float32, vocab_rows=rows)


def call(phase: Phase, config: Config) -> dict[str, Any]:
    found = arguments(config, 1 if phase.name in ("decode", "scores") else T)
    if phase.name == "forward":
        found["valid"] = np.ones((B, T), bool)
    return {name: found[name] for name in phase.arrays}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("checkpoint", tiny.STORED)
@pytest.mark.parametrize("name", PHASES)
def test_a_phase_computes_in_jitted_steps_only(name: str, checkpoint: str, blocks: int) -> None:
    config = load_config(tiny.DATA / checkpoint)
    phase, network = phases(config)[name], empty_network(checkpoint, blocks)
    weights = [part(network, path) for path in phase.weights]
    traced = jax.make_jaxpr(phase.function)(*weights, *call(phase, config).values())
    found = {equation.primitive.name for equation in traced.eqns}
    assert found == {"jit"}
    assert not traced.consts


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_consumes_what_it_updates_and_nothing_else(name: str, tiny_model: GetModel) -> None:
    model = tiny_model("dense")
    phase = phases(model.config)[name]
    given = call(phase, model.config)
    Direct(model.network).run(phase, *given.values())
    for argument, value in given.items():
        arrays = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array)]
        consumed = {leaf.is_deleted() for leaf in arrays}
        updated = argument in UPDATED.get(name, set())
        # The embeddings become hidden values; only the first step of `forward` leaves them.
        assert consumed <= {updated or (argument == "x")}
    assert not any(weight.is_deleted() for weight in model.parameters.values())


def test_kinds_are_those_that_a_planner_knows() -> None:
    every = phases(load_config(tiny.DATA / "dense")).values()
    found = {kind for phase in every for kind in phase.arrays.values()}
    assert found == {"cache", "embedding", "feature", "input"}


@pytest.mark.parametrize("tied", [False, True])
def test_phases_name_the_parts_of_a_network(tied: bool) -> None:
    checkpoint = "dense_tied" if tied else "dense"
    config, network = load_config(tiny.DATA / checkpoint), empty_network(checkpoint, 1)
    head = part(network, phases(config)["scores"].weights[1])
    assert head is network.head
    everything = {path for phase in phases(config).values() for path in phase.weights}
    named = {"visual", "language_model.layers", "language_model.norm"}
    assert everything == named | {"language_model.embed_tokens" if tied else "lm_head"}


class Watching:
    """A runner that has the weights and notes what passes; the model beside it has none."""

    chunk_tokens = 7

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.seen: list[str] = []

    def expect(self, batch: int, capacity: int, prompt_tokens: int | None = None) -> Any:
        return self.runner.expect(batch, capacity, prompt_tokens)

    def seal(self, name: str, block: Any) -> Any:
        return self.runner.seal(name, block)

    def settle(self, features: Any) -> Any:
        return self.runner.settle(features)

    def wait(self) -> None:
        self.runner.wait()

    def close(self) -> None:
        self.runner.close()

    def embed(self, token_ids: Any) -> Any:
        self.seen.append("embed")
        return self.runner.embed(token_ids)

    def run(self, phase: Phase, *arrays: Any) -> Any:
        assert len(arrays) == len(phase.arrays)
        self.seen.append(phase.name)
        return self.runner.run(phase, *arrays)


def without_weights(model: Qwen3VL) -> tuple[Qwen3VL, Watching]:
    runner = Watching(Direct(model.network))
    empty = abstract_network(model.config, dtype=model.dtype)
    return Qwen3VL(model.config, empty, model.settings, runner=runner), runner


def test_a_model_without_weights_computes_through_its_runner(tiny_model: GetModel) -> None:
    model, given = tiny_model("dense"), tiny.inputs("image_video")
    empty, runner = without_weights(model)
    assert empty.dtype == model.dtype
    np.testing.assert_array_equal(empty(**given), model(**given))
    assert runner.seen[-2:] == ["embed", "forward"]
    assert set(runner.seen[:-2]) == {"vision"}

    runner.seen.clear()
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    found = empty.generate(**given, **settings)
    np.testing.assert_array_equal(found, model.generate(**given, **settings))
    chunks = -(-given["input_ids"].shape[1] // runner.chunk_tokens)
    after = [name for name in runner.seen if name != "vision"]
    assert after == ["embed", "prefill"] * chunks + ["scores"] + ["embed", "decode"] * 2


def test_drafts_are_verified_through_the_runner(tiny_model: GetModel) -> None:
    empty, runner = without_weights(tiny_model("dense"))
    cache = empty.new_cache(batch=1, capacity=20)
    _, cache = empty.prefill({"input_ids": np.array([[5, 6, 7]])}, cache)
    runner.seen.clear()
    empty.verify(np.array([[8, 9, 10]], np.int32), cache)
    assert runner.seen == ["embed", "verify"]


def test_a_flat_layer_is_its_layer(tiny_model: GetModel) -> None:
    model = tiny_model("moe_mixed")
    config = model.config
    layers = model.network.language_model.layers
    flat = text.flat_layers(layers)
    for one, other in zip(layers, flat, strict=True):
        found, wanted = jax.tree.leaves(other), jax.tree.leaves(one)
        assert [id(array) for array in found] == [id(array) for array in wanted]
    # Layers of one kind share one structure, so they share one program.
    kinds = {config.text.is_sparse(index) for index in range(len(layers))}
    assert len({id(layer.structure) for layer in flat}) == len(kinds)


def test_decoding_compiles_one_program_for_all_layers_and_tokens(tiny_model: GetModel) -> None:
    model = tiny_model("dense")
    _, cache = model.prefill(
        {"input_ids": np.array([[5, 6, 7]])}, model.new_cache(batch=1, capacity=90)
    )
    text.cached_layer.clear_cache()  # another test may have compiled this shape
    before = text.cached_layer._cache_size()
    for token in range(4):
        _, cache = model.decode(np.array([token], np.int32), cache)
    assert text.cached_layer._cache_size() - before == 1
