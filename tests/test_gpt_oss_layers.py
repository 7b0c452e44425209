"""Pieces of a transformer block against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mxfp4.models.gpt_oss import layers
from jax_mxfp4.models.gpt_oss.routing import top_experts


# A single row, and few rows and columns, are sums of products; the others are dots.
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3), (1, 192), (5,), (300, 2), ()])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [8, 40])
def test_linear(shape, rows, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*shape, 96)), dtype)
    weight = jnp.asarray(rng.standard_normal((rows, 96)), dtype)
    bias = jnp.asarray(rng.standard_normal(rows), dtype)
    found = jax.jit(layers.linear, static_argnames="out_dtype")(
        x, weight, bias, out_dtype=jnp.float32
    )
    wide, matrix, offset = (np.asarray(array, np.float64) for array in (x, weight, bias))
    np.testing.assert_allclose(found, wide @ matrix.T + offset, rtol=0, atol=1e-4)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize(("experts", "count"), [(32, 4), (128, 4), (5, 5), (1, 1)])
@pytest.mark.parametrize(
    "values", [None, [0.0, 1.0, -1.0], [1.0, -1.0, np.inf, -np.inf], [np.nan, 1.0, np.inf, -2.0]]
)
@pytest.mark.parametrize("tokens", [(1, 50), (25, 2)])
def test_experts_are_those_of_top_k(tokens, experts, count, values):
    """Equal logits, infinite ones and NaN too."""
    rng = np.random.default_rng(0)
    shape = (*tokens, experts)
    logits = rng.standard_normal(shape) if values is None else rng.choice(values, shape)
    expected = lax.top_k(np.float32(logits), count)
    found = jax.jit(top_experts, static_argnums=1)(np.float32(logits), count)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
