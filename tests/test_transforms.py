"""jit, vmap, grad, scan, remat and shard_map of the operations.

The data are small integers, for which float32 arithmetic is exact in any order: a transformed
call must equal the plain one bit by bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from oracle import DTYPES, decode, random_floats, random_integers, random_weight

import jax_mxfp4 as mx
from jax_mxfp4 import ffi

F32, BF16, F16 = DTYPES
RNG = np.random.default_rng(0)
B, M, N, K = 3, 5, 24, 64
X = random_integers(RNG, B, M, K, dtype=F32)
BIAS = random_integers(RNG, B, N, dtype=F32)
WS = random_weight(RNG, B, N, K, scales=(125, 128))
W = WS[0]
IDS = RNG.integers(-N - 2, N + 2, (B, M), np.int32)

T, E, TOP_K, I = 4, 8, 2, 32  # noqa: E741
TOKENS = random_floats(RNG, B, T, K, dtype=F32) / 8
EXPERT_IDS = RNG.integers(-1, E + 1, (B, T, TOP_K), np.int32)
SHARES = RNG.random((B, T, TOP_K), np.float32)
GATE_UPS = random_weight(RNG, B, E, 2 * I, K, scales=(124, 126))
DOWNS = random_weight(RNG, B, E, K, I, scales=(124, 126))
GATE_UP, DOWN = GATE_UPS[0], DOWNS[0]
GATE_UP_BIAS = random_floats(RNG, E, 2 * I, dtype=F32)
DOWN_BIAS = random_floats(RNG, E, K, dtype=F32)


@pytest.fixture(params=["reference", "platform", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request, monkeypatch):
    """As for the values, and the choice by platform with both branches in the program."""
    if request.param != "platform":
        return request.param
    if jax.default_backend() == "gpu" and ffi.why_unavailable() is not None:
        pytest.skip(f"would call kernels: {ffi.why_unavailable()}")
    monkeypatch.setattr(ffi, "_unavailable", None)
    return None


@pytest.fixture
def matmul(implementation):
    return functools.partial(mx.matmul, implementation=implementation)


@pytest.fixture
def moe(implementation):
    return functools.partial(mx.moe, implementation=implementation)


def stack(calls):
    return np.stack([np.asarray(y) for y in calls])


def pick(many, axes, i):
    """Item i of the arguments that are batched along axis 0, item 0 of the others."""
    return [
        jax.tree.map(lambda leaf, at=i if axis == 0 else 0: leaf[at], a)
        for a, axis in zip(many, axes, strict=True)
    ]


def batched(many, axes):
    """The arguments of the vmapped function: a whole batch where axes say 0, else its item 0."""
    ones = pick(many, axes, 0)
    return [a if axis == 0 else one for a, one, axis in zip(many, ones, axes, strict=True)]


def assert_near(actual, expected):
    """For the expert layer, whose activation is not exact: equal up to float32 rounding."""
    scale = np.nanmax(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * scale)


# jit and vmap ------------------------------------------------------------------------------------


def test_jit_equals_eager(implementation, matmul, moe):
    options = {"implementation": implementation}
    for op, args in [
        (functools.partial(mx.dequantize, **options), (W,)),
        (functools.partial(mx.take, **options), (W, IDS)),
        (matmul, (X, W)),
        (moe, (TOKENS, EXPERT_IDS, SHARES, GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS)),
    ]:
        np.testing.assert_array_equal(jax.jit(op)(*args), op(*args))


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_matmul_over_x(matmul, axis):
    x = np.moveaxis(X, 0, axis)
    actual = jax.vmap(lambda x: matmul(x, W, bias=BIAS[0]), in_axes=axis)(x)
    expected = stack(matmul(x, W, bias=BIAS[0]) for x in X)
    np.testing.assert_array_equal(actual, expected)


def test_vmap_matmul_over_everything_else(matmul):
    def op(x, w, bias):
        return matmul(x, w, bias=bias)

    many = (X, WS, BIAS)
    for axes in [(None, 0, None), (0, 0, None), (None, None, 0), (0, None, 0), (0, 0, 0)]:
        expected = stack(op(*pick(many, axes, i)) for i in range(B))
        np.testing.assert_array_equal(jax.vmap(op, in_axes=axes)(*batched(many, axes)), expected)


def test_vmap_matmul_nested(matmul):
    actual = jax.vmap(lambda w: jax.vmap(lambda x: matmul(x, w))(X))(WS)
    np.testing.assert_array_equal(actual, stack(matmul(X, WS[i]) for i in range(B)))
    actual = jax.vmap(jax.vmap(lambda x: matmul(x, W)))(X)
    np.testing.assert_array_equal(actual, matmul(X, W))


def test_vmap_dequantize(implementation):
    dequantize = functools.partial(mx.dequantize, implementation=implementation)
    np.testing.assert_array_equal(jax.vmap(dequantize)(WS), dequantize(WS))
    half_batched = jax.vmap(
        lambda scales: dequantize(mx.MXFP4Array(W.blocks, scales), jnp.float32)
    )(WS.scales)
    expected = stack(decode(mx.MXFP4Array(W.blocks, WS.scales[i])) for i in range(B))
    np.testing.assert_array_equal(half_batched, expected)


def test_vmap_take(implementation):
    take = functools.partial(mx.take, implementation=implementation)
    np.testing.assert_array_equal(jax.vmap(lambda ids: take(W, ids))(IDS), take(W, IDS))
    np.testing.assert_array_equal(
        jax.vmap(jax.vmap(lambda ids: take(W, ids)), in_axes=1, out_axes=1)(IDS), take(W, IDS)
    )
    expected = stack(take(WS[i], IDS[i]) for i in range(B))
    np.testing.assert_array_equal(jax.vmap(take)(WS, IDS), expected)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (0, 0, None), (0, 0, 0)])
def test_vmap_moe(moe, axes):
    x_axis, routing_axis, experts_axis = axes

    def op(x, ids, shares, gate_up, down):
        return moe(x, ids, shares, gate_up, GATE_UP_BIAS, down, None)

    many = (TOKENS, EXPERT_IDS, SHARES, GATE_UPS, DOWNS)
    in_axes = (x_axis, routing_axis, routing_axis, experts_axis, experts_axis)

    expected = stack(op(*pick(many, in_axes, i)) for i in range(B))
    assert_near(jax.vmap(op, in_axes=in_axes)(*batched(many, in_axes)), expected)


def test_vmap_that_batches_no_operand(matmul):
    actual = jax.vmap(lambda _: matmul(X, W), out_axes=None)(jnp.arange(2))
    np.testing.assert_array_equal(actual, matmul(X, W))


# Gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_grad_of_matmul(matmul, dtype, out_dtype):
    x, bias = X.astype(dtype), BIAS[0].astype(dtype)
    dy = random_integers(np.random.default_rng(1), B, M, N, dtype=out_dtype)

    @jax.jit
    def gradients(x, bias, dy):
        _, vjp = jax.vjp(lambda x, bias: matmul(x, W, bias=bias, out_dtype=out_dtype), x, bias)
        return vjp(dy)

    dx, db = gradients(x, bias, dy)
    exact = dy.astype(np.float64)
    np.testing.assert_array_equal(dx, (exact @ decode(W)).astype(dtype))
    np.testing.assert_array_equal(db, exact.sum((0, 1)).astype(dtype))
    assert dx.dtype == db.dtype == dtype


def test_grad_through_a_nonlinearity(matmul):
    x = random_floats(np.random.default_rng(1), M, K, dtype=F32)
    actual = jax.jit(jax.grad(lambda x: jnp.tanh(matmul(x, W) / 8).sum()))(x)
    w = decode(W)
    exact = (1 - np.tanh(x.astype(np.float64) @ w.T / 8) ** 2) / 8 @ w
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_of_moe(moe, dtype):
    """Against finite differences in float64 of an independent formula."""
    x, ids, shares = TOKENS[0].astype(dtype), EXPERT_IDS[0], SHARES[0]
    rng = np.random.default_rng(1)
    dy = random_floats(rng, T, K, dtype=F32)
    gate_up, down = decode(GATE_UP), decode(DOWN)

    def loss(x, shares, gate_up_bias, down_bias):
        total = 0.0
        for token in range(T):
            for j, e in enumerate(ids[token]):
                if 0 <= e < E:
                    gu = gate_up[e] @ x[token] + gate_up_bias[e]
                    gate, up = np.minimum(gu[0::2], 7), np.clip(gu[1::2], -7, 7)
                    hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
                    y = down[e] @ hidden + down_bias[e]
                    total += shares[token, j] * (dy[token] @ y)
        return total

    args = (x, shares, GATE_UP_BIAS, DOWN_BIAS)
    gradients = jax.jit(
        jax.grad(
            lambda x, shares, gate_up_bias, down_bias: (
                moe(x, ids, shares, GATE_UP, gate_up_bias, DOWN, down_bias, out_dtype=F32) * dy
            ).sum(),
            argnums=(0, 1, 2, 3),
        )
    )(*args)
    exact = [np.asarray(a).astype(np.float64) for a in args]
    for index, (argument, gradient) in enumerate(zip(args, gradients, strict=True)):
        assert gradient.dtype == argument.dtype
        gradient = np.asarray(gradient).astype(np.float64)
        direction = rng.standard_normal(argument.shape)
        step = np.zeros_like(exact[index]) + 1e-6 * direction
        up, down_ = (
            [a + s * step if i == index else a for i, a in enumerate(exact)] for s in (1, -1)
        )
        slope = (loss(*up) - loss(*down_)) / 2e-6
        norm = np.linalg.norm(gradient) * np.linalg.norm(direction)
        tolerance = {F32: 1e-4, F16: 2e-3, BF16: 1e-2}[dtype]
        assert abs((gradient * direction).sum() - slope) <= tolerance * norm


def test_packed_weights_have_no_gradient(matmul, moe, implementation):
    def loss(w, gate_up, down):
        y = matmul(X, w).sum() + mx.dequantize(w, F32, implementation=implementation).sum()
        y += mx.take(w, jnp.arange(3), dtype=F32, implementation=implementation).sum()
        return y + moe(TOKENS, EXPERT_IDS, SHARES, gate_up, None, down, None).sum()

    gradients = jax.grad(loss, (0, 1, 2), allow_int=True)(W, GATE_UP, DOWN)
    for gradient, w in zip(gradients, (W, GATE_UP, DOWN), strict=True):
        assert isinstance(gradient, mx.MXFP4Array)
        assert gradient.shape == w.shape
        assert gradient.blocks.dtype == gradient.scales.dtype == jax.dtypes.float0


def test_residuals_are_packed(matmul, moe):
    """Reverse mode keeps no decoded weight; for `matmul` not even x."""

    def matmul_loss(x, w):
        return matmul(x, w)

    def moe_loss(x, gate_up, down):
        return moe(x, EXPERT_IDS, SHARES, gate_up, GATE_UP_BIAS, down, DOWN_BIAS)

    for f, args, weights in [
        (matmul_loss, (X, W), (W,)),
        (moe_loss, (TOKENS, GATE_UP, DOWN), (GATE_UP, DOWN)),
    ]:
        residuals = jax.tree.leaves(jax.vjp(f, *args)[1])
        packed = [r for r in residuals if r.dtype == jnp.uint8]
        assert sum(r.size for r in packed) == sum(w.nbytes for w in weights)
        floats = [r for r in residuals if jnp.issubdtype(r.dtype, jnp.floating)]
        assert all(r.size < min(w.size for w in weights) for r in floats)
    floats = [r.shape for r in jax.tree.leaves(jax.vjp(matmul_loss, X, W)[1]) if r.dtype == F32]
    assert not floats


@pytest.mark.parametrize("order", ["vmap(grad)", "grad(vmap)"])
def test_vmap_and_grad(matmul, order):
    def loss(x):
        return jnp.square(matmul(x, W, bias=BIAS[0])).sum()

    if order == "vmap(grad)":
        actual = jax.jit(jax.vmap(jax.grad(loss)))(X)
    else:
        actual = jax.jit(jax.grad(lambda x: jax.vmap(loss)(x).sum()))(X)
    w = decode(W)
    np.testing.assert_array_equal(actual, 2 * (X.astype(np.float64) @ w.T + BIAS[0]) @ w)


def test_grad_with_batched_weights(matmul):
    dx = jax.jit(jax.vmap(jax.grad(lambda x, w: matmul(x, w).sum())))(X, WS)
    expected = np.broadcast_to(decode(WS).sum(1)[:, None], X.shape)
    np.testing.assert_array_equal(dx, expected)


def test_second_derivative(matmul):
    def loss(x):
        return jnp.square(matmul(x, W)).sum()

    direction = random_integers(np.random.default_rng(1), M, K, dtype=F32)
    hessian_product = jax.jit(jax.grad(lambda x: (jax.grad(loss)(x) * direction).sum()))(X[0])
    w = decode(W)
    np.testing.assert_array_equal(hessian_product, 2 * (direction.astype(np.float64) @ w.T) @ w)


def test_forward_mode_is_refused(matmul):
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: matmul(x, W), (X,), (X,))


def test_forward_mode_around_decoding(implementation):
    """Decoding packed weights has no tangent, so it may appear in forward mode."""

    def f(x):
        return x @ mx.dequantize(W, F32, implementation=implementation).T

    y, tangent = jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(X[0])
    np.testing.assert_array_equal(y, tangent)


# Control flow, remat, shard_map ------------------------------------------------------------------


def chain(matmul, x, w):
    """One step of the loops below, kept within the integers that float32 holds exactly."""
    return jnp.clip(matmul(x, w), -8, 8)


SQUARES = random_weight(RNG, 4, K, K, scales=(127, 128))


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_scan_over_layers(matmul, remat):
    step = functools.partial(chain, matmul)
    if remat:
        step = jax.checkpoint(step)

    def scanned(x):
        return jax.lax.scan(lambda x, w: (step(x, w), None), x, SQUARES)[0]

    def unrolled(x):
        for i in range(4):
            x = chain(matmul, x, SQUARES[i])
        return x

    np.testing.assert_array_equal(jax.jit(scanned)(X), unrolled(X))
    gradient = jax.jit(jax.grad(lambda x: scanned(x).sum()))(X)
    np.testing.assert_array_equal(gradient, jax.grad(lambda x: unrolled(x).sum())(X))


def test_loops_with_one_weight(matmul):
    w = SQUARES[0]
    step = functools.partial(chain, matmul, w=w)
    expected = step(step(step(X)))
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: step(x), x))(X)
    np.testing.assert_array_equal(looped, expected)
    while_looped = jax.jit(
        lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, step(c[1])), (0, x))
    )(X)[1]
    np.testing.assert_array_equal(while_looped, expected)


def test_remat_of_moe(moe):
    def loss(x):
        y = moe(x, EXPERT_IDS, SHARES, GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS)
        return jnp.square(y).sum()

    assert_near(jax.jit(jax.grad(jax.checkpoint(loss)))(TOKENS), jax.jit(jax.grad(loss))(TOKENS))


def test_remat_keeps_no_output(matmul):
    @jax.checkpoint
    def layer(x):
        return jnp.tanh(matmul(x, W))

    residuals = jax.tree.leaves(jax.vjp(layer, X)[1])
    assert not [r for r in residuals if r.shape[-1:] == (N,) and r.dtype == F32]


MESH = Mesh(np.array(jax.devices()[:1]), ("devices",))
SPLIT, WHOLE = PartitionSpec("devices"), PartitionSpec()


@pytest.mark.parametrize(
    ("x_spec", "w_spec", "y_spec"),
    [(SPLIT, WHOLE, SPLIT), (WHOLE, SPLIT, PartitionSpec(None, None, "devices"))],
    ids=["rows", "columns"],
)
def test_shard_map_of_matmul(matmul, x_spec, w_spec, y_spec):
    """Mesh axes that only some operands vary over; gradients vary as their arguments do."""
    sharded = jax.shard_map(
        lambda x, w: matmul(x, w), mesh=MESH, in_specs=(x_spec, w_spec), out_specs=y_spec
    )
    np.testing.assert_array_equal(jax.jit(sharded)(X, W), matmul(X, W))
    gradient = jax.jit(jax.grad(lambda x: sharded(x, W).sum()))(X)
    np.testing.assert_array_equal(gradient, np.broadcast_to(decode(W).sum(0), X.shape))


@pytest.mark.parametrize("split", ["tokens", "experts"])
def test_shard_map_of_moe(moe, split):
    """Data parallelism, and expert parallelism: shifted ids, results added."""

    def shard(x, ids, shares, gate_up, down):
        if split == "tokens":
            return moe(x, ids, shares, gate_up, None, down, None)
        ids = ids - jax.lax.axis_index("devices") * gate_up.shape[0]
        return jax.lax.psum(moe(x, ids, shares, gate_up, None, down, None), "devices")

    tokens, experts = (SPLIT, WHOLE) if split == "tokens" else (WHOLE, SPLIT)
    sharded = jax.shard_map(
        shard, mesh=MESH, in_specs=(tokens,) * 3 + (experts,) * 2, out_specs=tokens
    )
    args = (EXPERT_IDS, SHARES, GATE_UP, DOWN)
    assert_near(
        jax.jit(sharded)(TOKENS, *args),
        moe(TOKENS, EXPERT_IDS, SHARES, GATE_UP, None, DOWN, None),
    )
    assert_near(
        jax.jit(jax.grad(lambda x: sharded(x, *args).sum()))(TOKENS),
        jax.grad(lambda x: moe(x, EXPERT_IDS, SHARES, GATE_UP, None, DOWN, None).sum())(TOKENS),
    )


def test_eval_shape_needs_no_data(matmul):
    w = mx.MXFP4Array.shape_dtype((N, K))
    y = jax.eval_shape(matmul, jax.ShapeDtypeStruct((B, M, K), jnp.bfloat16), w)
    assert (y.shape, y.dtype) == ((B, M, N), jnp.bfloat16)
