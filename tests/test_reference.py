"""The definitions: exact where they can be, within the tolerance policy elsewhere."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_mxfp4 import format as mxfp4_format
from jax_mxfp4 import reference
from jax_mxfp4.array import MXFP4Array

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# dequantize and take ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_exact(rng, dtype):
    w = oracle.random_weight(rng, 3, 5, 96, scales=(0, 255))
    actual = np.asarray(reference.dequantize(w, dtype))
    assert actual.dtype == dtype
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(actual, oracle.decode(w).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32])
def test_take_follows_jnp_take(rng, dtype, ids_dtype):
    # More rows than a byte can count, so that narrow ids must not be compared in their own dtype.
    w = oracle.random_weight(rng, 300, 64)
    info = np.iinfo(ids_dtype)
    ids = np.array([0, 7, 126, 299, 300, 2**31, -1, -128, -300, -301, info.min, info.max])
    ids = ids.clip(info.min, info.max).astype(ids_dtype).reshape(1, 12, 1)
    actual = reference.take(w, ids, dtype)
    assert actual.dtype == dtype
    assert actual.shape == (1, 12, 1, 64)
    actual = np.asarray(actual, np.float32)

    wide = ids.astype(np.int64)
    valid = (wide >= -300) & (wide < 300)
    np.testing.assert_array_equal(actual[valid], oracle.decode(w)[wide[valid]])
    assert np.isnan(actual[~valid]).all()
    # jnp.take wraps ids beyond int32 around, so that it can be compared only below.
    same = jnp.take(reference.dequantize(w, jnp.float32), wide.clip(max=2**31 - 1), axis=0)
    np.testing.assert_array_equal(actual, same)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_take_with_scalar_and_empty_ids(rng, shape):
    w = oracle.random_weight(rng, 4, 32)
    rows = reference.take(w, np.full(shape, 3), jnp.float32)
    assert rows.shape == (*shape, 32)
    np.testing.assert_array_equal(rows, np.broadcast_to(oracle.decode(w)[3], rows.shape))


# matmul -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
@pytest.mark.parametrize("bias_dtype", [None, jnp.float32, jnp.bfloat16])
def test_matmul_of_small_integers_is_exact_and_rounded_once(rng, x_dtype, out_dtype, bias_dtype):
    w = oracle.random_weight(rng, 24, 128, scales=(125, 128))
    x = oracle.random_integers(rng, 2, 3, 128, dtype=np.dtype(x_dtype))
    bias = (
        None if bias_dtype is None else oracle.random_integers(rng, 24, dtype=np.dtype(bias_dtype))
    )
    y = jax.jit(reference.matmul, static_argnames="out_dtype")(x, w, bias, out_dtype=out_dtype)
    exact = x.astype(np.float64) @ oracle.decode(w).T
    if bias is not None:
        exact = exact + bias.astype(np.float64)
    assert y.dtype == (out_dtype or x_dtype)
    np.testing.assert_array_equal(y, exact.astype(y.dtype))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 32), (1, 7, 2880), (5, 40, 96), (130, 64, 1024)])
def test_matmul_is_within_tolerance(rng, x_dtype, m, n, k):
    w = oracle.random_weight(rng, n, k)
    x = oracle.random_floats(rng, m, k, dtype=np.dtype(x_dtype))
    bias = oracle.random_floats(rng, n, dtype=np.dtype(x_dtype))
    expected = tolerance.expected_matmul(
        x.astype(np.float64), oracle.decode(w), bias.astype(np.float64)
    )
    tolerance.assert_close(reference.matmul(x, w, bias), expected)
    tolerance.assert_close(reference.matmul(x, w, bias, jnp.float32), expected)


def test_matmul_of_a_vector(rng):
    w = oracle.random_weight(rng, 24, 64)
    x = oracle.random_floats(rng, 64, dtype=np.dtype(np.float32))
    y = reference.matmul(x, w)
    assert y.shape == (24,)
    expected = tolerance.expected_matmul(x[None].astype(np.float64), oracle.decode(w))
    tolerance.assert_close(y[None], expected)


def test_float32_operands_keep_all_their_bits(rng):
    # Weight row n is 1 at column n and 0 elsewhere: TF32 or bfloat16 products would round x.
    codes = 2 * np.eye(64, dtype=np.uint8)
    w = MXFP4Array(mxfp4_format.pack_codes(codes), np.full((64, 2), 127, np.uint8))
    x = oracle.random_floats(rng, 16, 64, dtype=np.dtype(np.float32))
    np.testing.assert_array_equal(reference.matmul(x, w), x)


def test_golden_dot_products():
    golden = np.load(GOLDEN / "mx" / "dot_general.npz")

    def packed(side):
        blocks = mxfp4_format.pack_codes(golden[f"codes_{side}"].reshape(256, 128))
        return MXFP4Array(blocks, golden[f"scale_{side}"])

    a, b = packed("a"), packed("b")
    x = np.asarray(reference.dequantize(a, jnp.bfloat16))
    expected = tolerance.expected_matmul(x.astype(np.float64), oracle.decode(b))
    for y in (reference.matmul(x, b, None, jnp.float32), reference.matmul(x.astype(np.float32), b)):
        tolerance.assert_close(y, expected)
        golden_diagonal = tolerance.Expected(
            golden["dot"], np.diagonal(expected.worst), np.diagonal(expected.variance)
        )
        tolerance.assert_close(np.diagonal(y), golden_diagonal)


def test_matmul_gradient_is_the_transposed_product(rng):
    w = oracle.random_weight(rng, 24, 64, scales=(125, 128))
    x = oracle.random_integers(rng, 5, 64, dtype=np.dtype(np.float32))
    bias = oracle.random_integers(rng, 24, dtype=np.dtype(np.float32))
    cotangent = oracle.random_integers(rng, 5, 24, dtype=np.dtype(np.float32))
    _, vjp = jax.vjp(jax.jit(lambda x, bias: reference.matmul(x, w, bias)), x, bias)
    dx, dbias = vjp(cotangent)
    np.testing.assert_array_equal(dx, cotangent @ oracle.decode(w).astype(np.float32))
    np.testing.assert_array_equal(dbias, cotangent.sum(axis=0))


@pytest.mark.parametrize("x_dtype", DTYPES)
def test_matmul_keeps_only_the_packed_weight_for_the_backward_pass(rng, x_dtype):
    w = jax.tree.map(jnp.asarray, oracle.random_weight(rng, 256, 512))
    x = jnp.zeros((1, 512), x_dtype)
    _, vjp = jax.vjp(lambda x, w: reference.matmul(x, w), x, w)
    assert largest_residual(vjp) <= w.blocks.nbytes


def largest_residual(vjp) -> int:
    """Bytes of the largest array that a function returned by `jax.vjp` holds."""
    return max(leaf.nbytes for leaf in jax.tree.leaves(vjp))


# moe --------------------------------------------------------------------------------------------

EXPERTS, HIDDEN, WIDTH = 6, 64, 96

# Compiled once for all tests that use the same shapes.
moe = jax.jit(reference.moe, static_argnames=("alpha", "limit", "out_dtype"))


def moe_weights(rng, scales=(120, 124)):
    """Weights and float32 biases of a small expert layer, in the order `moe` takes them."""
    return (
        oracle.random_weight(rng, EXPERTS, 2 * HIDDEN, WIDTH, scales=scales),
        oracle.random_floats(rng, EXPERTS, 2 * HIDDEN, dtype=np.dtype(np.float32)),
        oracle.random_weight(rng, EXPERTS, WIDTH, HIDDEN, scales=scales),
        oracle.random_floats(rng, EXPERTS, WIDTH, dtype=np.dtype(np.float32)),
    )


def routed(rng, tokens, top_k, dtype, low=0, high=EXPERTS):
    """Tokens with ids in low..high-1 (repetitions included) and routing weights."""
    x = oracle.random_floats(rng, tokens, WIDTH, dtype=np.dtype(dtype))
    ids = rng.integers(low, high, (tokens, top_k)).astype(np.int32)
    return x, ids, rng.random((tokens, top_k), np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_moe_is_within_tolerance(rng, dtype, tokens):
    weights = moe_weights(rng)
    x, ids, routing = routed(rng, tokens, 3, dtype, low=-2, high=EXPERTS + 2)
    expected = oracle.moe(x, ids, routing, *weights)
    y = moe(x, ids, routing, *weights)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    tolerance.assert_close(y, expected)
    y = moe(x, ids, routing, *weights, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    tolerance.assert_close(y, expected)


@pytest.mark.parametrize("tokens", [1, 30])
def test_moe_options(rng, tokens):
    gate_up, _, down, _ = moe_weights(rng, scales=(123, 126))
    x, ids, routing = routed(rng, tokens, 2, np.float32)
    y = moe(x, ids, routing, gate_up, None, down, None, alpha=0.7, limit=2.0)
    expected = oracle.moe(x, ids, routing, gate_up, None, down, None, alpha=0.7, limit=2.0)
    tolerance.assert_close(y, expected)
    assert not np.allclose(y, moe(x, ids, routing, gate_up, None, down, None))


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_moe_when_all_tokens_choose_one_expert(rng, expert):
    weights = moe_weights(rng)
    x, ids, routing = routed(rng, 50, 2, np.float32, expert, expert + 1)
    tolerance.assert_close(moe(x, ids, routing, *weights), oracle.moe(x, ids, routing, *weights))


@pytest.mark.parametrize("tokens", [1, 30])
def test_moe_flattens_leading_axes(rng, tokens):
    weights = moe_weights(rng)
    x, ids, routing = routed(rng, 6 * tokens, 2, np.float32)
    y = moe(*(a.reshape(2, 3, tokens, -1) for a in (x, ids, routing)), *weights)
    assert y.shape == (2, 3, tokens, WIDTH)
    np.testing.assert_array_equal(y.reshape(x.shape), moe(x, ids, routing, *weights))


@pytest.mark.parametrize("tokens", [1, 30])
def test_ids_outside_the_experts_contribute_exactly_zero(rng, tokens):
    weights = moe_weights(rng)
    x, ids, routing = routed(rng, tokens, 2, np.float32)
    expected = moe(x, ids, routing, *weights)
    for outside in (-1, EXPERTS, np.iinfo(np.int32).max, np.iinfo(np.int32).min):
        more_ids = np.concatenate([ids, np.full((tokens, 1), outside, np.int32)], axis=1)
        more_routing = np.concatenate([routing, np.full((tokens, 1), np.inf, np.float32)], axis=1)
        actual = moe(x, more_ids, more_routing, *weights)
        tolerance.assert_close(actual, oracle.moe(x, ids, routing, *weights))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    nothing = moe(x, np.full_like(ids, -1), np.full_like(routing, np.nan), *weights)
    np.testing.assert_array_equal(nothing, np.zeros_like(x))


def test_expert_shards_add_up(rng):
    gate_up, gate_up_bias, down, down_bias = moe_weights(rng)
    x, ids, routing = routed(rng, 20, 3, np.float32)
    parts = []
    for first in (0, 3):
        shard = slice(first, first + 3)
        experts = (gate_up[shard], gate_up_bias[shard], down[shard], down_bias[shard])
        parts.append(moe(x, ids - first, routing, *experts))
    expected = oracle.moe(x, ids, routing, gate_up, gate_up_bias, down, down_bias)
    tolerance.assert_close(parts[0] + parts[1], expected)


def naive_moe(x, ids, routing, gate_up, gate_up_bias, down, down_bias):
    """All experts on all tokens in float32, decoded at once: what `moe` must never do."""
    gu = jnp.einsum("td,eid->tei", x, gate_up, precision="highest") + gate_up_bias
    gate, up = jnp.minimum(gu[..., 0::2], 7.0), jnp.clip(gu[..., 1::2], -7.0, 7.0)
    h = gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    y = jnp.einsum("tei,edi->ted", h, down, precision="highest") + down_bias
    return jnp.einsum(
        "tkd,tk->td", y[np.arange(len(x))[:, None], ids], routing, precision="highest"
    )


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_moe_gradients(rng, tokens):
    gate_up, gate_up_bias, down, down_bias = moe_weights(rng)
    x, ids, routing = routed(rng, tokens, 2, np.float32)
    cotangent = oracle.random_floats(rng, tokens, WIDTH, dtype=np.dtype(np.float32))
    dense = [oracle.decode(w).astype(np.float32) for w in (gate_up, down)]

    def packed_loss(x, routing, b1, b2):
        return jnp.vdot(moe(x, ids, routing, gate_up, b1, down, b2), cotangent)

    def dense_loss(x, routing, b1, b2):
        return jnp.vdot(naive_moe(x, ids, routing, dense[0], b1, dense[1], b2), cotangent)

    arguments = (x, routing, gate_up_bias, down_bias)
    actual = jax.jit(jax.grad(packed_loss, argnums=(0, 1, 2, 3)))(*arguments)
    expected = jax.jit(jax.grad(dense_loss, argnums=(0, 1, 2, 3)))(*arguments)
    for a, e in zip(actual, expected, strict=True):
        # Both are float32 chains of three products: a few rho of the longest one, relative to
        # the largest entry.
        np.testing.assert_allclose(a, e, rtol=0, atol=8 * tolerance.rho(128) * np.abs(e).max())


@pytest.mark.parametrize("tokens", [1, 40])
def test_moe_keeps_only_packed_weights_for_the_backward_pass(rng, tokens):
    gate_up, gate_up_bias, down, down_bias = moe_weights(rng)
    gate_up, down = jax.tree.map(jnp.asarray, (gate_up, down))
    x, ids, routing = routed(rng, tokens, 2, np.float32)
    weights = (gate_up, gate_up_bias, down, down_bias)
    _, vjp = jax.vjp(lambda x: reference.moe(x, ids, routing, *weights), x)
    # The tiles of x may be kept; the decoded weights of all tiles would be larger.
    tile_elements = 3 * ids.size * WIDTH if tokens > 1 else 0
    limit = max(gate_up.blocks.nbytes, 4 * tile_elements)
    assert limit < 4 * gate_up.size
    assert largest_residual(vjp) <= limit


@pytest.mark.parametrize("tokens", [1, 20])
def test_moe_under_vmap_over_tokens_and_over_weights(rng, tokens):
    weights = moe_weights(rng)
    x, ids, routing = routed(rng, 3 * tokens, 2, np.float32)
    batch = [a.reshape(3, tokens, -1) for a in (x, ids, routing)]
    expected = oracle.moe(x, ids, routing, *weights)
    y = jax.vmap(lambda x, ids, routing: moe(x, ids, routing, *weights))(*batch)
    tolerance.assert_close(y.reshape(x.shape), expected)
    stacked = jax.tree.map(lambda a: np.stack([a, a[::-1]]), weights)
    y = jax.vmap(lambda w: moe(x, ids, routing, *w))(stacked)
    tolerance.assert_close(y[0], expected)
    tolerance.assert_close(y[1], oracle.moe(x, EXPERTS - 1 - ids, routing, *weights))


def test_moe_is_deterministic(rng):
    weights = moe_weights(rng)
    inputs = routed(rng, 40, 3, np.float32)
    first = np.asarray(moe(*inputs, *weights))
    for _ in range(3):
        np.testing.assert_array_equal(moe(*inputs, *weights), first)


plan_tiles = jax.jit(reference._plan_tiles, static_argnums=1)


@settings(deadline=None, derandomize=True)
@given(
    hnp.arrays(np.int32, st.sampled_from([4, 5, 41]), elements=st.integers(-1, 5)),
)
def test_every_routing_fits_the_tiles(ids):
    slot, tile_expert, tile_rows = jax.device_get(plan_tiles(jnp.asarray(ids), 5))
    rows = len(tile_expert) * tile_rows
    valid = (ids >= 0) & (ids < 5)
    np.testing.assert_array_equal(slot < rows, valid)
    assert len(set(slot[valid])) == valid.sum()
    np.testing.assert_array_equal(tile_expert[slot[valid] // tile_rows], ids[valid])
    # No tile without rows belongs to an expert: it would be decoded for nothing.
    assert set(np.flatnonzero(tile_expert < 5)) == set(slot[valid] // tile_rows)
