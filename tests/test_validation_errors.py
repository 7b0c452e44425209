"""Measures of error, against values that are known without them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mxfp4.validation import (
    TensorError,
    kl_divergence,
    negative_log_likelihood,
    tensor_error,
    top1_agreement,
)
from jax_mxfp4.validation import errors as errors_module


def test_measures_of_known_tensors() -> None:
    error = tensor_error(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]], np.float16))
    assert error.elements == 2
    assert error.largest == 0.5
    assert error.relative_rms == 0.1  # 0.5 / 5
    assert error.sqnr_db == pytest.approx(20.0)
    assert error.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))


def test_orthogonal_and_opposite() -> None:
    assert tensor_error([1.0, 0.0], [0.0, 2.0]).cosine == 0
    assert tensor_error([1.0, 2.0], [-1.0, -2.0]).cosine == pytest.approx(-1)


def test_equal_tensors_have_no_error() -> None:
    x = np.arange(-5.0, 5.0)
    error = tensor_error(x, x)
    assert (error.relative_rms, error.sqnr_db, error.largest) == (0.0, math.inf, 0.0)
    assert tensor_error(np.zeros(3), np.zeros(3)).relative_rms == 0
    assert math.isnan(tensor_error(np.zeros(3), np.zeros(3)).cosine)


def test_error_on_a_zero_signal() -> None:
    error = tensor_error(np.zeros(2), np.ones(2))
    assert (error.relative_rms, error.sqnr_db) == (math.inf, -math.inf)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_not_hidden(bad: float) -> None:
    error = tensor_error([1.0, 2.0], [1.0, bad])
    assert not math.isfinite(error.largest)
    assert not error.relative_rms <= 1
    assert not error.sqnr_db > 0
    assert math.isnan((error + tensor_error([1.0], [1.0])).largest) == math.isnan(bad)


def test_errors_add_up_to_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 50, 7))
    whole = tensor_error(x, y)
    parts = sum((tensor_error(x[i : i + 9], y[i : i + 9]) for i in range(0, 50, 9)), TensorError())
    monkeypatch.setattr(errors_module, "_CHUNK", 16)
    for other in (parts, tensor_error(x, y)):
        assert other.elements == whole.elements
        assert other.largest == whole.largest
        assert other.relative_rms == pytest.approx(whole.relative_rms)
        assert other.cosine == pytest.approx(whole.cosine)


def test_shapes_must_be_equal() -> None:
    with pytest.raises(ValueError, match=r"actual: expected shape \[2\], found \[1, 2\]"):
        tensor_error([1.0, 2.0], [[1.0, 2.0]])


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def test_kl_and_likelihood_against_float64() -> None:
    rng = np.random.default_rng(1)
    base, other = 5 * rng.standard_normal((2, 4, 6, 100))
    p, q = _softmax(base), _softmax(other)
    kl = jax.jit(kl_divergence)(jnp.float32(base), jnp.float32(other))
    np.testing.assert_allclose(kl, np.sum(p * np.log(p / q), axis=-1), rtol=1e-4)
    targets = rng.integers(0, 100, (4, 6))
    nll = negative_log_likelihood(jnp.float32(other), jnp.int32(targets))
    expected = -np.log(np.take_along_axis(q, targets[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(nll, expected, rtol=1e-4)


def test_kl_of_equal_logits_is_zero_and_shifts_do_not_matter() -> None:
    logits = jnp.float32(np.random.default_rng(2).standard_normal((8, 1000)))
    assert jnp.all(kl_divergence(logits, logits) == 0)
    np.testing.assert_allclose(kl_divergence(logits, logits + 100), 0, atol=1e-5)


def test_top1_leaves_out_near_ties() -> None:
    base = jnp.float32([[3, 1, 0], [2, 1.99, 0], [0, 5, 1]])
    other = jnp.float32([[1, 0.5, 0], [1, 2, 0], [4, 3, 0]])
    agrees, decided = top1_agreement(base, other, 0.05)
    assert agrees.tolist() == [True, False, False]
    assert decided.tolist() == [True, False, True]
    assert top1_agreement(base, other, 0.0)[1].all()
