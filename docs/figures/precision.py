"""Measure what the precision document quotes and write precision.json beside this file.

    python docs/figures/precision.py

Needs numpy, ml_dtypes and this package; about two minutes on one CPU core. Every draw comes from
a seeded generator, so a second run gives the same figures but for rounding in libraries.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

import jax_mxfp4 as mx
from jax_mxfp4.format import E2M1_VALUES
from jax_mxfp4.quantize import SCALE_RULES

FOLDER = Path(__file__).parent
SHAPE = (256, 4096)
SEEDS = 9
BLOCK = 32

Array = np.ndarray
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], Array]] = {
    "Gaussian": lambda g: g.standard_normal(SHAPE),
    "Laplace": lambda g: g.laplace(size=SHAPE),
    "Student t, 5 degrees": lambda g: g.standard_t(5, SHAPE),
    "Student t, 3 degrees": lambda g: g.standard_t(3, SHAPE),
}


def octave(rows: int) -> Array:
    """Row factors spread evenly over one octave: a power-of-two scale cares where amax falls."""
    return 2.0 ** (np.arange(rows) / rows)[:, None]


def sqnr(x: Array, y: Array) -> float:
    """Return 10 log10 of signal energy over error energy, in dB."""
    return float(10 * np.log10(np.sum(np.square(x)) / np.sum(np.square(x - y))))


def packed(x: Array, rule: str) -> Array:
    """Round x [..., K] to MXFP4 with this package."""
    w = mx.quantize(jnp.asarray(x, jnp.float32), rule)
    return np.asarray(mx.dequantize(w, jnp.float32), np.float64)


def hadamard(n: int) -> Array:
    """Return the orthonormal Sylvester-Hadamard matrix of order n, a power of two."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def rotated(x: Array, rule: str) -> Array:
    """As `packed`, in the basis of a Hadamard matrix on every block of 32."""
    h = hadamard(BLOCK)
    blocks = x.reshape(-1, BLOCK) @ h
    return (packed(blocks, rule) @ h).reshape(x.shape)


def scale_rules() -> dict:
    """SQNR of every scale rule on every distribution: the median of `SEEDS` draws."""
    table = {}
    for name, draw in DISTRIBUTIONS.items():
        rows: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            x = draw(np.random.default_rng(seed)) * octave(SHAPE[0])
            for rule in SCALE_RULES:
                rows.setdefault(rule, []).append(sqnr(x, packed(x, rule)))
            rows.setdefault("Hadamard 32 + mse", []).append(sqnr(x, rotated(x, "mse")))
        table[name] = {rule: round(float(np.median(v)), 2) for rule, v in rows.items()}
    return table


def position_in_octave() -> dict:
    """SQNR of Gaussian rows against the fractional part of log2 of their deviation."""
    x = np.random.default_rng(0).standard_normal(SHAPE)
    fractions = np.linspace(0, 1, 33)
    curves = {
        rule: [round(sqnr(2.0**f * x, packed(2.0**f * x, rule)), 3) for f in fractions]
        for rule in SCALE_RULES
    }
    return {"fraction": fractions.tolist(), **curves}


def gaussian_error() -> dict:
    """How elements of Gaussian data are hit, per scale rule."""
    x = np.random.default_rng(0).standard_normal(SHAPE) * octave(SHAPE[0])
    table = {}
    for rule in SCALE_RULES:
        w = mx.quantize(jnp.asarray(x, jnp.float32), rule)
        y = np.asarray(mx.dequantize(w, jnp.float32), np.float64)
        ratio = np.abs(x) / np.repeat(2.0 ** (np.asarray(w.scales, float) - 127), BLOCK, axis=-1)
        table[rule] = {
            "relative RMS error": round(float(np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2))), 4),
            "shrink <y,x>/<x,x>": round(float(np.sum(x * y) / np.sum(x * x)), 4),
            "saturated %": round(100 * float(np.mean(ratio > 6)), 2),
            "rounded to zero %": round(100 * float(np.mean(y == 0)), 2),
            "mean of elements' relative error %": round(
                100 * float(np.mean(np.abs(x - y) / np.abs(x))), 1
            ),
        }
    return table


def with_scale_format(x: Array, block: int, mantissa_bits: int | None) -> Array:
    """Round x to E2M1 with blocks and scales of any kind.

    Args:
      x: float64 [N, K].
      block: elements that share a scale.
      mantissa_bits: explicit mantissa bits of the scale, of unlimited range; None is exact.
        0 uses the rule `even`, more round amax / 6 to the nearest scale.
    """
    blocks = x.reshape(-1, block)
    amax = np.max(np.abs(blocks), axis=1, keepdims=True)
    if mantissa_bits is None:
        scale = amax / 6
    elif mantissa_bits == 0:
        fraction, exponent = np.frexp(amax)  # amax = fraction * 2**exponent, fraction in [1/2, 1)
        scale = 2.0 ** (exponent - 3 + (fraction >= 7 / 8))
    else:
        fraction, exponent = np.frexp(amax / 6)
        steps = 2.0 ** (mantissa_bits + 1)
        scale = np.ldexp(np.round(fraction * steps) / steps, exponent)
    elements = np.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return (elements * scale).reshape(x.shape)


def block_sizes() -> dict:
    """SQNR and bits per weight of E2M1 with other block sizes and scale formats."""
    formats = {"E8M0": (0, 8), "2 mantissa bits (E5M2)": (2, 8), "3 mantissa bits (E4M3)": (3, 8)}
    formats["float32"] = (None, 32)
    table = {}
    for name in ("Gaussian", "Student t, 5 degrees"):
        x = DISTRIBUTIONS[name](np.random.default_rng(0)) * octave(SHAPE[0])
        table[name] = {
            f"{scale}, block {block}": {
                "bits": 4 + bits / block,
                "SQNR dB": round(sqnr(x, with_scale_format(x, block, mantissa)), 2),
            }
            for scale, (mantissa, bits) in formats.items()
            for block in (16, 32, 64, 128)
        }
    return table


def accumulation() -> dict:
    """RMS error of dot products by how they are summed, relative to the RMS of the results."""
    generator = np.random.default_rng(0)
    table = {}
    for k in (512, 2880, 16384):
        x = generator.standard_normal((128, k)).astype(ml_dtypes.bfloat16).astype(np.float32)
        w = packed(generator.standard_normal((128, k)) / np.sqrt(k), "even").astype(np.float32)
        products = x * w
        exact = np.sum(products, axis=1, dtype=np.float64)
        sums = {}
        for name, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
            total = np.zeros(len(x), dtype)
            for column in products.T:
                total = (total.astype(np.float32) + column).astype(dtype)
            sums[name] = total
        inside = np.zeros((len(x), k // BLOCK), np.float16)
        for column in np.moveaxis(products.reshape(len(x), -1, BLOCK), 2, 0):
            inside = (inside.astype(np.float32) + column).astype(np.float16)
        total = np.zeros(len(x), np.float32)
        for column in inside.T:
            total = total + column.astype(np.float32)
        sums["float16 in a block, float32 across"] = total
        total = np.zeros(len(x), np.float32)
        for column in products.T:
            total = total + column
        sums["float32"] = total
        rms = np.sqrt(np.mean(exact**2))
        table[f"K = {k}"] = {
            name: float(f"{np.sqrt(np.mean((s.astype(np.float64) - exact) ** 2)) / rms:.1e}")
            for name, s in sums.items()
        }
    return table


def depth() -> dict:
    """Relative error of hidden states, layer by layer, in random pre-norm multilayer networks.

    One layer is h = W2 relu(W1 norm(x)) with width 256 and 1024 hidden units, all weights in
    MXFP4 (`even`); with a residual stream x + h, and without one.
    """
    width, hidden, layers, tokens = 256, 1024, 32, 256
    result = {}
    for residual in (True, False):
        generator = np.random.default_rng(0)
        x = y = generator.standard_normal((tokens, width))
        errors = []
        for _ in range(layers):
            w1 = generator.standard_normal((hidden, width)) * np.sqrt(2 / width)
            w2 = generator.standard_normal((width, hidden)) / np.sqrt(hidden)
            x = _layer(x, w1, w2, residual)
            y = _layer(y, packed(w1, "even"), packed(w2, "even"), residual)
            errors.append(round(float(np.linalg.norm(y - x) / np.linalg.norm(x)), 4))
        result["with residual stream" if residual else "without"] = errors
    return result


def _layer(x: Array, w1: Array, w2: Array, residual: bool) -> Array:
    norm = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    return np.maximum(norm @ w1.T, 0) @ w2.T + (x if residual else 0)


def attention() -> dict:
    """One random attention head of 64 with all three projections in MXFP4 (`even`).

    Queries are multiplied so that the logits have the given standard deviation. `KL` is between
    the attention distributions, in nats; output SQNR is in dB.
    """
    width, head, queries = 512, 64, 64
    generator = np.random.default_rng(0)
    wq, wk, wv = (generator.standard_normal((head, width)) / np.sqrt(width) for _ in range(3))
    table = {}
    for keys, deviation in (*((1024, d) for d in (0.5, 1, 2, 4)), (8192, 1), (32768, 1)):
        x = generator.standard_normal((keys, width))
        logits = (x[-queries:] @ wq.T) @ (x @ wk.T).T
        factor = deviation / np.std(logits)
        approximate = (x[-queries:] @ packed(wq, "even").T) @ (x @ packed(wk, "even").T).T
        log_p, log_q = _log_softmax(factor * logits), _log_softmax(factor * approximate)
        p, q = np.exp(log_p), np.exp(log_q)
        out = sqnr(p @ (x @ wv.T), q @ (x @ packed(wv, "even").T))
        table[f"{keys} keys, deviation {deviation:g}"] = {
            "KL": float(f"{np.mean(np.sum(p * (log_p - log_q), axis=1)):.2g}"),
            "same largest weight %": round(100 * float(np.mean(p.argmax(1) == q.argmax(1))), 1),
            "output SQNR dB": round(out, 1),
        }
    return table


def _log_softmax(z: Array) -> Array:
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))


def xla_cpu() -> dict:
    """How often natural ways to decode or to choose a scale are wrong on XLA's CPU backend."""
    with jax.default_device(jax.devices("cpu")[0]):
        byte = np.arange(255)
        code = np.array(E2M1_VALUES[:8])
        with np.errstate(over="ignore"):  # bytes 253 and 254 go beyond float32, to Inf
            exact = np.ldexp(code, byte[:, None] - 127).astype(np.float32)

        power = jax.jit(lambda s: jnp.exp2(s - np.float32(127)))(byte.astype(np.float32))
        product = jax.jit(jnp.multiply)(
            code.astype(np.float32), np.ldexp(np.float32(1), byte - 127).astype(np.float32)[:, None]
        )
        shifted = jax.jit(lambda s: lax.bitcast_convert_type(s << np.uint32(23), jnp.float32))(
            byte.astype(np.uint32)
        )
        exponent = np.arange(-126, 128)
        below = np.nextafter(np.ldexp(np.float32(1), exponent).astype(np.float32), np.float32(0))
        log2 = jax.jit(lambda x: jnp.floor(jnp.log2(x)))
        normal = below >= np.finfo(np.float32).tiny
        return {
            "scales that jnp.exp2(s - 127) gets wrong, of 255": _wrong(power, exact[:, 2]),
            "scales that (s << 23) as float32 gets wrong, of 255": _wrong(shifted, exact[:, 2]),
            "cells that code * 2^(s - 127) gets wrong, of 2040": _wrong(product, exact),
            "numbers just below 2^n whose floor(log2) is wrong, of 253": _wrong(
                log2(below[normal]), exponent[normal] - 1
            ),
            "cells that mx.dequantize gets wrong, of 2040": _wrong(_decoded_cells(), exact),
        }


def _wrong(found: jax.Array, exact: Array) -> int:
    return int(np.sum(np.asarray(found, np.float64) != exact.astype(np.float64)))


def _decoded_cells() -> Array:
    """Decode all magnitudes under all scale bytes but NaN: float32 [255, 8]."""
    blocks = np.tile(np.array([0x10, 0x32, 0x54, 0x76] * 4, np.uint8), (255, 1, 1))
    w = mx.MXFP4Array(blocks, np.arange(255, dtype=np.uint8)[:, None])
    return np.asarray(mx.dequantize(w, jnp.float32))[:, :8]


def main() -> None:
    """Measure everything and write the JSON file."""
    results = {
        "date": "2026-11-22",
        "scale_rules": scale_rules(),
        "position_in_octave": position_in_octave(),
        "gaussian_error": gaussian_error(),
        "block_sizes": block_sizes(),
        "accumulation": accumulation(),
        "depth": depth(),
        "attention": attention(),
        "jax": jax.__version__,
        "xla_cpu": xla_cpu(),
    }
    (FOLDER / "precision.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
