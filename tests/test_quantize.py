"""Scale rules and element rounding: golden data, an exact oracle, special values, gradients."""

from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_mxfp4 import format as mxfp4_format
from jax_mxfp4 import reference
from jax_mxfp4.quantize import SCALE_RULES, fake_quantize, quantize

GOLDEN = Path(__file__).parent / "golden"
MAGNITUDES = np.array(mxfp4_format.E2M1_VALUES[:8])
MIDPOINTS = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2
F32_MAX = np.finfo(np.float32).max


def make_finite(bits: np.ndarray) -> np.ndarray:
    """Clears an exponent bit of Inf and NaN."""
    finite = np.isfinite(bits.view(np.float32))
    return np.where(finite, bits, bits & np.uint32(0xBFFFFFFF)).view(np.float32)


finite_blocks = hnp.arrays(np.uint32, (2, 32), elements=st.integers(0, 2**32 - 1)).map(make_finite)


def packed(x, rule) -> tuple[np.ndarray, np.ndarray]:
    """Scale bytes [..., G] and codes [..., 32 * G] of the quantized x."""
    w = quantize(x, rule)
    return np.asarray(w.scales), mxfp4_format.unpack_codes(np.asarray(w.blocks))


def decoded(x, rule) -> np.ndarray:
    return np.asarray(reference.dequantize(quantize(x, rule), jnp.float32))


def oracle_scale(block: np.ndarray, rule: str) -> int:
    """Scale byte of one finite block, from the definition of the rule, in rational numbers."""
    amax = Fraction(float(np.max(np.abs(block))))
    if amax == 0:
        return 0
    if rule == "rceil":
        byte = next(s for s in range(-40, 260) if amax <= 6 * Fraction(2) ** (s - 127))
    else:
        byte = next(s for s in range(260, -40, -1) if 4 * Fraction(2) ** (s - 127) <= amax)
        if rule == "even" and amax >= 7 * Fraction(2) ** (byte - 127):
            byte += 1
    byte = min(max(byte, 0), 252)
    if rule == "mse":
        larger = min(byte + 1, 252)
        if squared_error(block, larger) < squared_error(block, byte):
            return larger
    return byte


def oracle_codes(block: np.ndarray, byte: int) -> np.ndarray:
    """Nearest magnitudes, ties to the even code; float64 scales float32 values exactly."""
    scaled = np.abs(block.astype(np.float64)) * 2.0 ** (127 - int(byte))
    below = np.searchsorted(MIDPOINTS, scaled, side="left")
    above = np.searchsorted(MIDPOINTS, scaled, side="right")
    codes = np.where(below % 2 == 0, below, above)
    return (codes + 8 * np.signbit(block)).astype(np.uint8)


def squared_error(block: np.ndarray, byte: int) -> Fraction:
    scale = Fraction(2) ** (byte - 127)
    values = MAGNITUDES[oracle_codes(np.abs(block), byte)]
    pairs = zip(values, np.abs(block), strict=True)
    return sum((Fraction(v) * scale - Fraction(float(x))) ** 2 for v, x in pairs)


def assert_matches_oracle(x: np.ndarray, rule: str) -> None:
    scales, codes = packed(x, rule)
    rows = zip(x.reshape(-1, 32), scales.ravel(), codes.reshape(-1, 32), strict=True)
    for block, scale, code in rows:
        assert scale == oracle_scale(block, rule)
        np.testing.assert_array_equal(code, oracle_codes(block, scale))


# Golden data ------------------------------------------------------------------------------------


def test_floor_matches_the_specification_on_all_golden_blocks():
    golden = np.load(GOLDEN / "mx" / "encode_floor.npz")
    w = quantize(golden["x_bits"].view(np.float32), "floor")
    assert w.shape == (289, 32)
    np.testing.assert_array_equal(np.asarray(w.scales)[:, 0], golden["scale"])
    np.testing.assert_array_equal(np.asarray(w.blocks)[:, 0], golden["packed_pairs"])


def test_floor_matches_an_independent_encoder_over_rows_of_blocks():
    golden = np.load(GOLDEN / "mxfp4_vectors.npz")
    w = quantize(golden["quant_in"], "floor")
    np.testing.assert_array_equal(w.scales, golden["quant_ocp_rne_scales"])
    np.testing.assert_array_equal(w.blocks, golden["quant_ocp_rne_blocks"])


@pytest.mark.parametrize(
    ("rule", "deviations"),
    [
        ("even", ("nan", "inf", "even_top", "even_byte0")),  # torchao
        ("rceil", ("nan", "rceil_top", "rceil_subnormal_quotient")),  # NVIDIA's headers
    ],
)
def test_even_and_rceil_match_their_sources(rule, deviations):
    golden = np.load(GOLDEN / "mx" / "encode_even_rceil.npz")
    inputs = [golden["f32_bits"].view(np.float32), golden["bf16_bits"].view(ml_dtypes.bfloat16)]
    arrays = [quantize(x, rule) for x in inputs]
    scales = np.concatenate([w.scales for w in arrays])[:, 0]
    blocks = np.concatenate([w.blocks for w in arrays])[:, 0]
    compared = ~np.any([golden[name] for name in deviations], axis=0)
    assert compared.mean() > 0.97
    np.testing.assert_array_equal(scales[compared], golden[f"{rule}_scale"][compared])
    np.testing.assert_array_equal(blocks[compared], golden[f"{rule}_packed"][compared])

    # Where only the codes or only the byte deviate, the other half still agrees.
    np.testing.assert_array_equal(scales[golden["nan"]], 255)
    np.testing.assert_array_equal(scales[golden[f"{rule}_top"]], 252)
    np.testing.assert_array_equal(golden[f"{rule}_scale"][golden[f"{rule}_top"]], 253)
    byte0 = golden["even_byte0"]
    if rule == "even":
        np.testing.assert_array_equal(scales[byte0], golden["even_scale"][byte0])


# An exact oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SCALE_RULES)
@given(x=finite_blocks)
@settings(deadline=None, derandomize=True)
def test_any_finite_float32_matches_the_exact_oracle(rule, x):
    assert_matches_oracle(x, rule)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_blocks_full_of_ties_match_the_exact_oracle(rule):
    rng = np.random.default_rng(1)
    exponents = np.repeat([-127, -126, -125, -3, 0, 5, 123, 124], 12)[:, None]
    x = rng.choice([0, *MIDPOINTS, *MAGNITUDES, 7, 7.5], (96, 32)) * 2.0**exponents
    x = np.minimum(x, F32_MAX) * rng.choice([-1, 1], x.shape)
    assert_matches_oracle(x.astype(np.float32), rule)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_gaussian_bfloat16_matches_the_exact_oracle(rule):
    x = np.random.default_rng(2).standard_normal((64, 64)).astype(ml_dtypes.bfloat16)
    scales, codes = packed(x, rule)
    expected_scales, expected_codes = packed(x.astype(np.float32), rule)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(codes, expected_codes)
    assert_matches_oracle(x.astype(np.float32), rule)


def test_every_midpoint_at_every_scale_rounds_to_even():
    scales = np.arange(253)
    x = np.zeros((253, 32), np.float32)
    unit = 2.0 ** (scales[:, None] - 127.0)
    x[:, 0] = (4 * unit)[:, 0]  # makes `floor` choose this scale
    midpoints = (MIDPOINTS * unit).astype(np.float32)
    assert np.array_equal(midpoints.astype(np.float64), MIDPOINTS * unit)
    x[:, 1:8] = midpoints
    x[:, 8:15] = np.nextafter(midpoints, np.float32(0))
    x[:, 15:22] = np.nextafter(midpoints, np.float32(np.inf))
    x[:, 22:29] = -midpoints
    found, codes = packed(x, "floor")
    np.testing.assert_array_equal(found[:, 0], scales)
    even = [0, 2, 2, 4, 4, 6, 6]
    expected = [6, *even, *range(7), *range(1, 8), *[8 + c for c in even], 0, 0, 0]
    np.testing.assert_array_equal(codes, np.tile(np.array(expected, np.uint8), (253, 1)))


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_every_float16_and_bfloat16_value_counts_as_its_float32_value(rule):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x = np.arange(2**16, dtype=np.uint16).view(dtype)
        # Neighbours in one block, then values of all sizes in one block.
        for order in (x.reshape(-1, 32), x.reshape(32, -1).T):
            widened = np.ascontiguousarray(order).astype(np.float32)
            for actual, expected in zip(packed(order, rule), packed(widened, rule), strict=True):
                np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("rule", SCALE_RULES)
@given(x=finite_blocks)
@settings(deadline=None, derandomize=True)
def test_quantizing_what_was_decoded_changes_no_value(rule, x):
    once = decoded(x, rule)
    assert np.all(np.isfinite(once))
    np.testing.assert_array_equal(decoded(once, rule), once)


@given(x=finite_blocks)
@settings(deadline=None, derandomize=True)
def test_mse_is_the_better_of_two_scales(x):
    scales, _ = packed(x, "mse")
    floors, _ = packed(x, "floor")
    for block, scale, floor in zip(x, scales[:, 0], floors[:, 0], strict=True):
        assert scale in (floor, floor + 1)
        other = min(int(floor) + 1, 252) if scale == floor else int(floor)
        assert squared_error(block, int(scale)) <= squared_error(block, other)


def test_mse_prefers_the_smaller_scale_on_a_tie():
    # Multiples of 2 up to 6 are exact at scale 1 and at scale 2.
    x = np.resize(np.float32([4, -2, 0, 6]), 32)
    assert packed(x, "mse")[0] == [127]
    # 7 is one away from 6 and from 8: the errors are equal.
    assert packed(np.full(32, 7, np.float32), "mse")[0] == [127]
    assert packed(np.full(32, np.nextafter(np.float32(7), np.float32(8))), "mse")[0] == [128]


@pytest.mark.parametrize(
    ("amax", "floor", "even", "rceil"),
    [
        (4, 0, 0, 0),
        (6, 0, 0, 0),
        (6.0000005, 0, 0, 1),
        (6.9999995, 0, 0, 1),
        (7, 0, 1, 1),
        (8, 1, 1, 1),
    ],
)
def test_where_each_rule_doubles_the_scale(amax, floor, even, rceil):
    for exponent in (-100, 0, 100):
        x = np.zeros(32, np.float32)
        x[17] = -np.float32(amax) * np.float32(2.0**exponent)
        found = [int(packed(x, rule)[0][0]) - 127 - exponent for rule in ("floor", "even", "rceil")]
        assert found == [floor, even, rceil]


# SQNR, by the protocol of 512 x 4096 Gaussian values with row scales over one octave ------------


@pytest.mark.parametrize(
    ("rule", "decibels"), [("floor", 18.6), ("even", 18.95), ("rceil", 18.6), ("mse", 19.0)]
)
def test_gaussian_signal_to_noise(rule, decibels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 4096)) * 2.0 ** rng.uniform(0, 1, (512, 1))
    x = x.astype(np.float32)
    error = decoded(x, rule).astype(np.float64) - x
    sqnr = 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum(error**2))
    assert decibels <= sqnr <= 19.1


# Special values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SCALE_RULES)
class TestSpecialValues:
    def test_zero_block_has_byte_0_and_keeps_signs(self, rule):
        x = np.where(np.arange(32) % 3 == 0, np.float32(-0.0), np.float32(0.0))
        scales, codes = packed(x, rule)
        assert scales == [0]
        np.testing.assert_array_equal(codes, np.where(np.arange(32) % 3 == 0, 8, 0))

    def test_underflow_keeps_the_sign(self, rule):
        x = np.full(32, -1e-3, np.float32)
        x[0] = 4
        np.testing.assert_array_equal(packed(x, rule)[1], [6] + [8] * 31)

    def test_nan_makes_the_block_nan_and_no_other(self, rule):
        x = np.ones((1, 96), np.float32)
        x[0, 40] = -np.nan
        x[0, 41] = np.inf
        scales, codes = packed(x, rule)
        assert scales[0, 1] == 255
        assert not codes[0, 32:64].any()
        nan = np.isnan(decoded(x, rule))
        np.testing.assert_array_equal(nan, np.repeat([[False, True, False]], 32, axis=1))

    def test_inf_has_byte_254_and_decodes_to_inf(self, rule):
        x = np.ones(32, np.float32)
        x[3], x[4], x[5], x[6] = np.inf, -np.inf, F32_MAX, 2.0**127
        scales, codes = packed(x, rule)
        assert scales == [254]
        np.testing.assert_array_equal(codes[:8], [0, 0, 0, 7, 15, 4, 2, 0])
        assert decoded(x, rule)[3] == np.inf
        assert decoded(x, rule)[4] == -np.inf

    def test_finite_input_never_becomes_infinite(self, rule):
        for amax in (F32_MAX, 2.0**127, 1.5 * 2.0**127, 1.75 * 2.0**127):
            x = np.linspace(-1, 1, 32).astype(np.float32) * np.float32(amax)
            assert packed(x, rule)[0] == [252]
            assert np.all(np.isfinite(decoded(x, rule)))

    def test_float32_subnormals_are_not_flushed(self, rule):
        x = np.zeros(32, np.float32)
        x[0], x[1], x[2] = 2.0**-127, -(2.0**-128), 2.0**-149
        scales, codes = packed(x, rule)
        assert scales == [0]
        np.testing.assert_array_equal(codes[:4], [2, 9, 0, 0])
        np.testing.assert_array_equal(decoded(x, rule)[:2], x[:2])


# Interface --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_jit_and_vmap_change_nothing(rule):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, 3, 64)), jnp.float32)
    expected = quantize(x, rule)
    for transform in (jax.jit, jax.vmap, lambda f: jax.vmap(f, in_axes=1, out_axes=1)):
        actual = transform(lambda x: quantize(x, rule))(x)
        assert actual.shape == x.shape
        np.testing.assert_array_equal(actual.blocks, expected.blocks)
        np.testing.assert_array_equal(actual.scales, expected.scales)


def test_even_is_the_default():
    x = np.float32([7] * 32)
    np.testing.assert_array_equal(quantize(x).scales, quantize(x, "even").scales)
    np.testing.assert_array_equal(fake_quantize(x), fake_quantize(x, "even"))
    assert quantize(x).scales != quantize(x, "floor").scales


@pytest.mark.parametrize("shape", [(0, 32), (3, 0, 64), (32,)])
def test_any_leading_shape(shape):
    w = quantize(jnp.ones(shape, jnp.float32))
    assert w.shape == shape
    assert fake_quantize(jnp.ones(shape, jnp.float32)).shape == shape


@pytest.mark.parametrize("function", [quantize, fake_quantize])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros(33, np.float32), ValueError, r"multiple of 32.*\(33,\)"),
        (np.zeros((32, 8), np.float32), ValueError, r"multiple of 32.*\(32, 8\)"),
        (np.zeros((4, 0), np.float32), ValueError, r"positive multiple of 32.*\(4, 0\)"),
        (np.float32(1), ValueError, r"multiple of 32.*\(\)"),
        (np.zeros(32), TypeError, "float64"),
        (np.zeros(32, np.int32), TypeError, "int32"),
        ([0.0] * 32, TypeError, "list"),
    ],
)
def test_bad_input_is_refused(function, x, error, message):
    with pytest.raises(error, match=message):
        function(x)


@pytest.mark.parametrize("function", [quantize, fake_quantize])
def test_unknown_rule_is_refused(function):
    with pytest.raises(ValueError, match=r"scale_rule .* 'ceil'"):
        function(jnp.ones(32, jnp.float32), "ceil")


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_fake_quantize_is_quantize_then_dequantize(rule, dtype):
    x = jnp.asarray(np.random.default_rng(4).standard_normal((8, 64)) * 50, dtype)
    x = x.at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf).at[2].set(-0.0)
    expected = reference.dequantize(quantize(x, rule), dtype)
    for actual in (fake_quantize(x, rule), jax.jit(lambda x: fake_quantize(x, rule))(x)):
        assert actual.dtype == dtype
        # NumPy does not compare NaNs of bfloat16; widening keeps every value.
        actual, wide = actual.astype(jnp.float32), expected.astype(jnp.float32)
        np.testing.assert_array_equal(actual, wide)
        np.testing.assert_array_equal(np.signbit(actual), np.signbit(wide))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gradient_is_passed_straight_through(dtype):
    # Saturated, underflowing, infinite and NaN elements included.
    x = jnp.asarray([7.9, 1e-3, -0.0, 5] * 8 + [jnp.inf] * 32 + [jnp.nan] * 32, dtype)
    cotangent = jnp.arange(96, dtype=dtype)
    expected = fake_quantize(x, "floor").astype(jnp.float32)
    value, vjp = jax.vjp(jax.jit(lambda x: fake_quantize(x, "floor")), x)
    np.testing.assert_array_equal(value.astype(jnp.float32), expected)
    np.testing.assert_array_equal(vjp(cotangent)[0], cotangent)
    value, tangent = jax.jvp(lambda x: fake_quantize(x, "floor"), (x,), (cotangent,))
    np.testing.assert_array_equal(value.astype(jnp.float32), expected)
    np.testing.assert_array_equal(tangent, cotangent)


def test_gradient_under_vmap_and_chain_rule():
    x = jnp.asarray(np.random.default_rng(5).standard_normal((4, 32)), jnp.float32)
    gradient = jax.vmap(jax.grad(lambda x: jnp.sum(jnp.square(fake_quantize(x)))))(x)
    np.testing.assert_array_equal(gradient, 2 * fake_quantize(x))
