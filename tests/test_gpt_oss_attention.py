"""Attention in parts against the definition with all scores at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mxfp4.models.gpt_oss import attention

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 6, 2, 16
SINKS = np.linspace(-3, 3, HEADS).astype(np.float32)


def operands(length: int, keys: int | None = None, seed: int = 0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((BATCH, length, HEADS, HEAD_DIM)) * 2
    k, v = rng.standard_normal((2, BATCH, KV_HEADS, keys or length, HEAD_DIM))
    return tuple(np.float32(array) for array in (q, k, v))


def definition(q, k, v, seen) -> np.ndarray:
    """Softmax over [scores, sink] in float64, the sink's column dropped; seen is [T, S]."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    k, v = (np.repeat(array, HEADS // KV_HEADS, axis=1) for array in (k, v))
    scores = np.einsum("bthd,bhsd->bhts", q, k) / np.sqrt(HEAD_DIM)
    scores = np.where(seen, scores, -np.inf)
    sink = np.broadcast_to(SINKS.astype(float)[:, None, None], (*scores.shape[:3], 1))
    weights = np.exp(np.concatenate([scores, sink], axis=-1))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhts,bhsd->bthd", weights[..., :-1], v)


def distances(queries: int, keys: int, start: int = 0) -> np.ndarray:
    return start + np.arange(queries)[:, None] - np.arange(keys)


def assert_close(attend, arrays, seen, *whole) -> None:
    """Compare parts = attend(*arrays) with the definition for `whole`, by default the arrays."""
    found = jax.jit(lambda *args: attention.merge(attend(*args), SINKS, jnp.float32))(*arrays)
    np.testing.assert_allclose(found, definition(*(whole or arrays), seen), rtol=0, atol=1e-5)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 8)
    monkeypatch.setattr(attention, "_WINDOWS", 2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("length", [1, 8, 29])
def test_causal(length):
    seen = distances(length, length) >= 0
    assert_close(lambda *args: [attention.attend_causal(*args)], operands(length), seen)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("length", "window"), [(1, 5), (5, 8), (29, 1), (29, 5), (16, 8)])
def test_window(length, window):
    distance = distances(length, length)
    seen = (distance >= 0) & (distance < window)
    assert_close(lambda *args: [attention.attend_window(*args, window)], operands(length), seen)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("length", "start"), [(2, 3), (19, 3), (19, 20)])
def test_chunk_after_others(length, start):
    """The queries of a chunk and the keys of all positions so far."""
    q, k, v = operands(length, start + length)
    old, new = ([array[:, :, at] for array in (k, v)] for at in (slice(start), slice(start, None)))
    distance = distances(length, start + length, start)

    def whole(q, *keys):
        causal = attention.attend_causal(q, *keys[:2])
        return [causal, attention.attend_prefix(q, *keys[2:], jnp.int32(start))]

    padded = [np.pad(array, ((0, 0), (0, 0), (0, 4), (0, 0))) for array in old]
    assert_close(whole, (q, *new, *padded), distance >= 0, q, k, v)

    window = 6

    def sliding(q, k, v, *before):
        return [attention.attend_window(q, k, v, window, before, jnp.int32(start))]

    before = [np.pad(array, ((0, 0), (0, 0), (window, 0), (0, 0)))[:, :, -window:] for array in old]
    seen = (distance >= 0) & (distance < window)
    assert_close(sliding, (q, *new, *before), seen, q, k, v)


@pytest.mark.parametrize("sink", [-3.0, 3.0, 200.0])
def test_a_step_sees_slots_and_sinks(sink):
    """The exponential of a sink of 200, relative to the largest score, overflows."""
    q, k, v = operands(1, 7)
    seen = np.array([[True] * 7, [True, False, True, False, False, True, False]])
    sinks = np.full(HEADS, sink, np.float32)
    part = attention.attend(q, k, v, seen[:, None])
    expected = attention.merge([part], sinks, jnp.float32)
    found = jax.jit(attention.attend_step)(q, k, v, seen, sinks)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_keys_that_are_not_seen_may_be_anything_finite():
    q, k, v = operands(3, 5)
    seen = np.array([[True, False, True, False, False]] * 3)
    k[:, :, ~seen[0]], v[:, :, ~seen[0]] = 1e30, -1e30
    assert_close(lambda *args: [attention.attend(*args, seen[None])], (q, k, v), seen)


def test_a_query_that_sees_nothing_leaves_all_to_the_sink():
    @jax.jit
    def run(q, k, v):
        part = attention.attend(q, k, v, np.zeros((1, 2, 3), bool))
        return part, attention.merge([part], SINKS, jnp.float32)

    part, out = run(*operands(2, 3))
    assert np.isneginf(part.top).all()
    np.testing.assert_array_equal(part.total, 0)
    np.testing.assert_array_equal(out, np.zeros_like(out))


def test_a_nan_stays_in_its_sequence():
    q, k, v = operands(5)
    q[0, 2, 1, 3] = np.nan
    part = jax.jit(attention.attend_causal)(q, k, v)
    found = np.isnan(part.values)
    expected = np.zeros_like(found)
    expected[0, 2, 1] = True
    np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("small_blocks")
def test_gradients_are_those_of_all_scores_at_once():
    q, k, v = operands(19)
    seen = distances(19, 19) >= 0

    def by_blocks(q, k, v):
        return attention.merge([attention.attend_causal(q, k, v)], SINKS, q.dtype)

    def at_once(q, k, v):
        return attention.merge([attention.attend(q, k, v, seen[None])], SINKS, q.dtype)

    gradients = (
        jax.jit(jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), argnums=(0, 1, 2)))(q, k, v)
        for f in (by_blocks, at_once)
    )
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def sizes(jaxpr) -> set[int]:
    """Elements of every array that a program computes."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.size for v in equation.outvars}
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= sizes(inner)
    return found


@pytest.mark.parametrize("window", [None, 128])
def test_long_prompts_have_no_square_of_scores(window):
    length = 16384
    q = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.float32)
    k = jax.ShapeDtypeStruct((1, KV_HEADS, length, HEAD_DIM), jnp.float32)

    def attend(q, k, v):
        if window is None:
            return attention.attend_causal(q, k, v)
        return attention.attend_window(q, k, v, window)

    found = sizes(jax.make_jaxpr(attend)(q, k, k).jaxpr)
    assert max(found) <= max(HEADS * length * HEAD_DIM * 2, HEADS * 2048 * 256)
    assert q.size in found  # or nothing was looked at


@pytest.mark.gpu
@pytest.mark.parametrize("length", [128, 777])
def test_cudnn_equals_the_definition(length):
    heads, kv_heads, head_dim, context = 64, 8, 64, 300
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (2, length, heads, head_dim), jnp.bfloat16)
    k, v = (jax.random.normal(x, (2, kv_heads, length, head_dim), jnp.bfloat16) for x in keys[1:3])
    old = [jax.random.normal(x, (2, kv_heads, context, head_dim), jnp.bfloat16) for x in keys[3:5]]

    def run(implementation):
        return (
            attention.attend_causal(q, k, v, implementation),
            attention.attend_window(q, k, v, 128, implementation=implementation),
            attention.attend_prefix(q, *old, jnp.int32(123), implementation),
        )

    lowered = jax.jit(run, static_argnums=0).lower(None).as_text()
    assert lowered.count("__cudnn$fmha") == 3
    results = (jax.jit(run, static_argnums=0)(i) for i in (None, "reference"))
    for found, expected in zip(*results, strict=True):
        lse, exact_lse = (part.top + jnp.log(part.total) for part in (found, expected))
        np.testing.assert_allclose(lse, exact_lse, rtol=0, atol=2e-2)
        out, exact = (
            part.values.astype(jnp.float32) / part.total[..., None] for part in (found, expected)
        )
        assert np.linalg.norm(out - exact) / np.linalg.norm(exact) < 2**-6
