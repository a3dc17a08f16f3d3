"""Whatever steps a layer is cut into, it gives the same bits; a fine step reads its own arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.attention import attention
from qwen3vl_jax.config import load_config
from qwen3vl_jax.layer_steps import WHOLE_LAYERS, Granularity, finish_layer, forward_layer
from qwen3vl_jax.network import abstract_network
from qwen3vl_jax.phases import Direct, Phase, phases
from qwen3vl_jax.planned.programs import trace_phase
from qwen3vl_jax.planned.shapes import decode_shapes
from qwen3vl_jax.text import DecoderLayer

GetModel = Callable[..., Qwen3VL]
FINE = {
    "dense": Granularity(split_dense=True),
    "dense_tied": Granularity(split_dense=True),
    "moe": Granularity(experts_per_step=1),
    "moe_mixed": Granularity(split_dense=True, experts_per_step=3),
}
TOKENS = 64


class Finely(Direct):
    """Runs every phase at another granularity than the model asks for."""

    def __init__(self, model: Qwen3VL, granularity: Granularity) -> None:
        super().__init__(model.network)
        self.phases = phases(model.config, granularity)

    def run(self, phase: Phase, *arrays: Any) -> Any:
        return super().run(self.phases[phase.name], *arrays)


def fine(model: Qwen3VL, name: str) -> Qwen3VL:
    runner = Finely(model, FINE[name])
    return Qwen3VL(model.config, model.network, model.settings, runner=runner)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in FINE), ("moe_mixed", "bfloat16")]
)
def test_fine_steps_give_the_bits_of_whole_layers(
    name: str, dtype: str, tiny_model: GetModel
) -> None:
    model = tiny_model(name, dtype)
    given = tiny.inputs("image" if dtype == "float32" else "batch_left")
    np.testing.assert_array_equal(fine(model, name)(**given), model(**given))
    given = tiny.inputs("text")
    greedy: dict[str, Any] = {"do_sample": False, "eos_token_id": ()}
    found, wanted = (
        one.generate(**given, max_new_tokens=TOKENS, **greedy) for one in (fine(model, name), model)
    )
    assert wanted.shape[1] == given["input_ids"].shape[1] + TOKENS
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", FINE)
def test_a_layer_can_be_finished_after_attention_was_computed_elsewhere(
    name: str, tiny_model: GetModel
) -> None:
    model = tiny_model(name)
    layer: DecoderLayer = model.network.language_model.layers[0]
    shape = (2, 5, model.config.text.hidden_size)
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    cos, sin = (jnp.zeros((2, 5, model.config.text.head_dim)) + at for at in (1.0, 0.0))
    valid = jnp.ones((2, 5), bool)

    @jax.jit
    def mixed(layer: DecoderLayer) -> Any:
        queries, keys, values = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
        return attention(queries, keys, values, jnp.arange(5, dtype=jnp.int32), valid)

    wanted = forward_layer(layer, x, cos, sin, valid, WHOLE_LAYERS)
    for granularity in (WHOLE_LAYERS, FINE[name]):
        found = finish_layer(layer, x.copy(), mixed(layer), granularity)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@functools.cache
def reads(name: str, granularity: Granularity) -> list[set[str]]:
    """Of each step of decoding that reads weights of layer 1, which."""
    config = load_config(tiny.DATA / name)
    network = abstract_network(config, dtype=jnp.float32)
    shapes = decode_shapes(config, 1, 64, jnp.float32)
    program = trace_phase(phases(config, granularity)["decode"], network, shapes).program
    prefix = "language_model.layers.1."
    found = [
        {read.removeprefix(prefix) for read in step.reads if read.startswith(prefix)}
        for step in program.steps
    ]
    return [names for names in found if names]


def test_a_dense_layer_is_attention_and_a_step_for_each_matrix() -> None:
    attention, *mlp = reads("dense", FINE["dense"])
    assert attention == {"input_layernorm.weight"} | {
        f"self_attn.{part}.weight"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    }
    assert mlp == [
        {"post_attention_layernorm.weight", "mlp.gate_proj.weight"},
        {"mlp.up_proj.weight"},
        {"mlp.down_proj.weight"},
    ]
    assert reads("dense", WHOLE_LAYERS) == [attention.union(*mlp)]


@pytest.mark.parametrize("together", [1, 3, 100])
def test_experts_come_in_groups_in_their_order(together: int) -> None:
    experts = load_config(tiny.DATA / "moe").text.num_experts
    _, router, *groups = reads("moe", Granularity(experts_per_step=together))
    assert router == {"post_attention_layernorm.weight", "mlp.gate.weight"}
    assert groups == [
        {
            f"mlp.experts.{expert}.{part}"
            for expert in range(first, min(first + together, experts))
            for part in ("gate_up_proj", "down_proj")
        }
        for first in range(0, experts, together)
    ]
    assert len(groups) == -(-experts // together)


def test_layers_of_the_other_kind_stay_whole() -> None:
    assert len(reads("moe_mixed", Granularity(split_dense=True))) == 4  # layer 1 is dense
    assert len(reads("moe_mixed", Granularity(experts_per_step=1))) == 1
