"""`gptq` against its textbook form, against plain rounding, and at its edges."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jax_mxfp4 import dequantize, quantize
from jax_mxfp4.format import E2M1_VALUES
from jax_mxfp4.quantizers import gptq
from jax_mxfp4.quantizers.gptq import GPTQ_RULES, column_order


def decoded(packed) -> np.ndarray:
    return np.asarray(dequantize(packed, jnp.float32), np.float64)


def correlated(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """A weight [N, K], and inputs [tokens, K] as of a real layer: a few directions dominate."""
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(columns, columns)) * np.arange(1, columns + 1) ** -0.7
    weight = draw.standard_t(5, (rows, columns)).astype(np.float32)
    return weight, draw.normal(size=(tokens, columns)) @ mixing.T


def output_sqnr_db(weight: np.ndarray, found: np.ndarray, inputs: np.ndarray) -> float:
    wanted, error = inputs @ weight.T, inputs @ (weight - found).T
    return 10 * np.log10(np.sum(wanted**2) / np.sum(error**2))


@pytest.mark.parametrize("rule", ["floor", "even", "mse"])
def test_without_correlation_it_is_plain_rounding(rule: str) -> None:
    weight, _ = correlated(32, 96, 1)
    packed = gptq(weight, np.eye(96), scale_rule=rule)
    plain = quantize(jnp.asarray(weight), rule)
    np.testing.assert_array_equal(packed.scales, plain.scales)
    np.testing.assert_array_equal(decoded(packed), decoded(plain))


def test_the_rule_loss_is_mse_without_correlation() -> None:
    weight, _ = correlated(32, 96, 1)
    packed = gptq(weight, np.eye(96), scale_rule="loss")
    np.testing.assert_array_equal(packed.scales, quantize(jnp.asarray(weight), "mse").scales)


def test_against_the_textbook() -> None:
    """Optimal brain surgery in float64: eliminate one column after the other from the inverse."""
    weight, inputs = correlated(32, 96, 512)
    hessian, damping = inputs.T @ inputs, 0.01
    inverse = np.linalg.inv(hessian + damping * np.diag(hessian).mean() * np.eye(96))
    grid = np.array(E2M1_VALUES[:8])
    work, found = weight.astype(np.float64), np.zeros((32, 96))
    scale = np.zeros(32)
    for k in range(96):
        if k % 32 == 0:
            amax = np.abs(work[:, k : k + 32]).max(axis=1)
            scale = 2.0 ** (np.floor(np.log2(amax)) - 2)
        nearest = np.abs(np.abs(work[:, k, None]) / scale[:, None] - grid).argmin(axis=1)
        found[:, k] = np.sign(work[:, k]) * grid[nearest] * scale
        error = (work[:, k] - found[:, k]) / inverse[k, k]
        work -= np.outer(error, inverse[k])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    packed = gptq(weight, hessian, scale_rule="floor", damping=damping, activation_order=False)
    # Float32 against float64: a value next to a midpoint can go the other way.
    agreement = np.mean(decoded(packed) == found)
    assert agreement > 0.97
    ours, textbook = (output_sqnr_db(weight, q, inputs) for q in (decoded(packed), found))
    assert abs(ours - textbook) < 0.1


def test_gain_over_plain_rounding() -> None:
    weight, inputs = correlated(32, 96, 2048)
    seen, unseen = np.split(inputs, 2)
    floor = output_sqnr_db(weight, decoded(quantize(jnp.asarray(weight), "floor")), unseen)
    sqnr = {
        rule: output_sqnr_db(weight, decoded(gptq(weight, seen.T @ seen, scale_rule=rule)), unseen)
        for rule in GPTQ_RULES
    }
    assert sqnr["loss"] > floor + 4
    assert sqnr["loss"] > sqnr["floor"]
    assert sqnr["mse"] > sqnr["floor"]


def test_activation_order_helps_and_keeps_blocks() -> None:
    weight, inputs = correlated(32, 96, 2048)
    inputs = inputs[:, np.random.default_rng(0).permutation(96)] * np.geomspace(0.1, 10, 96)
    hessian = inputs.T @ inputs
    with_order, without = (
        output_sqnr_db(weight, decoded(gptq(weight, hessian, activation_order=on)), inputs)
        for on in (True, False)
    )
    assert with_order > without
    order = column_order(np.diag(hessian)).reshape(-1, 32)
    assert sorted(order.reshape(-1)) == list(range(96))
    assert all(len({column // 32 for column in block}) == 1 for block in order)
    sums = np.diag(hessian)[order].sum(axis=1)
    assert all(left >= right for left, right in itertools.pairwise(sums))


def test_inputs_that_are_always_zero() -> None:
    weight, inputs = correlated(32, 96, 256)
    inputs[:, 5] = 0
    assert np.isfinite(decoded(gptq(weight, inputs.T @ inputs))).all()
    unseen = gptq(weight, np.zeros((96, 96)), scale_rule="even")
    np.testing.assert_array_equal(decoded(unseen), decoded(quantize(jnp.asarray(weight), "even")))


def test_zero_blocks() -> None:
    weight = np.zeros((32, 96), np.float32)
    weight[0, :32] = 1
    np.testing.assert_array_equal(decoded(gptq(weight, np.eye(96))), weight)


@pytest.mark.parametrize(
    ("weight", "hessian", "options", "problem"),
    [
        (np.ones((2, 33)), np.eye(33), {}, r"weight: expected \[N, K\] with K a multiple of 32"),
        (np.ones((2, 32)), np.eye(64), {}, r"hessian: expected \(32, 32\), found \(64, 64\)"),
        (np.full((2, 32), np.nan), np.eye(32), {}, "weight: expected finite"),
        (np.ones((2, 32)), -np.eye(32), {}, "hessian: expected no negative diagonal"),
        (np.ones((2, 32)), np.eye(32), {"damping": 0}, "damping: expected a number above 0"),
        (np.ones((2, 32)), np.eye(32), {"scale_rule": "rceil"}, "scale_rule: expected one of"),
    ],
)
def test_bad_arguments(weight, hessian, options, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        gptq(weight, hessian, **options)
