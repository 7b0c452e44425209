"""Argument checks of all operations; values of `dequantize` and `take`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import DTYPES, GOLDEN, decode, random_floats, random_weight

import jax_mxfp4 as mx


def assert_same_bits(actual, expected: np.ndarray) -> None:
    """Equal bits, except that any NaN equals any NaN."""
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    np.testing.assert_array_equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64 values rounded to nearest even, as IEEE 754 defines it."""
    with np.errstate(over="ignore"):
        return values.astype(dtype)


# dequantize --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_every_scale_and_code(implementation, in_layout, dtype):
    with np.load(GOLDEN / "mx" / "decode_table.npz") as table:
        values = table["value_f64"]
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    blocks = np.tile(codes[0::2] | codes[1::2] << 4, (256, 1, 1))
    w = mx.MXFP4Array(blocks, np.arange(256, dtype=np.uint8)[:, None])
    np.testing.assert_array_equal(decode(w), np.tile(values, 2))  # the oracle of the other tests
    actual = mx.dequantize(in_layout(w), dtype, implementation=implementation)
    assert_same_bits(actual, rounded(np.tile(values, 2), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32,), (96,), (1, 32), (7, 96), (3, 5, 160), (2, 3, 2, 64)])
def test_dequantize_shapes(implementation, in_layout, dtype, shape):
    w = random_weight(np.random.default_rng(0), *shape, scales=(0, 255))
    actual = mx.dequantize(in_layout(w), dtype, implementation=implementation)
    assert_same_bits(actual, rounded(decode(w), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5760, 2880), (8191, 4096), (32, 288, 2880), (1, 100_000 * 32)])
def test_dequantize_large(dtype, shape):
    w = random_weight(np.random.default_rng(1), *shape, scales=(0, 255))
    expected = rounded(decode(w), dtype)
    for layout in (w, mx.prepare(w)):
        assert_same_bits(mx.dequantize(layout, dtype, implementation="cuda"), expected)


def test_dequantize_default_dtype_is_bfloat16(implementation):
    w = random_weight(np.random.default_rng(2), 3, 64)
    assert mx.dequantize(w, implementation=implementation).dtype == jnp.bfloat16
    assert mx.take(w, [0], implementation=implementation).dtype == jnp.bfloat16


# take --------------------------------------------------------------------------------------------


def expected_rows(w: mx.MXFP4Array, ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    table = np.concatenate([decode(w), np.full((1, w.shape[1]), np.nan)])
    rows = w.shape[0]
    ids = ids.astype(object)  # Python integers: uint64 has no common type with a negative number
    index = np.where((ids >= -rows) & (ids < rows), ids % rows, rows).astype(np.int64)
    return rounded(table[index], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (100,), (3, 1, 5)])
def test_take_shapes(implementation, in_layout, dtype, shape):
    rng = np.random.default_rng(3)
    w = random_weight(rng, 50, 96, scales=(0, 255))
    ids = rng.integers(-60, 60, shape, np.int32)
    actual = mx.take(in_layout(w), ids, dtype=dtype, implementation=implementation)
    assert_same_bits(actual, expected_rows(w, np.asarray(ids), dtype))


@pytest.mark.parametrize(
    "id_dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
)
def test_take_id_dtypes(implementation, id_dtype):
    """Ids of every width keep their value: none wraps around into the table."""
    w = random_weight(np.random.default_rng(4), 300, 32)
    limits = np.iinfo(id_dtype)
    candidates = [0, 1, 127, 128, 255, 299, 300, -1, -300, -301, limits.min, limits.max]
    candidates += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, -(2**31), -(2**32) + 7]
    ids = np.array([i for i in candidates if limits.min <= i <= limits.max], id_dtype)
    expected = expected_rows(w, ids, np.dtype(np.float32))
    actual = mx.take(w, ids, dtype=jnp.float32, implementation=implementation)
    assert_same_bits(actual, expected)
    with jax.enable_x64(True):
        take = jax.jit(
            lambda ids: mx.take(w, ids, dtype=jnp.float32, implementation=implementation)
        )
        traced = take(jnp.asarray(ids))
    assert_same_bits(traced, expected)


def test_take_agrees_with_jnp_take(implementation):
    w = random_weight(np.random.default_rng(5), 10, 32)
    ids = jnp.array([[0, 9, -1], [-10, 10, -11]])
    expected = jnp.take(mx.dequantize(w, jnp.float32), ids, axis=0)
    actual = mx.take(w, ids, dtype=jnp.float32, implementation=implementation)
    np.testing.assert_array_equal(actual, expected)
    assert np.isnan(actual[1, 1:]).all()


def test_take_python_ids(implementation):
    w = random_weight(np.random.default_rng(6), 10, 32)
    row = mx.take(w, 3, implementation=implementation)
    rows = mx.take(w, [3, -7], implementation=implementation)
    np.testing.assert_array_equal(rows, jnp.stack([row, row]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_take_large(dtype):
    rng = np.random.default_rng(7)
    w = random_weight(rng, 201_088, 2880)
    ids = np.append(rng.integers(0, 201_088, 1023, np.int32), 201_087)
    expected = rounded(decode(w[ids]), dtype)
    for layout in (w, mx.prepare(w)):
        actual = mx.take(layout, ids, dtype=dtype, implementation="cuda")
        assert_same_bits(actual, expected)


# Empty results -----------------------------------------------------------------------------------


def test_empty_results(implementation):
    rng = np.random.default_rng(8)
    w, table, none = (random_weight(rng, *shape) for shape in ((8, 64), (5, 64), (0, 64)))
    gate_up, down = random_weight(rng, 2, 64, 64), random_weight(rng, 2, 64, 32)
    no_ids = np.zeros((0, 2), np.int32)

    def moe(x, ids, gate_up, down):
        weights = np.ones(ids.shape, np.float32)
        return mx.moe(x, ids, weights, gate_up, None, down, None, implementation=implementation)

    x = np.ones((3, 64), np.float32)
    for actual, shape in [
        (mx.dequantize(none, jnp.float32, implementation=implementation), (0, 64)),
        (mx.take(table, no_ids, dtype=jnp.float32, implementation=implementation), (0, 2, 64)),
        (mx.matmul(x[:0], w, implementation=implementation), (0, 8)),
        (mx.matmul(x, none, bias=x[0, :0], implementation=implementation), (3, 0)),
        (mx.matmul(x[:, None][:, :0], w, implementation=implementation), (3, 0, 8)),
        (moe(x[:0], no_ids, gate_up, down), (0, 64)),
    ]:
        assert actual.shape == shape
        assert actual.dtype == jnp.float32
    for actual in [
        moe(x, np.zeros((3, 0), np.int32), gate_up, down),  # no expert per token
        moe(x, np.zeros((3, 2), np.int32), gate_up[:0], down[:0]),  # no expert at all
    ]:
        np.testing.assert_array_equal(actual, np.zeros((3, 64), np.float32))
    rows = mx.take(none, [0, 1], implementation=implementation)
    assert rows.shape == (2, 64)
    assert np.isnan(rows).all()


# Argument checks ---------------------------------------------------------------------------------

_RNG = np.random.default_rng(9)
W = random_weight(_RNG, 8, 64)
X = random_floats(_RNG, 3, 64, dtype=np.dtype(np.float32))
GATE_UP, DOWN = random_weight(_RNG, 4, 64, 64), random_weight(_RNG, 4, 64, 32)
IDS = np.zeros((3, 2), np.int32)
SHARES = np.ones((3, 2), np.float32)
NO_K = mx.MXFP4Array(np.zeros((8, 0, 16), np.uint8), np.zeros((8, 0), np.uint8))


def moe_with(**replaced):
    arguments = {
        "x": X,
        "expert_ids": IDS,
        "expert_weights": SHARES,
        "gate_up": GATE_UP,
        "gate_up_bias": None,
        "down": DOWN,
        "down_bias": None,
    }
    return mx.moe(**(arguments | replaced))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mx.dequantize(X), TypeError, "w must be an MXFP4Array, got ndarray"),
        (lambda: mx.dequantize(W, jnp.int8), TypeError, "dtype must be float32.*got int8"),
        (lambda: mx.dequantize(W, None), TypeError, "dtype must be float32.*got"),
        (lambda: mx.dequantize(W, "fp4"), TypeError, "dtype must be float32.*got 'fp4'"),
        (lambda: mx.dequantize(NO_K), ValueError, r"last axis of w .* got shape \(8, 0\)"),
        (lambda: mx.take(X, IDS), TypeError, "w must be an MXFP4Array"),
        (
            lambda: mx.take(GATE_UP, IDS),
            ValueError,
            r"w must have shape \[V, K\], got \(4, 64, 64\)",
        ),
        (lambda: mx.take(W, X), TypeError, "ids must have an integer dtype, got float32"),
        (lambda: mx.take(W, [True]), TypeError, "ids must have an integer dtype, got bool"),
        (lambda: mx.take(W, IDS, dtype=float), TypeError, "dtype must be float32.*got float64"),
        (lambda: mx.matmul(X, X), TypeError, "w must be an MXFP4Array"),
        (lambda: mx.matmul(X.tolist(), W), TypeError, "x must be a float32.*got list"),
        (lambda: mx.matmul(X.astype(float), W), TypeError, "x.dtype must be .*got float64"),
        (lambda: mx.matmul(IDS, W), TypeError, "x.dtype must be .*got int32"),
        (
            lambda: mx.matmul(X, GATE_UP),
            ValueError,
            r"w must have shape \[N, K\], got \(4, 64, 64\)",
        ),
        (lambda: mx.matmul(X[:, :32], W), ValueError, r"x must .*\[..., 64\] .*got \(3, 32\)"),
        (lambda: mx.matmul(X[0, 0], W), ValueError, r"x must .*\[..., 64\] .*got \(\)"),
        (lambda: mx.matmul(X, NO_K), ValueError, "last axis of w must not be empty"),
        (lambda: mx.matmul(X, W, bias=X[0]), ValueError, r"bias must .*\(8,\), got \(64,\)"),
        (lambda: mx.matmul(X, W, bias=IDS[0]), TypeError, "bias.dtype must be .*got int32"),
        (lambda: mx.matmul(X, W, bias=1.0), TypeError, "bias must be .*got float"),
        (lambda: mx.matmul(X, W, out_dtype="int8"), TypeError, "out_dtype must .*got int8"),
        (lambda: moe_with(x=X[0]), ValueError, r"x must have shape \[..., T, 64\].*got \(64,\)"),
        (lambda: moe_with(x=X[:, :32]), ValueError, r"x must have shape .*got \(3, 32\)"),
        (lambda: moe_with(x=IDS), TypeError, "x.dtype must be .*got int32"),
        (lambda: moe_with(expert_ids=SHARES), TypeError, "expert_ids must have an integer dtype"),
        (lambda: moe_with(expert_ids=IDS[0]), ValueError, r"expert_ids must .*got \(2,\)"),
        (lambda: moe_with(expert_ids=IDS[:2]), ValueError, r"expert_ids must .*got \(2, 2\)"),
        (lambda: moe_with(expert_weights=IDS), TypeError, "expert_weights.dtype .*got int32"),
        (lambda: moe_with(expert_weights=SHARES[:, :1]), ValueError, r"expert_weights .*\(3, 1\)"),
        (lambda: moe_with(gate_up=X), TypeError, "gate_up must be an MXFP4Array"),
        (lambda: moe_with(gate_up=W), ValueError, r"gate_up .*\[E, 2I, D\], got \(8, 64\)"),
        (lambda: moe_with(gate_up=GATE_UP[:3]), ValueError, r"gate_up .*got \(3, 64, 64\)"),
        (lambda: moe_with(gate_up=GATE_UP[:, :32]), ValueError, r"gate_up .*got \(4, 32, 64\)"),
        (lambda: moe_with(down=W), ValueError, r"down .*\[E, D, I\], got \(8, 64\)"),
        (lambda: moe_with(gate_up_bias=X), ValueError, r"gate_up_bias .*\(4, 64\), got \(3, 64\)"),
        (lambda: moe_with(down_bias=X), ValueError, r"down_bias .*\(4, 64\), got \(3, 64\)"),
        (lambda: moe_with(down_bias=IDS), TypeError, "down_bias.dtype must be"),
        (lambda: moe_with(out_dtype="int8"), TypeError, "out_dtype must .*got int8"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


CALLS = [
    pytest.param(lambda **options: mx.dequantize(W, **options), id="dequantize"),
    pytest.param(lambda **options: mx.take(W, IDS, **options), id="take"),
    pytest.param(lambda **options: mx.matmul(X, W, **options), id="matmul"),
    pytest.param(lambda **options: moe_with(**options), id="moe"),
]


@pytest.mark.parametrize("call", CALLS)
def test_unknown_implementation(call):
    with pytest.raises(ValueError, match='must be "cuda", "reference" or None, got \'gpu\''):
        call(implementation="gpu")


@pytest.mark.parametrize("call", CALLS)
def test_cuda_needs_kernels(call, no_kernels):
    with pytest.raises(RuntimeError, match=f'implementation="cuda" is not available: {no_kernels}'):
        call(implementation="cuda")
    # Choosing by platform never asks for what is not there.
    np.testing.assert_array_equal(call(), call(implementation="reference"))


@pytest.mark.parametrize("call", CALLS)
def test_cuda_needs_a_cuda_device(call, kernels_registered):
    message = 'implementation="cuda" needs a CUDA device, .* compiled for cpu'
    with jax.default_device(jax.devices("cpu")[0]):
        with pytest.raises(RuntimeError, match=message):
            call(implementation="cuda")
        with pytest.raises(RuntimeError, match=message):
            jax.jit(lambda: call(implementation="cuda"))()
        np.testing.assert_array_equal(call(), call(implementation="reference"))
