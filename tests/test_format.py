"""The format's bit facts: every cell of the decode table, nibble order, constants."""

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

GOLDEN = Path(__file__).parent / "golden"
TABLE = np.load(GOLDEN / "mx" / "decode_table.npz")
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
BITS = {4: np.uint32, 2: np.uint16}


def rounded_table(dtype) -> np.ndarray:
    """The exact table, rounded once to `dtype` by NumPy or ml_dtypes."""
    with np.errstate(over="ignore", under="ignore"):
        return TABLE["value_f64"].astype(dtype)


def assert_same_bits(actual, expected) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    view = BITS[actual.dtype.itemsize]
    np.testing.assert_array_equal(actual.view(view)[~nan], expected.view(view)[~nan])


def every_cell() -> tuple[np.ndarray, np.ndarray]:
    """Blocks [256, 1, 16] that hold all codes twice, and all scale bytes [256, 1]."""
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    blocks = np.broadcast_to(mxfp4_format.pack_codes(codes), (256, 1, 16))
    return blocks, np.arange(256, dtype=np.uint8)[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
def test_all_4096_cells_decode_bit_exactly(dtype, transform):
    blocks, scales = every_cell()
    decoded = transform(lambda b, s: mxfp4_format.decode(b, s, dtype))(blocks, scales)
    assert_same_bits(decoded, np.tile(rounded_table(dtype), (1, 2)))


def test_float32_table_is_the_ieee_one():
    blocks, scales = every_cell()
    decoded = np.asarray(mxfp4_format.decode(blocks, scales, jnp.float32))[:, :16]
    assert_same_bits(decoded, TABLE["value_f32_ieee"])
    np.testing.assert_array_equal(np.isinf(decoded), TABLE["overflow_f32"])
    assert TABLE["overflow_f32"].sum() == 12


def test_code_8_is_negative_zero_at_every_scale():
    blocks, scales = every_cell()
    for dtype in DTYPES:
        zeros = np.asarray(mxfp4_format.decode(blocks, scales, dtype))[:255, [0, 8]]
        assert np.all(zeros == 0)
        np.testing.assert_array_equal(np.signbit(zeros), [[False, True]] * 255)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5), (0, 2), (4, 0, 2), (256, 3)])
def test_decode_follows_the_layout_for_any_shape(dtype, shape):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
    scales = rng.integers(0, 256, shape, dtype=np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*shape, 32)
    expected = rounded_table(dtype)[scales[..., None], codes]
    decoded = mxfp4_format.decode(blocks, scales, dtype)
    assert_same_bits(decoded, expected.reshape(*shape[:-1], 32 * shape[-1]))


def test_decode_agrees_with_an_independent_decoder():
    vectors = np.load(GOLDEN / "mxfp4_vectors.npz")
    decoded = mxfp4_format.decode(vectors["hf_blocks"], vectors["hf_scales"], jnp.float32)
    assert_same_bits(decoded, vectors["values_f32"])


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, bool])
def test_decode_refuses_other_dtypes(dtype):
    blocks, scales = every_cell()
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        mxfp4_format.decode(blocks, scales, dtype)


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 3), st.integers(1, 3), st.just(16))))
def test_pack_and_unpack_are_inverse(blocks):
    codes = mxfp4_format.unpack_codes(blocks)
    assert codes.shape == (blocks.shape[0], blocks.shape[1] * 32)
    assert np.all(codes < 16)
    np.testing.assert_array_equal(mxfp4_format.pack_codes(codes), blocks)
    np.testing.assert_array_equal(mxfp4_format.unpack_codes(jnp.asarray(blocks)), codes)


def test_even_elements_are_in_low_nibbles():
    blocks = np.full((1, 16), 0xA3, np.uint8)
    np.testing.assert_array_equal(mxfp4_format.unpack_codes(blocks), [0x3, 0xA] * 16)


def test_constants_are_those_of_the_ocp_types():
    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    np.testing.assert_array_equal(mxfp4_format.E2M1_VALUES, e2m1)
    np.testing.assert_array_equal(np.signbit(mxfp4_format.E2M1_VALUES), np.signbit(e2m1))
    assert float(ml_dtypes.finfo(ml_dtypes.float4_e2m1fn).max) == mxfp4_format.E2M1_MAX
    assert mxfp4_format.E2M1_MAX >= 2.0**mxfp4_format.E2M1_EMAX > mxfp4_format.E2M1_MAX / 2
    e8m0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert e8m0[mxfp4_format.E8M0_BIAS] == 1
    assert np.nanargmax(e8m0) == mxfp4_format.E8M0_MAX
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(e8m0)), [mxfp4_format.E8M0_NAN])
    finite_rows = np.flatnonzero(np.isfinite(TABLE["value_f32_ieee"]).all(axis=1))
    assert finite_rows.max() == mxfp4_format.E8M0_MAX_FINITE
