"""Values of `moe`, the reference and the CUDA kernels alike, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import DTYPES, decode, random_floats, random_weight
from tolerance import assert_close

import jax_mxfp4 as mx

F32, BF16, F16 = DTYPES

TS = (1, 2, 3, 8, 17, 64, 300)

# (E, k, D, I): every size of each with every other kind at least once; 2880 is GPT-OSS.
SMALL = [
    (1, 1, 32, 32),
    (4, 1, 64, 96),
    (4, 2, 96, 64),
    (4, 4, 32, 96),
    (8, 2, 96, 32),
    (8, 4, 64, 64),
    (32, 4, 96, 96),
    (128, 4, 64, 32),
    (128, 1, 96, 64),
]
LARGE = [
    (4, 2, 2880, 96),
    (8, 1, 96, 2880),
    (8, 4, 2880, 2880),
    (32, 4, 2880, 32),
    (128, 4, 32, 2880),
]
CASES = [
    *(pytest.param("reference", *case, biased) for case in SMALL[2::3] for biased in (False, True)),
    *(
        pytest.param("cuda", *case, biased, marks=pytest.mark.gpu)
        for case in SMALL + LARGE
        for biased in (False, True)
        if biased or case in SMALL
    ),
]


def operands(rng, tokens, experts, top_k, width, intermediate, dtype, *, biased):
    """Routed tokens and experts such that gates reach the clamp at 7 on both sides."""
    gate_up = random_weight(rng, experts, 2 * intermediate, width, scales=(124, 126))
    down = random_weight(rng, experts, width, intermediate, scales=(124, 126))
    scale = np.asarray(3 / np.sqrt(width), dtype)
    x = random_floats(rng, tokens, width, dtype=dtype) * scale
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    weights = rng.dirichlet(np.ones(top_k), tokens).astype(np.float32)
    gate_up_bias = random_floats(rng, experts, 2 * intermediate, dtype=BF16) if biased else None
    down_bias = random_floats(rng, experts, width, dtype=F32) if biased else None
    return x, ids, weights, gate_up, gate_up_bias, down, down_bias


def check(implementation, args, ts, in_layout=mx.prepare, dtypes=(None,), **options):
    """Compare with the oracle for the first T tokens of args, each T, twice in one program.

    The experts are prepared, as those of models are, unless `in_layout` does something else.
    """

    @jax.jit
    def layers(x, ids, weights, *experts):
        return [
            mx.moe(
                *(tokens[:t] for tokens in (x, ids, weights)),
                *experts,
                out_dtype=dtype,
                implementation=implementation,
                **options,
            )
            for t in ts
            for dtype in dtypes
        ]

    arrays = jax.device_put(in_layout(tuple(args)))
    first, second = (jax.device_get(layers(*arrays)) for _ in range(2))
    expected = oracle.moe(*args, **options)
    results = iter(zip(first, second, strict=True))
    for t in ts:
        for dtype in dtypes:
            actual, again = next(results)
            assert actual.tobytes() == again.tobytes(), f"T={t}: two runs differ"
            assert actual.dtype == (args[0].dtype if dtype is None else dtype)
            assert_close(actual, expected[:t], f"T={t}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("implementation", "experts", "top_k", "width", "intermediate", "biased"), CASES
)
def test_accuracy(implementation, experts, top_k, width, intermediate, biased, dtype):
    rng = np.random.default_rng([experts, top_k, width, intermediate])
    ts = (17,) if implementation == "reference" else TS
    args = operands(rng, max(ts), experts, top_k, width, intermediate, dtype, biased=biased)
    check(implementation, args, ts, mx.prepare if biased else mx.canonical)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_all_tokens_to_one_expert(implementation, tokens, dtype):
    args = list(operands(np.random.default_rng(0), tokens, 32, 2, 64, 96, dtype, biased=True))
    args[1] = np.full_like(args[1], 29)
    check(implementation, args, (tokens,))


@pytest.mark.parametrize("tokens", [1, 5, 70, 300])
def test_scales_whose_factor_bfloat16_does_not_hold(implementation, tokens):
    """Bytes from 129 on take another path in the kernels; here some blocks of every tile do."""
    rng = np.random.default_rng(14)
    args = list(operands(rng, tokens, 4, 2, 192, 256, BF16, biased=True))
    args[0] = args[0] * BF16.type(0.01)
    args[3] = random_weight(rng, 4, 2 * 256, 192, scales=(122, 132))
    args[5] = random_weight(rng, 4, 192, 256, scales=(122, 132))
    check(implementation, args, (tokens,))


@pytest.mark.parametrize("tokens", [3, 17, 300])
def test_experts_without_tokens(implementation, tokens):
    """The first, the last and every second expert have none."""
    rng = np.random.default_rng(10)
    args = list(operands(rng, tokens, 8, 2, 64, 96, BF16, biased=True))
    used = np.array([1, 3, 5], np.int32)
    args[1] = used[np.argsort(rng.random((tokens, 3)), axis=1)[:, :2]]
    check(implementation, args, (tokens,))


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_one_token_after_the_other(implementation, top_k):
    """On CUDA one token has a kernel whose thread blocks pass on activations in memory that calls
    share: layers of different sizes take turns.
    """
    rng = np.random.default_rng(20)
    layers = [
        operands(rng, 1, 8, top_k, *size, BF16, biased=True) for size in ((192, 256), (64, 64))
    ]
    alone = [np.asarray(mx.moe(*args, implementation=implementation)) for args in layers]
    for args, y in zip(layers, alone, strict=True):
        assert_close(y, oracle.moe(*args), "alone")

    @jax.jit
    def in_turns(layers):
        return [mx.moe(*args, implementation=implementation) for args in 5 * layers]

    for i, y in enumerate(in_turns(layers)):
        assert np.asarray(y).tobytes() == alone[i % 2].tobytes()


def test_one_token_without_some_experts(implementation):
    rng = np.random.default_rng(21)
    args = list(operands(rng, 1, 8, 4, 192, 256, BF16, biased=True))
    args[1] = np.array([[5, 5, 8, -1]], np.int32)
    check(implementation, args, (1,))
    args[0] = np.full_like(args[0], np.nan)
    args[1] = np.array([[8, 9, -1, -(2**31)]], np.int32)
    y = np.asarray(mx.moe(*args, implementation=implementation))
    np.testing.assert_array_equal(y, np.zeros_like(y))


def test_nan_in_one_token_stays_in_it(implementation):
    """In a tile of tokens that share an expert, too."""
    args = list(operands(np.random.default_rng(12), 64, 4, 4, 64, 96, BF16, biased=True))
    before = np.asarray(mx.moe(*args, implementation=implementation))
    args[0] = args[0].copy()
    args[0][20] = np.nan
    after = np.asarray(mx.moe(*args, implementation=implementation))
    assert np.isnan(after[20]).all()
    np.testing.assert_array_equal(np.delete(after, 20, axis=0), np.delete(before, 20, axis=0))


@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_ids_out_of_range_contribute_zero(implementation, tokens):
    rng = np.random.default_rng(1)
    args = list(operands(rng, tokens, 8, 4, 64, 32, F32, biased=True))
    outside = np.array([-1, 8, -(2**31), 2**31 - 1], np.int32)
    args[1] = np.where(rng.random((tokens, 4)) < 0.5, outside, args[1]).astype(np.int32)
    check(implementation, args, (tokens,))
    args[1][:] = outside
    y = mx.moe(*args, implementation=implementation)
    np.testing.assert_array_equal(y, np.zeros((tokens, 64), np.float32))


def test_wide_ids_do_not_wrap_around(implementation):
    args = list(operands(np.random.default_rng(2), 3, 4, 2, 64, 32, F32, biased=True))
    args[1] = args[1].astype(np.int64)
    args[1][:, 1] += 2**32
    y = mx.moe(*args, implementation=implementation)
    args[1] = np.where(args[1] < 4, args[1], 4).astype(np.int32)
    np.testing.assert_array_equal(y, mx.moe(*args, implementation=implementation))


def test_expert_shards_add_up(implementation):
    """Expert parallelism: ids shifted by each shard's first expert, results added."""
    args = operands(np.random.default_rng(3), 17, 8, 4, 64, 32, F32, biased=True)
    x, ids, weights, *experts = args
    whole = np.asarray(mx.moe(*args, implementation=implementation))
    parts = [
        np.asarray(
            mx.moe(
                x,
                ids - first,
                weights,
                *(jax.tree.map(lambda leaf, at=first: leaf[at : at + 4], e) for e in experts),
                implementation=implementation,
            )
        )
        for first in (0, 4)
    ]
    # Only the sum over four experts is associated differently.
    np.testing.assert_allclose(sum(parts), whole, rtol=0, atol=4 * 2.0**-24 * np.abs(whole).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(implementation, dtype):
    args = operands(np.random.default_rng(4), 17, 4, 2, 64, 32, dtype, biased=True)
    check(implementation, args, (1, 17), dtypes=DTYPES, alpha=1.0, limit=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_weights_of_any_float_dtype(implementation, dtype):
    args = list(operands(np.random.default_rng(5), 3, 4, 2, 64, 32, F32, biased=False))
    args[2] = args[2].astype(dtype)
    widened = [*args[:2], args[2].astype(F32), *args[3:]]
    y = mx.moe(*args, implementation=implementation)
    np.testing.assert_array_equal(y, mx.moe(*widened, implementation=implementation))


def test_leading_dimensions(implementation):
    x, ids, weights, *experts = operands(
        np.random.default_rng(6), 30, 4, 2, 64, 32, F32, biased=True
    )
    flat = mx.moe(x, ids, weights, *experts, implementation=implementation)
    split = [a.reshape(2, 3, 5, -1) for a in (x, ids, weights)]
    y = mx.moe(*split, *experts, implementation=implementation)
    assert y.shape == (2, 3, 5, 64)
    np.testing.assert_array_equal(y.reshape(30, 64), flat)


def test_large_hidden_activations(implementation):
    """Gates far below zero give -0, not NaN, although exp of the sigmoid's argument overflows."""
    _, _, _, gate_up, _, down, _ = operands(
        np.random.default_rng(7), 2, 1, 1, 32, 32, F32, biased=False
    )
    x, ids, weights = np.zeros((2, 32), F32), np.zeros((2, 1), np.int32), np.ones((2, 1), F32)
    gate_up_bias = jnp.tile(jnp.array([-1e4, 3.0], jnp.float32), 32)[None]
    y = mx.moe(x, ids, weights, gate_up, gate_up_bias, down, None, implementation=implementation)
    np.testing.assert_array_equal(y, np.zeros((2, 32)))


def test_nan_stays_with_its_token_and_expert(implementation):
    x, ids, weights, gate_up, _, down, _ = operands(
        np.random.default_rng(8), 17, 8, 2, 64, 32, F32, biased=False
    )
    before = np.asarray(mx.moe(x, ids, weights, gate_up, None, down, None))
    x[5, 3] = np.nan
    down.scales[2, 9, 0] = 255  # row 9 of expert 2
    y = np.asarray(
        mx.moe(x, ids, weights, gate_up, None, down, None, implementation=implementation)
    )
    expected = np.zeros(y.shape, bool)
    expected[5] = True
    expected[(ids == 2).any(axis=1), 9] = True
    np.testing.assert_array_equal(np.isnan(y), expected)
    np.testing.assert_allclose(y[~expected], before[~expected], rtol=1e-4, atol=1e-5)


def test_oracle_against_a_plain_loop():
    """The oracle's vectorized routing, against the definition written out for one token."""
    x, ids, weights, gate_up, gate_up_bias, down, down_bias = operands(
        np.random.default_rng(9), 3, 4, 2, 64, 32, F32, biased=True
    )
    y = np.zeros(64)
    for j in range(2):
        e = ids[1, j]
        gu = decode(gate_up)[e] @ x[1].astype(float) + gate_up_bias[e].astype(float)
        gate, up = np.minimum(gu[0::2], 7), np.clip(gu[1::2], -7, 7)
        hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        hidden = hidden.astype(np.float32).astype(float)
        y += weights[1, j] * (decode(down)[e] @ hidden + down_bias[e].astype(float))
    expected = oracle.moe(x, ids, weights, gate_up, gate_up_bias, down, down_bias)
    np.testing.assert_allclose(expected.exact[1], y, rtol=1e-12)
