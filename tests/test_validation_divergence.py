"""The first layer in which two implementations differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shallow_mini

from jax_mxfp4.models.gpt_oss import GptOss
from jax_mxfp4.validation import (
    compare_captures,
    compare_layers,
    first_divergence,
    replace_weights,
    weight_matrices,
)
from jax_mxfp4.validation.gpt_oss_dense import DenseGptOss, capture

TOKENS = jnp.arange(1, 49, dtype=jnp.int32).reshape(2, 24)


def layers(wrong: int | None = None, noise: float = 0.0) -> list:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((8, 8)) / 3 for _ in range(5)]
    errors = [noise * rng.standard_normal(8) for _ in range(5)]

    def layer(index: int):
        sign = -1 if index == wrong else 1
        return lambda x: sign * np.tanh(x @ weights[index]) + errors[index]

    return [(f"layer {i}", layer(i)) for i in range(5)]


X = np.random.default_rng(1).standard_normal((4, 8))


def test_one_wrong_layer_is_named_and_its_successors_are_not() -> None:
    errors = compare_layers(layers(), layers(wrong=2), X, 1e-6)
    assert [error.beyond for error in errors] == [False, False, True, False, False]
    first = first_divergence(errors)
    assert first is not None and first.name == "layer 2"
    assert first.own is not None and first.own.relative_rms == pytest.approx(2)
    assert errors[1].accumulated.noise == 0
    assert errors[4].accumulated.relative_rms > 0.1
    assert errors[4].own is not None and errors[4].own.noise == 0


def test_small_errors_everywhere_are_no_divergence() -> None:
    errors = compare_layers(layers(), layers(noise=1e-7), X, 1e-6)
    assert first_divergence(errors) is None
    assert errors[-1].accumulated.relative_rms > 0


def test_state_can_be_a_pytree_and_nan_is_beyond() -> None:
    good = [("a", lambda s: {"x": s["x"] + 1}), ("b", lambda s: {"x": s["x"] * 2})]
    bad = [good[0], ("b", lambda s: {"x": s["x"] * np.nan})]
    (a, b) = compare_layers(good, bad, {"x": X}, 1.0)
    assert not a.beyond and b.beyond


def test_layers_of_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"actual: expected the layers \['layer 0'.*, found \[\]"):
        compare_layers(layers(), [], X, 1.0)
    with pytest.raises(ValueError, match=r"actual: expected \['a'\], found \['b'\]"):
        compare_captures({"a": X}, {"b": X}, 1.0)


def test_integers_are_reported_only() -> None:
    (error,) = compare_captures({"ids": np.arange(4)}, {"ids": np.arange(4)[::-1]}, 1e-6)
    assert error.accumulated.noise > 0 and not error.beyond


@pytest.fixture(scope="module")
def packed() -> GptOss:
    return shallow_mini.load()


def test_the_packed_model_does_not_diverge_from_the_dense_one(packed: GptOss) -> None:
    expected = capture(DenseGptOss.from_packed(packed), TOKENS)
    assert first_divergence(compare_captures(expected, capture(packed, TOKENS), 1e-5)) is None


@pytest.mark.parametrize(
    ("weight", "first"),
    [
        ("layers.1.attention.qkv.weight", "layers.1.attn_out"),
        ("layers.1.mlp.router.weight", "layers.1.router_logits"),
        ("layers.0.mlp.down", "layers.0.mlp_out"),
        ("unembedding", "logits"),
    ],
)
def test_a_damaged_weight_is_found_in_its_layer(packed: GptOss, weight: str, first: str) -> None:
    dense = DenseGptOss.from_packed(packed)
    matrix = weight_matrices(dense)[weight]
    damaged = replace_weights(dense, {weight: jnp.roll(matrix, 1, axis=-1)})
    expected = capture(packed, TOKENS)
    routing = [value for name, value in expected.items() if name.endswith("router_indices")]
    found = first_divergence(compare_captures(expected, capture(damaged, TOKENS, routing), 1e-4))
    assert found is not None and found.name == first


def test_captures_come_in_the_order_of_computation(packed: GptOss) -> None:
    names = list(capture(packed, TOKENS))
    assert names[:6] == [
        f"layers.0.{name}"
        for name in (
            *("attn_out", "router_logits", "router_indices", "router_weights"),
            *("mlp_out", "hidden"),
        )
    ]
    assert jax.tree.structure(names).num_leaves == 6 * packed.config.num_layers + 1
