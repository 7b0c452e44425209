"""Quantizers without calibration: rotation, stochastic rounding, error diffusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_layers import MXFP4Dense
from jax_mxfp4 import dequantize, quantize
from jax_mxfp4.quantizers import RotatedDense, diffuse_quantize, rotate, stochastic_quantize
from jax_mxfp4.quantizers.hadamard import hadamard_matrix, rotate_both


def sqnr_db(wanted, found) -> float:
    wanted, found = (np.asarray(array, np.float64) for array in (wanted, found))
    return 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - found) ** 2))


def decoded(packed) -> jax.Array:
    return dequantize(packed, jnp.float32)


def heavy_tails(seed: int, rows: int = 256, columns: int = 2048) -> jax.Array:
    """t distribution, 3 degrees of freedom, row scales uniform over one octave."""
    draw = np.random.default_rng(seed)
    values = draw.standard_t(3, (rows, columns)) * 2.0 ** draw.uniform(0, 1, (rows, 1))
    return jnp.asarray(values, jnp.float32)


def test_rotation_is_orthonormal() -> None:
    matrix = hadamard_matrix().astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix, np.eye(32), atol=1e-6)
    assert set(np.abs(matrix).reshape(-1)) == {np.float64(np.float32(32**-0.5))}
    x = heavy_tails(0, 4, 96)
    np.testing.assert_allclose(rotate(rotate(x)), x, atol=1e-5)
    # Blocks do not mix.
    assert np.all(np.asarray(rotate(x.at[:, 32:].set(0))[:, 32:]) == 0)


def test_rotation_of_hessians() -> None:
    x = np.asarray(heavy_tails(0, 8, 64), np.float64)
    rotated = np.asarray(rotate(jnp.asarray(x, jnp.float32)), np.float64)
    np.testing.assert_allclose(rotate_both(x.T @ x), rotated.T @ rotated, rtol=0, atol=1e-3)


def test_rotation_makes_heavy_tails_gaussian() -> None:
    gains = {"plain": [], "rotated": []}
    for seed in range(9):
        x = heavy_tails(seed)
        gains["plain"].append(sqnr_db(x, decoded(quantize(x, "mse"))))
        gains["rotated"].append(sqnr_db(x, rotate(decoded(quantize(rotate(x), "mse")))))
    assert np.median(gains["rotated"]) >= 19.1
    assert np.median(gains["plain"]) < 17.5


def test_rotated_dense() -> None:
    weight, x = heavy_tails(0, 48, 64), heavy_tails(1, 5, 64)
    layer = RotatedDense(MXFP4Dense.from_packed(quantize(rotate(weight), "mse")))
    exact = jnp.matmul(x, weight.T, precision="highest")
    np.testing.assert_allclose(
        layer(x),
        jnp.matmul(x, rotate(decoded(quantize(rotate(weight), "mse"))).T, precision="highest"),
        rtol=0,
        atol=1e-4 * float(jnp.abs(exact).max()),
    )
    assert sqnr_db(exact, layer(x)) > 16


def test_rotation_needs_whole_blocks() -> None:
    with pytest.raises(ValueError, match=r"x: expected .* multiple of 32"):
        rotate(jnp.ones((2, 33)))


def test_stochastic_rounding_is_unbiased() -> None:
    x = heavy_tails(0, 4, 64)
    draws = jax.vmap(lambda key: decoded(stochastic_quantize(x, key)))(
        jax.random.split(jax.random.key(0), 1000)
    )
    # A step of the grid is at most 2 scales wide: deviation up to 1 scale, 1000 draws, 6 sigma.
    scales = jnp.repeat(2.0 ** (quantize(x, "rceil").scales.astype(jnp.float32) - 127), 32, axis=-1)
    assert np.all(np.abs(np.mean(draws, axis=0) - x) < 6 * scales / np.sqrt(1000))
    # Every draw is one of the two neighbours.
    assert np.all(np.abs(draws - x) <= 2 * scales)


def test_stochastic_rounding_follows_its_key() -> None:
    x = heavy_tails(0, 4, 64)
    first, again, other = (
        np.asarray(stochastic_quantize(x, jax.random.key(seed)).blocks) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.1


def test_representable_values_stay() -> None:
    x = decoded(quantize(heavy_tails(0, 4, 64), "rceil"))
    np.testing.assert_array_equal(decoded(stochastic_quantize(x, jax.random.key(0))), x)
    np.testing.assert_array_equal(decoded(diffuse_quantize(x, "rceil")), x)


def test_diffusion_keeps_sums_of_blocks() -> None:
    x = heavy_tails(0, 64, 512)
    sums = {
        name: np.asarray(jnp.sum(decoded(packed) - x, axis=-1))
        for name, packed in (
            ("diffused", diffuse_quantize(x, "rceil")),
            ("nearest", quantize(x, "rceil")),
        )
    }
    assert np.std(sums["diffused"]) < 0.5 * np.std(sums["nearest"])
    assert sqnr_db(x, decoded(diffuse_quantize(x))) > 13


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_special_blocks_are_as_plain_rounding_gives_them(dtype) -> None:
    x = np.ones((6, 64), np.float32)
    x[0, 3], x[1, 3], x[2, :32], x[3, :32] = np.nan, -np.inf, 0, 1e-40
    x = jnp.asarray(x, dtype)
    plain = quantize(x, "rceil")
    for packed in (stochastic_quantize(x, jax.random.key(0)), diffuse_quantize(x, "rceil")):
        np.testing.assert_array_equal(packed.scales, plain.scales)
        np.testing.assert_array_equal(decoded(packed), decoded(plain))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        stochastic_quantize(jnp.ones((2, 33)), jax.random.key(0))
    with pytest.raises(ValueError, match="scale_rule must be one of"):
        diffuse_quantize(jnp.ones((2, 32)), "loss")  # type: ignore[arg-type]
