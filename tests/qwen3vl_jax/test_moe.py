"""Experts against a loop over tokens; nobody is dropped however uneven the routing is."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import DATA

from qwen3vl_jax.config import load_config
from qwen3vl_jax.moe import Expert, add_experts, assign, choose, expected_groups, group_rows

EXPERTS = 8


@pytest.fixture(scope="module")
def experts() -> list[Expert]:
    config = load_config(DATA / "moe_mixed").text
    return [Expert(config, dtype=jnp.float32, rngs=nnx.Rngs(index)) for index in range(EXPERTS)]


def token_by_token(
    experts: list[Expert], rows: np.ndarray, shares: np.ndarray, chosen: np.ndarray
) -> np.ndarray:
    """Every row through its experts, in float64."""
    total = np.zeros(rows.shape)
    for row, choice in np.ndindex(chosen.shape):
        expert = experts[chosen[row, choice]]
        gate_up = np.asarray(expert.gate_up_proj[...], np.float64) @ rows[row]
        gate, up = np.split(gate_up, 2)
        inner = gate / (1 + np.exp(-gate)) * up
        down = np.asarray(expert.down_proj[...], np.float64)
        total[row] += shares[row, choice] * (down @ inner)
    return total


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("routing", ["even", "all to one pair", "all to the last pair"])
def test_every_row_gets_its_chosen_experts(count: int, routing: str, experts: list[Expert]) -> None:
    rng = np.random.default_rng(count)
    rows = rng.standard_normal((count, 64))
    match routing:
        case "even":
            chosen = np.stack([rng.permutation(EXPERTS)[:2] for _ in range(count)])
        case "all to one pair":
            chosen = np.tile([3, 0], (count, 1))
        case _:
            chosen = np.tile([EXPERTS - 1, EXPERTS - 2], (count, 1))
    shares = rng.random(chosen.shape)
    given = jnp.asarray(rows, jnp.float32)
    assigned = jnp.asarray(shares, jnp.float32), jnp.asarray(chosen, jnp.int32)
    routing = assign(given, *assigned, EXPERTS)
    found = add_experts(experts, jnp.int32(0), routing, jnp.zeros_like(given))
    wanted = token_by_token(experts, rows, shares, chosen)
    np.testing.assert_allclose(np.asarray(found), wanted, atol=2e-5)


def test_shares_of_the_chosen_experts_sum_to_one_and_equal_scores_choose_the_first() -> None:
    scores = jnp.asarray([[0.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]], jnp.float32)
    shares, chosen = choose(scores, 2)
    np.testing.assert_array_equal(np.asarray(chosen), [[1, 3], [0, 1]])
    np.testing.assert_allclose(np.asarray(shares), 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "choices", "experts", "wanted"),
    [(1, 8, 128, 1), (8, 8, 128, 4), (64, 8, 128, 4), (512, 8, 128, 32), (4096, 8, 128, 64)],
)
def test_a_group_is_what_an_expert_gets_on_average(
    rows: int, choices: int, experts: int, wanted: int
) -> None:
    assert group_rows(rows, choices, experts) == wanted


@pytest.mark.parametrize(("count", "some"), [(1, 32), (4, 32), (64, 32), (300, 32), (64, 8)])
def test_as_many_groups_are_expected_as_random_choices_make(count: int, some: int) -> None:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(50):
        chosen = np.argsort(rng.random((count, 32)), axis=1)[:, :8].astype(np.int32)
        routing = assign(jnp.zeros((count, 1)), jnp.ones((count, 8)), jnp.asarray(chosen), 32)
        each = np.bincount(chosen.reshape(-1), minlength=32)[:some]
        made.append(np.ceil(each / routing.group).sum())
    # Half a group too many for each expert at most.
    assert expected_groups(routing, some) == pytest.approx(np.mean(made), rel=0.25)
