"""Values of `matmul`, the reference and the CUDA kernels alike, against float64."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import DTYPES, E2M1, decode, random_floats, random_integers, random_weight
from tolerance import assert_close, expected_matmul

import jax_mxfp4 as mx

F32, BF16, F16 = DTYPES

# Around every tile edge of the kernels, and the sizes of GPT-OSS (2880, 5760 = 2 * 2880, 4096).
MS = (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 100, 128, 257, 1000)
NS = (1, 8, 96, 100, 2880, 5760, 8191)
KS = (32, 64, 96, 2880, 4096)
FEW_MS = (1, 3, 17)


def cases():
    """(implementation, N, K): everything on CUDA, what a CPU computes at once for the reference."""
    for n, k in product(NS, KS):
        if n * k <= 100 * 96:
            yield pytest.param("reference", n, k)
        yield pytest.param("cuda", n, k, marks=pytest.mark.gpu)
    # K in several stages of the streaming kernels, of 12 warps with a rest and of 16 warps, where a
    # multiprocessor has one tile, two, which share activations, or three. More rows than one wave
    # of 192-row tiles. With these and the next test every configuration is reached.
    for n, k in ((160, 3584), (4800, 8192), (8960, 4608), (28672, 320), (8192, 5120)):
        yield pytest.param("cuda", n, k, marks=pytest.mark.gpu)


def outputs(implementation, x, w, biases_and_dtypes, ms):
    """Products of the first M rows of x for each M, as one program: one compilation is enough.

    Of a canonical w this includes preparing it; other tests pass a prepared one, as models do.
    """

    @jax.jit
    def products(x, w, biases):
        return [
            [
                mx.matmul(x[:m], w, bias=bias, out_dtype=dtype, implementation=implementation)
                for bias, dtype in zip(biases, dtypes, strict=True)
            ]
            for m in ms
        ]

    biases, dtypes = zip(*biases_and_dtypes, strict=True)
    operands = jax.device_put((x, w, biases))
    first, second = (jax.device_get(products(*operands)) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.tobytes() == b.tobytes(), "two runs of one program differ"
    return first


def assert_equal_exactly(actual: np.ndarray, exact: np.ndarray, what: str) -> None:
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(actual, exact.astype(actual.dtype), err_msg=what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("implementation", "n", "k"), list(cases()))
def test_integers_are_exact(implementation, n, k, dtype):
    """Every element takes part once, with its own weight, and there is one rounding."""
    rng = np.random.default_rng([n, k])
    ms = FEW_MS if implementation == "reference" else MS
    w = random_weight(rng, n, k, scales=(125, 128))
    x = random_integers(rng, max(ms), k, dtype=dtype)
    bias = random_integers(rng, n, dtype=dtype)
    exact = x.astype(np.float64) @ decode(w).T
    for m, (plain, biased) in zip(
        ms, outputs(implementation, x, w, [(None, F32), (bias, dtype)], ms), strict=True
    ):
        assert_equal_exactly(plain, exact[:m], f"M={m}")
        assert_equal_exactly(biased, exact[:m] + bias.astype(np.float64), f"M={m} with bias")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (250, 8600, 2880),
        (760, 2880, 2880),
        (125, 17400, 2112),
        (125, 26000, 4096),
        (12, 20000, 4160),
        (80, 5760, 2880),
        (100, 8416, 64),
        (700, 304, 2880),
        (170, 25776, 64),
        (700, 1552, 4096),
        (180, 25776, 64),
        (180, 17584, 64),
    ],
)
def test_further_tiles_are_exact(m, n, k):
    """Those shared by all thread blocks, whose parts keep their order, and wide ones."""
    rng = np.random.default_rng([m, n, k])
    w = random_weight(rng, n, k, scales=(125, 128))
    x = random_integers(rng, m, k, dtype=BF16)
    bias = random_integers(rng, n, dtype=F32)
    exact = x.astype(np.float64) @ decode(w).T + bias
    [(single, half)] = outputs("cuda", x, mx.prepare(w), [(bias, F32), (bias, BF16)], (m,))
    assert_equal_exactly(single, exact, "float32")
    assert_equal_exactly(half, exact, "bfloat16")


# A tile of each kind of kernel, alone and with what it exchanges with others.
REPEATED = (
    (3, 8960, 4608),
    (16, 5120, 2880),
    (12, 20000, 4160),
    (32, 28672, 3200),
    (64, 28672, 3200),
    (90, 20000, 1600),
    (90, 12000, 4160),
    (125, 26000, 4096),
    (250, 8600, 2880),
    (500, 26000, 2880),
    (256, 28672, 3200),
    (1000, 17408, 1600),
)


def repeated():
    """(implementation, M, N, K, calls): many calls where barriers are at work."""
    yield pytest.param("reference", 5, 8, 64, 3)
    for m, n, k in REPEATED:
        yield pytest.param("cuda", m, n, k, 300, marks=pytest.mark.gpu)


@pytest.mark.parametrize(("implementation", "m", "n", "k", "calls"), list(repeated()))
def test_every_call_gives_the_same_bits(implementation, m, n, k, calls):
    """Data that is overwritten too early is seen in one call of a hundred."""
    rng = np.random.default_rng([m, n, k])
    w = mx.prepare(jax.device_put(random_weight(rng, n, k)))
    x = random_floats(rng, m, k, dtype=BF16)

    @jax.jit
    def differences(x, w):
        expected = mx.matmul(x, w, implementation=implementation)

        def call(i, count):
            # By powers of two, which change no rounding: else one product would serve all calls.
            # Tokens in another order could lie in tiles whose K is split elsewhere.
            factor = jnp.exp2(i % 8).astype(x.dtype)
            y = mx.matmul(x * factor, w, implementation=implementation)
            return count + jnp.sum(y != expected * factor, dtype=jnp.int32)

        return jax.lax.fori_loop(0, calls, call, jnp.int32(0))

    assert differences(x, w) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("implementation", "n", "k"), list(cases()))
def test_accuracy(implementation, n, k, dtype):
    rng = np.random.default_rng([n, k])
    ms = FEW_MS if implementation == "reference" else MS
    w = random_weight(rng, n, k)
    x = random_floats(rng, max(ms), k, dtype=dtype)
    bias = random_floats(rng, n, dtype=F32)
    exact_x, exact_w = x.astype(np.float64), decode(w)
    expected = expected_matmul(exact_x, exact_w)
    expected_biased = expected_matmul(exact_x, exact_w, bias.astype(np.float64))
    for m, (plain, biased) in zip(
        ms,
        outputs(implementation, x, mx.prepare(w), [(None, F32), (bias, dtype)], ms),
        strict=True,
    ):
        assert_close(plain, expected[:m], f"M={m}")
        assert_close(biased, expected_biased[:m], f"M={m} with bias")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_bias_and_output(implementation, dtype):
    rng = np.random.default_rng(0)
    w = random_weight(rng, 96, 128)
    x = random_floats(rng, 17, 128, dtype=dtype)
    pairs = [
        (random_floats(rng, 96, dtype=bias_dtype), out_dtype)
        for bias_dtype, out_dtype in product(DTYPES, DTYPES)
    ]
    [results] = outputs(implementation, x, w, pairs, (17,))
    for (bias, out_dtype), actual in zip(pairs, results, strict=True):
        assert actual.dtype == out_dtype
        exact = expected_matmul(x.astype(np.float64), decode(w), bias.astype(np.float64))
        assert_close(actual, exact, f"bias {bias.dtype}, output {out_dtype}")
    assert mx.matmul(x, w, implementation=implementation).dtype == dtype


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 5)])
def test_leading_dimensions(implementation, in_layout, leading):
    rng = np.random.default_rng(1)
    w = random_weight(rng, 24, 64, scales=(125, 128))
    x = random_integers(rng, *leading, 64, dtype=F32)
    actual = mx.matmul(x, in_layout(w), implementation=implementation)
    assert_equal_exactly(np.asarray(actual), x.astype(np.float64) @ decode(w).T, "")


# Special values ----------------------------------------------------------------------------------

# The reference on XLA's CPU backend treats subnormal operands and products as zero; no other
# implementation may.
SPECIAL_MS = (1, 8, 64, 300)


def flushes_subnormals(implementation: str) -> bool:
    return implementation == "reference" and jax.default_backend() == "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", SPECIAL_MS)
def test_every_scale_byte(implementation, in_layout, m, dtype):
    """Row s of w has scale byte s; x is such that no product leaves the range of float32."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (256, 64), np.uint8)
    # 1.5 and 3 are the largest magnitudes that scale bytes 254 and 253 leave finite.
    codes[253] = rng.choice(np.flatnonzero(np.abs(E2M1) <= 3), 64)
    codes[254] = rng.choice(np.flatnonzero(np.abs(E2M1) < 2), 64)
    blocks = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(256, 2, 16)
    w = mx.MXFP4Array(blocks, np.repeat(np.arange(256, dtype=np.uint8), 2).reshape(256, 2))
    exact_w, w = decode(w), in_layout(w)
    small, large = np.arange(256) < 127, np.arange(256) >= 127
    for rows, factor in ((small, 2.0**10), (large, 2.0**-10)):
        x = random_integers(rng, m, 64, dtype=dtype) * np.asarray(factor, dtype)
        exact = x.astype(np.float64) @ exact_w.T
        y = np.asarray(mx.matmul(x, w, out_dtype=F32, implementation=implementation))
        if flushes_subnormals(implementation):
            rows = rows & (np.arange(256) >= 2)
        np.testing.assert_array_equal(y[:, rows], exact[:, rows])
    assert np.isnan(y[:, 255]).all()


@pytest.mark.parametrize("m", SPECIAL_MS)
def test_nan_scale_poisons_its_row_only(implementation, m):
    rng = np.random.default_rng(3)
    w = random_weight(rng, 104, 128, scales=(125, 128))
    x = random_integers(rng, m, 128, dtype=BF16)
    before = np.asarray(mx.matmul(x, w, implementation=implementation))
    w.scales[7, 1] = 255
    after = np.asarray(mx.matmul(x, w, implementation=implementation))
    assert np.isnan(after[:, 7]).all()
    others = np.arange(104) != 7
    np.testing.assert_array_equal(after[:, others], before[:, others])
    zeros = mx.matmul(np.zeros_like(x), w, implementation=implementation)
    assert np.isnan(zeros[:, 7]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", SPECIAL_MS)
def test_infinite_and_nan_activations(implementation, m, dtype):
    """As IEEE 754 has it: Inf * 0 and Inf - Inf are NaN; other rows notice nothing."""
    rng = np.random.default_rng(4)
    w = random_weight(rng, 96, 64, scales=(125, 128))
    x = random_integers(rng, m, 64, dtype=dtype)
    x[0, 5] = np.inf
    x[-1, 40] = -np.inf
    x[m // 2, 9] = np.nan
    with np.errstate(invalid="ignore"):
        exact = (x.astype(np.float64)[:, None] * decode(w)).sum(-1)
    y = np.asarray(mx.matmul(x, w, out_dtype=F32, implementation=implementation))
    np.testing.assert_array_equal(y, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", SPECIAL_MS)
def test_subnormal_activations(implementation, m, dtype):
    rng = np.random.default_rng(5)
    # For float32 these are subnormals on the grid of bfloat16, where its terms end; see below.
    smallest = {F32: 2.0**-133, BF16: 2.0**-133, F16: 2.0**-24}[dtype]
    # Codes times 2^120 bring float32's and bfloat16's subnormals back into the normal range.
    byte = 127 if dtype == F16 else 247
    w = random_weight(rng, 96, 64, scales=(byte, byte))
    x = (random_integers(rng, m, 64, dtype=F32).astype(np.float64) * smallest).astype(dtype)
    exact = x.astype(np.float64) @ decode(w).T
    y = np.asarray(mx.matmul(x, w, out_dtype=F32, implementation=implementation))
    flushed = dtype != F16 and flushes_subnormals(implementation)
    np.testing.assert_array_equal(y, np.zeros_like(y) if flushed else exact)


@pytest.mark.gpu
@pytest.mark.parametrize("m", SPECIAL_MS)
def test_cuda_truncates_float32_activations_below_the_bfloat16_grid(m):
    """The documented limit of splitting float32 into bfloat16 terms: multiples of 2^-133."""
    rng = np.random.default_rng(7)
    w = random_weight(rng, 96, 64, scales=(247, 247))
    steps = rng.integers(-(2**22), 2**22, (m, 64))
    x = (steps * 2.0**-149).astype(np.float32)
    kept = np.trunc(steps / 2**16) * 2.0**-133
    y = np.asarray(mx.matmul(x, w, out_dtype=F32, implementation="cuda"))
    np.testing.assert_array_equal(y, kept @ decode(w).T)


@pytest.mark.parametrize("m", SPECIAL_MS)
def test_zero_weights_leave_the_bias(implementation, m):
    rng = np.random.default_rng(6)
    blocks = rng.choice(np.array([0x00, 0x08, 0x80, 0x88], np.uint8), (100, 3, 16))
    w = mx.MXFP4Array(blocks, rng.integers(0, 255, (100, 3), np.uint8))
    x = random_floats(rng, m, 96, dtype=F32)
    bias = random_floats(rng, 100, dtype=F32)
    y = mx.matmul(x, w, implementation=implementation)
    np.testing.assert_array_equal(y, np.zeros((m, 100)))
    y = mx.matmul(x, w, bias=bias, implementation=implementation)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (m, 100)))


@pytest.mark.parametrize("m", SPECIAL_MS)
def test_large_sums_stay_finite_in_float32(implementation, m):
    """float16 activations with sums far beyond float16: only the output may overflow."""
    w = mx.MXFP4Array(np.full((8, 2, 16), 0x77, np.uint8), np.full((8, 2), 130, np.uint8))
    x = np.full((m, 64), 60_000, F16)
    y = mx.matmul(x, w, out_dtype=F32, implementation=implementation)
    np.testing.assert_array_equal(y, np.full((m, 8), 64 * 48.0 * float(x[0, 0])))
    y = mx.matmul(x, w, implementation=implementation)
    np.testing.assert_array_equal(y, np.full((m, 8), np.inf, F16))


def test_float32_is_not_tf32(implementation):
    """1 + 2^-23 keeps its last bit; TF32 would drop 13 bits."""
    w = mx.MXFP4Array(np.full((8, 1, 16), 0x02, np.uint8), np.full((8, 1), 127, np.uint8))
    x = jnp.zeros((4, 32)).at[:, 6].set(np.float32(1 + 2.0**-23))
    y = mx.matmul(x, w, implementation=implementation)
    np.testing.assert_array_equal(y, np.full((4, 8), np.float32(1 + 2.0**-23)))
