"""The key-value cache: step by step decoding equals the full forward pass."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mxfp4.models.gpt_oss import GptOss, GptOssConfig, KVCache
from jax_mxfp4.models.gpt_oss.cache import (
    append,
    context_size,
    last_slots,
    slot_positions,
    write_block,
    write_ring,
)
from jax_mxfp4.models.gpt_oss.kv_formats import decode_rows, empty_rows, encode_like
from jax_mxfp4.models.gpt_oss.released import random_params

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
ORACLE = np.load(GOLDEN / "hf_oracle.npz")
LONG = ORACLE["tokens_long"]


PROMPT, MAX_LEN = 100, 124
# Around the window of 8, a single token, and no padding.
LENGTHS = [1, 7, 8, 9, 100]


@pytest.fixture(scope="module")
def model() -> GptOss:
    return GptOss.from_pretrained(GOLDEN / "hf", jnp.float32, "reference")


@pytest.fixture(scope="module")
def shallow(model) -> GptOss:
    """A sliding layer and a full one."""
    config = dataclasses.replace(model.config, layer_types=model.config.layer_types[:2])
    params = dataclasses.replace(model.params, layers=model.params.layers[:2])
    return GptOss(params, config, "reference")


def prefilled(model: GptOss) -> tuple[jax.Array, KVCache]:
    """Prefixes of the same text with the LENGTHS, in one batch, padded with another token."""
    tokens = np.repeat(LONG[:, :PROMPT], len(LENGTHS), axis=0)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[length:] = 3
    return model.prefill(tokens, LENGTHS, model.init_cache(len(LENGTHS), MAX_LEN))


def test_decoding_equals_the_full_forward_pass(implementation):
    model = GptOss.from_pretrained(GOLDEN / "hf", jnp.float32, implementation)
    full = np.asarray(model(LONG))[0]
    logits, cache = prefilled(model)
    positions = np.array(LENGTHS)
    worst = np.abs(logits - full[positions - 1]).max()
    for _ in range(MAX_LEN - PROMPT):
        logits, cache = model.decode_step(LONG[0, positions], cache)
        worst = max(worst, np.abs(logits - full[positions]).max())
        positions += 1
    assert worst <= 1e-4
    np.testing.assert_array_equal(cache.lengths, positions)

    # The longest sequence now fills the cache: it gives NaN, and the others go on.
    logits, cache = model.decode_step(LONG[0, positions], cache)
    assert np.isnan(logits[-1]).all()
    assert np.abs(logits[:-1] - full[positions[:-1]]).max() <= 1e-4


def test_prefill_in_chunks_equals_prefill_at_once(shallow):
    lengths = [1, 8, 9, 21]  # with chunks of 8, the last one is shorter
    tokens = np.repeat(LONG[:, :21], len(lengths), axis=0)
    results = []
    for size in (None, 8):
        cache = shallow.init_cache(len(lengths), MAX_LEN)
        logits, cache = shallow.prefill(tokens, lengths, cache, chunk_size=size)
        np.testing.assert_array_equal(cache.lengths, lengths)
        results += [logits, shallow.decode_step(LONG[0, np.array(lengths)], cache)[0]]
    np.testing.assert_allclose(results[2:], results[:2], rtol=0, atol=1e-4)


def test_32k_tokens_in_chunks_equal_prefill_at_once():
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=2,
        experts_per_token=1,
        layer_types=("sliding_attention", "full_attention"),
        sliding_window=128,
    )
    model = GptOss(random_params(config, jnp.float32), config, "reference")
    # Weights of the size of a trained model's, so that attention is not the same everywhere.
    model = jax.tree.map(lambda x: x * 20 if x.ndim == 2 and x.dtype != jnp.uint8 else x, model)
    length = 32768
    tokens = np.random.default_rng(0).integers(0, 64, (1, length))
    (at_once, expected), (in_chunks, found) = (
        model.prefill(tokens, [length], model.init_cache(1, length), chunk_size=size)
        for size in (None, length // 2)
    )
    np.testing.assert_allclose(in_chunks, at_once, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.values[1], expected.values[1], rtol=0, atol=1e-4)
    assert np.std(at_once) > 0.1


@pytest.mark.parametrize(
    ("cache_format", "saved", "step"), [("fp8", 0.48, 2.0**-4), ("mxfp4", 0.73, 0.25)]
)
def test_cache_in_fewer_bits(shallow, cache_format, saved, step):
    config = dataclasses.replace(shallow.config, layer_types=("full_attention",))
    params = dataclasses.replace(shallow.params, layers=shallow.params.layers[1:])
    model = GptOss(params, config, "reference")
    plain, packed = (model.init_cache(1, 24, f) for f in (None, cache_format))
    assert 1 - packed.nbytes / (plain.nbytes / 2) >= saved  # of bfloat16's bytes
    results = []
    for cache in (plain, packed):
        _, cache = model.prefill(LONG[:, :21], [21], cache)
        results.append(model.decode_step(LONG[:, 21], cache))
    (logits, plain), (found, packed) = results
    # The keys of the first layer do not depend on earlier ones of the cache.
    exact, decoded = (np.asarray(decode_rows(c.keys[0], jnp.float32)) for c in (plain, packed))
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    assert (np.abs(decoded - exact) <= step * largest).all()
    assert np.abs(decoded - exact).max() > 0
    error = np.linalg.norm(found - logits) / np.linalg.norm(logits)
    assert 0 < error < 4 * step


def test_fp8_rows():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 7, 32)).astype(np.float32)
    x *= np.exp2(rng.integers(-60, 60, (5, 7, 1))).astype(np.float32)
    x[0, 0] = 0
    x[0, 1, :3] = 448 * 2.0**7, -448 * 2.0**6, 1.0  # the scale is 2^7, not 2^8
    rows = encode_like(empty_rows(x.shape, jnp.float32, "fp8"), x)
    assert (rows.codes.dtype, rows.scales.dtype) == (jnp.float8_e4m3fn, jnp.uint8)
    assert rows.scales[0, 1] == 127 + 7
    decoded = np.asarray(decode_rows(rows, jnp.float32))
    np.testing.assert_array_equal(decoded[0, 0], 0)
    np.testing.assert_array_equal(decoded[0, 1, :2], x[0, 1, :2])
    largest = np.abs(x).max(axis=-1, keepdims=True)
    # Half a unit of 4 bits of precision, or of the smallest step, 2^-9 of a scale.
    np.testing.assert_array_less(
        np.abs(decoded - x),
        np.maximum(np.abs(x) * 2.0**-4, largest / 224 * 2.0**-9) * 1.001 + 1e-38,
    )
    codes = np.abs(np.asarray(rows.codes, np.float32)).max(axis=-1).ravel()
    assert (codes[1:] > 200).all() and (codes <= 448).all()


def test_fp8_rows_keep_nan():
    x = np.ones((2, 32), np.float32)
    x[0, 3] = np.nan
    rows = encode_like(empty_rows(x.shape, jnp.float32, "fp8"), x)
    decoded = decode_rows(rows, jnp.float32)
    assert np.isnan(decoded[0, 3])
    np.testing.assert_array_equal(decoded[1], 1)


@pytest.mark.parametrize(
    ("cache_format", "head_dim", "message"),
    [
        ("int8", 64, 'cache_format: expected "fp8", "mxfp4" or None, found \'int8\''),
        ("mxfp4", 48, "a head_dim that is a multiple of 32, found 48"),
    ],
)
def test_bad_cache_format(model, cache_format, head_dim, message):
    config = dataclasses.replace(model.config, head_dim=head_dim)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(model, config=config).init_cache(1, 8, cache_format)


def test_sliding_layers_keep_only_their_window(model):
    cache = model.init_cache(3, 100)
    assert [keys.shape for keys in cache.keys] == [(3, 2, 8, 32), (3, 2, 100, 32)] * 2
    assert [values.shape for values in cache.values] == [keys.shape for keys in cache.keys]
    assert {keys.dtype for keys in cache.keys} == {model.dtype}


def test_steps_work_inside_jit(model):
    @jax.jit
    def run(model, tokens):
        _, cache = model.prefill(tokens[:, :1], jnp.array([1]), model.init_cache(1, 2))
        return model.decode_step(tokens[:, 1], cache)[0]

    np.testing.assert_allclose(run(model, LONG[:, :2]), model(LONG)[:, 1], rtol=0, atol=1e-4)


def test_the_cache_is_consumed(model):
    cache = model.init_cache(len(LENGTHS), MAX_LEN)
    _, filled = model.prefill(np.zeros((len(LENGTHS), PROMPT), np.int32), LENGTHS, cache)
    model.decode_step(LONG[0, : len(LENGTHS)], filled)
    for used in (cache, filled):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((used.keys, used.values)))


def test_slot_positions():
    np.testing.assert_array_equal(
        slot_positions(jnp.array([1, 3, 4, 6]), 4),
        [[0, -3, -2, -1], [0, 1, 2, -1], [0, 1, 2, 3], [4, 5, 2, 3]],
    )


def column(*values: float) -> jax.Array:
    """One sequence of one head of one element."""
    return jnp.array(values, jnp.float32).reshape(1, 1, -1, 1)


def test_a_sliding_layer_is_a_ring():
    new, zero = column(*range(7)), jnp.int32(0)
    ring = write_ring(column(-1, -1, -1, -1), new, zero, jnp.array([6]))
    np.testing.assert_array_equal(ring.ravel(), [4, 5, 2, 3])
    np.testing.assert_array_equal(last_slots(ring, jnp.int32(6), 4).ravel(), [2, 3, 4, 5])
    ring = append(ring, jnp.full((1, 1, 1), 6.0), jnp.array([6]))
    np.testing.assert_array_equal(ring.ravel(), [4, 5, 6, 3])
    short = write_ring(column(-1, -1, -1, -1), new, zero, jnp.array([2]))
    np.testing.assert_array_equal(short.ravel(), [0, 1, -1, -1])


def test_a_ring_is_written_in_chunks():
    ring = column(0, 1, 2, -1)
    later = write_ring(ring, column(3, 4, 5), jnp.int32(3), jnp.array([5]))
    np.testing.assert_array_equal(later.ravel(), [4, 1, 2, 3])
    ended = write_ring(ring, column(9, 9, 9), jnp.int32(3), jnp.array([3]))
    np.testing.assert_array_equal(ended, ring)


def test_a_full_layer_is_written_in_chunks():
    rows = write_block(column(0, 1, -1, -1, -1), column(2, 3), jnp.int32(2))
    np.testing.assert_array_equal(rows.ravel(), [0, 1, 2, 3, -1])


def test_context_covers_what_is_written():
    assert [context_size(n, 16, 1000) for n in (0, 1, 16, 17, 64, 65, 300, 1000)] == [
        0, 16, 16, 32, 64, 128, 512, 1000,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "max_len", "message"),
    [
        (0, 8, "batch: expected at least 1"),
        (1, 0, "max_len: expected 1 to 131072"),
        (1, 131073, "max_len: expected 1 to 131072"),
    ],
)
def test_bad_cache_sizes(model, batch, max_len, message):
    with pytest.raises(ValueError, match=message):
        model.init_cache(batch, max_len)


def test_bad_chunk_size(model):
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, found 0"):
        model.prefill(LONG[:, :4], [4], model.init_cache(1, 8), chunk_size=0)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (LONG[:, :9], [9], "tokens: expected at most 8 positions"),
        (LONG[:, :4], [5], "lengths: expected integers from 1 to 4, found 5"),
        (LONG[:, :4], [0], "lengths: expected integers from 1 to 4, found 0"),
        (LONG[:, :4], [4, 4], r"lengths: expected shape \[1\], found \[2\]"),
        (LONG[0, :8].reshape(2, 4), [4, 4], "tokens: expected 1 sequences as in the cache"),
        ([[1, 512]], [2], "tokens: expected integers from 0 to 511"),
    ],
)
def test_bad_prefill(model, tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        model.prefill(tokens, lengths, model.init_cache(1, 8))


def test_bad_step(model):
    cache = model.init_cache(1, 8)
    with pytest.raises(ValueError, match="tokens: expected 1 sequences as in the cache, found 2"):
        model.decode_step([1, 2], cache)
    with pytest.raises(ValueError, match="tokens: expected integers from 0 to 511, found -1"):
        model.decode_step([-1], cache)
    with pytest.raises(ValueError, match=r"tokens: expected \[B\], not empty, found \[1, 1\]"):
        model.decode_step([[1]], cache)
