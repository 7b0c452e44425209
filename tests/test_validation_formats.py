"""Every format against an oracle that shares no code with it."""

import math
from pathlib import Path
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest

import jax_mxfp4 as mx
from jax_mxfp4.quantize import SCALE_RULES
from jax_mxfp4.validation import FORMATS, minifloat, tensor_error
from jax_mxfp4.validation.formats import NF4_VALUES
from jax_mxfp4.validation.q4_k import round_q4_k
from jax_mxfp4.validation.synthetic import DISTRIBUTIONS, mean_sqnr_db, octave

GOLDEN = np.load(Path(__file__).parent / "golden" / "ggml_q4_k.npz")

ELEMENTS = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
}


def matrix(*shape: int, seed: int = 0) -> np.ndarray:
    """Heavy-tailed values with a zero block and rows of very different size."""
    x = np.random.default_rng(seed).standard_t(4, shape)
    x[..., 0, :64] = 0
    return (x * np.exp2(np.arange(shape[-2]) - 3)[:, None]).astype(np.float32)


@pytest.mark.parametrize("name", ELEMENTS)
def test_element_rounding_against_ml_dtypes(name: str) -> None:
    element, dtype = getattr(minifloat, name), ELEMENTS[name]
    values = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8).view(dtype)
    values = np.sort(values.astype(np.float64)[np.isfinite(values.astype(np.float64))])
    middles = (values[1:] + values[:-1]) / 2
    inside = np.concatenate([values, middles, np.nextafter(np.float32(middles), np.float32(0))])
    inside = np.concatenate([inside, np.nextafter(np.float32(middles), np.float32(1e9))])
    inside = np.float32(np.concatenate([inside, np.random.default_rng(0).uniform(-1, 1, 10000)]))
    np.testing.assert_array_equal(element.round(inside), inside.astype(dtype).astype(np.float32))
    assert element.largest == float(ml_dtypes.finfo(dtype).max)
    outside = np.float32([2, -2, 1000]) * np.float32(element.largest)
    np.testing.assert_array_equal(element.round(outside), np.sign(outside) * element.largest)


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The element of `grid` [..., n] that is nearest to x [...], in float64, by trying all."""
    distance = np.abs(x[..., None].astype(np.float64) - grid)
    best = np.argmin(distance, axis=-1)[..., None]
    return np.take_along_axis(np.broadcast_to(grid, distance.shape), best, axis=-1)[..., 0]


def test_bf16() -> None:
    x = matrix(4, 96)
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    np.testing.assert_array_equal(FORMATS["bf16"].round(x), rounded.view(np.float32))


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_int8_and_fp8(per: str) -> None:
    x = matrix(3, 5, 96)
    amax = np.abs(x.astype(np.float64)).max(axis=-1 if per == "row" else (-2, -1), keepdims=True)
    scale = np.float32(amax / 127)[..., None]
    expected = nearest(x, np.arange(-127, 128) * scale.astype(np.float64))
    np.testing.assert_allclose(FORMATS[f"int8-{per}"].round(x), expected, rtol=1e-6)
    scale = np.float32(amax) / np.float32(448)
    expected = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(FORMATS[f"fp8-{per}"].round(x), expected)


@pytest.mark.parametrize(
    ("name", "element", "emax"),
    [
        ("mxfp8-e4m3", "E4M3", 8),
        ("mxfp8-e5m2", "E5M2", 15),
        ("mxfp6-e2m3", "E2M3", 2),
        ("mxfp6-e3m2", "E3M2", 4),
        ("mxfp4-floor", "E2M1", 2),
    ],
)
def test_mx_formats(name: str, element: str, emax: int) -> None:
    x = matrix(4, 96)
    x[1, 32:64] = 2.0**-20  # exactly a power of two
    expected = np.empty_like(x)
    for block, out in zip(x.reshape(-1, 32), expected.reshape(-1, 32), strict=True):
        amax = float(np.abs(block).max())
        scale = 2.0 ** (math.frexp(amax)[1] - 1 - emax) if amax else 1.0
        dtype = ELEMENTS[element]
        top = float(ml_dtypes.finfo(dtype).max)
        out[:] = np.clip(block / scale, -top, top).astype(dtype).astype(np.float32) * scale
    np.testing.assert_array_equal(FORMATS[name].round(x), expected)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_mxfp4_is_that_of_this_package(rule: str) -> None:
    x = matrix(4, 96)
    np.testing.assert_array_equal(FORMATS[f"mxfp4-{rule}"].round(x), mx.fake_quantize(x, rule))


def test_nvfp4() -> None:
    x = matrix(2, 5, 96)
    whole = np.abs(x).max(axis=(-2, -1), keepdims=True)[..., None] / np.float32(448 * 6)
    blocks = x.reshape(2, 5, 6, 16)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(6) / whole
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
    codes = (blocks / np.where(scale == 0, 1, scale)).astype(np.float32)
    codes = np.clip(codes, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(FORMATS["nvfp4"].round(x), (codes * scale).reshape(x.shape))


def test_nf4_values_are_normal_quantiles() -> None:
    """QLoRA, appendix E, and `create_normal_map` of bitsandbytes."""
    offset = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort([*positive, 0.0, *negative])
    np.testing.assert_allclose(NF4_VALUES, values / values.max(), atol=1e-6)


def test_nf4_and_int4_with_a_short_last_block() -> None:
    x = matrix(3, 96)
    expected = np.zeros(x.shape)
    for first in (0, 64):
        block = x[:, first : first + 64]
        scale = np.abs(block).max(axis=-1, keepdims=True).astype(np.float64)
        expected[:, first : first + 64] = nearest(block, NF4_VALUES * scale[..., None])
    np.testing.assert_allclose(FORMATS["nf4"].round(x), expected, rtol=1e-6)
    for group in (32, 128):
        for first in range(0, 96, group):
            block = x[:, first : first + group]
            scale = (np.abs(block).max(axis=-1, keepdims=True) / np.float32(7)).astype(np.float16)
            grid = np.arange(-7, 8) * scale.astype(np.float64)[..., None]
            expected[:, first : first + group] = nearest(block, grid)
        np.testing.assert_allclose(FORMATS[f"int4-g{group}"].round(x), expected, rtol=1e-6)


@pytest.mark.parametrize(("name", "half"), [("q4_0", 8), ("q4_k/q5_0", 16)])
def test_q4_0_and_q5_0(name: str, half: int) -> None:
    """`quantize_row_q4_0_ref` and `quantize_row_q5_0_ref` of ggml, block by block."""
    x = matrix(4, 96)
    expected = np.empty_like(x)
    for block, out in zip(x.reshape(-1, 32), expected.reshape(-1, 32), strict=True):
        step = block[np.argmax(np.abs(block))] / np.float32(-half)
        inverse = np.float32(1) / step if step else np.float32(0)
        codes = np.minimum(np.floor(block * inverse + np.float32(half + 0.5)), 2 * half - 1)
        out[:] = (codes - half) * np.float32(np.float16(step))
    np.testing.assert_array_equal(FORMATS[name].round(x), expected)


def test_q4_k_against_ggml() -> None:
    x, expected = GOLDEN["x"], GOLDEN["decoded"]
    actual = round_q4_k(x)
    same = np.all(actual == expected, axis=-1)
    # float32 sums in another order decide a few searches otherwise.
    assert np.mean(same) >= 0.9, np.flatnonzero(~same)
    assert same[-4:].all()  # constant and zero blocks
    ours, theirs = (tensor_error(x, values).sqnr_db for values in (actual, expected))
    assert ours == pytest.approx(theirs, abs=0.005)
    np.testing.assert_array_equal(FORMATS["q4_k/q5_0"].round(x), FORMATS["q4_k"].round(x))


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_close_and_leaves_the_input_alone(name: str) -> None:
    x = octave("gaussian", 8, 512)
    before = x.copy()
    error = tensor_error(x, FORMATS[name].round(x))
    np.testing.assert_array_equal(x, before)
    assert 16 < error.sqnr_db < 60
    assert np.all(FORMATS[name].round(np.zeros((1, 512), np.float32)) == 0)


@pytest.mark.parametrize(
    ("name", "shape", "bits"),
    [
        ("bf16", (7, 32), 16),
        ("int8-row", (7, 64), 8.5),
        ("fp8-tensor", (4, 64), 8.125),
        ("mxfp8-e4m3", (7, 64), 8.25),
        ("mxfp6-e2m3", (7, 64), 6.25),
        ("nvfp4", (4, 64), 4.5 + 0.125),
        ("nf4", (7, 64), 4.5),
        ("nf4", (7, 96), 4 + 64 / 96),
        ("int4-g128", (7, 256), 4.125),
        ("q4_0", (7, 64), 4.5),
        ("q4_k", (7, 256), 4.5),
        ("q4_k/q5_0", (7, 64), 5.5),
        ("mxfp4-even", (7, 64), 4.25),
    ],
)
def test_bits_per_weight(name: str, shape: tuple[int, int], bits: float) -> None:
    assert FORMATS[name].bits(shape) == bits


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"as q4_k: rows of 128 are not a multiple of 256"):
        FORMATS["q4_k"].round(np.ones((2, 128), np.float32))
    with pytest.raises(ValueError, match=r"x \[1, 32\] .* not finite"):
        FORMATS["mxfp4-even"].round(np.full((1, 32), np.inf, np.float32))


@pytest.mark.parametrize(("rule", "least"), [("floor", 18.6), ("even", 18.95), ("mse", 19.0)])
def test_sqnr_on_gaussian_data_over_an_octave(rule: str, least: float) -> None:
    assert mean_sqnr_db(FORMATS[f"mxfp4-{rule}"], octave("gaussian", 128)) >= least


def test_an_octave_is_an_octave() -> None:
    for name in DISTRIBUTIONS:
        x = octave(name, 16, 4096)
        assert x.dtype == np.float32 and x.shape == (16, 4096)
        np.testing.assert_array_equal(x, octave(name, 16, 4096))
    spread = np.std(octave("gaussian", 16, 4096), axis=-1)
    np.testing.assert_allclose(spread, 2 ** (np.arange(16) / 16), rtol=0.05)
