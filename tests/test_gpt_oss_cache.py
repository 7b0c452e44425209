"""The key-value cache: step by step decoding equals the full forward pass."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mxfp4.models.gpt_oss import GptOss, KVCache
from jax_mxfp4.models.gpt_oss.cache import append, fill, slot_positions

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
ORACLE = np.load(GOLDEN / "hf_oracle.npz")
LONG = ORACLE["tokens_long"]


PROMPT, MAX_LEN = 100, 124
# Around the window of 8, a single token, and no padding.
LENGTHS = [1, 7, 8, 9, 100]


@pytest.fixture(scope="module")
def model() -> GptOss:
    return GptOss.from_pretrained(GOLDEN / "hf", jnp.float32, "reference")


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


def test_sliding_layers_keep_only_their_window(model):
    cache = model.init_cache(3, 100)
    assert [keys.shape for keys in cache.keys] == [(3, 8, 2, 32), (3, 100, 2, 32)] * 2
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


def test_fill_then_append_is_a_ring():
    new = jnp.arange(7.0).reshape(1, 7, 1, 1)
    ring = fill(jnp.full((1, 4, 1, 1), -1.0), new, jnp.array([6]))
    np.testing.assert_array_equal(ring[0, :, 0, 0], [4, 5, 2, 3])
    ring = append(ring, jnp.full((1, 1, 1), 6.0), jnp.array([6]))
    np.testing.assert_array_equal(ring[0, :, 0, 0], [4, 5, 6, 3])
    short = fill(jnp.full((1, 4, 1, 1), -1.0), new, jnp.array([2]))
    np.testing.assert_array_equal(short[0, :, 0, 0], [0, 1, -1, -1])


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
