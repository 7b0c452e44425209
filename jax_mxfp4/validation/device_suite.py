"""The numerical suite that is run on one device to be compared with another.

Operands come from a seeded generator and are the same everywhere; expected results are computed
here in float64 from the definitions, without the code under test.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_mxfp4 import ops
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.format import E2M1_VALUES, E8M0_BIAS, E8M0_NAN, unpack_codes
from jax_mxfp4.quantize import ScaleRule, quantize

DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))

_ALPHA, _LIMIT = 1.702, 7.0


@dataclass(frozen=True)
class Case:
    """One computation.

    Attributes:
      name: what it is, with its sizes.
      dtype: of the floating-point operands and the result.
      run: implementation -> the result.
      expected: computes the exact result, float64; None where bits are all that is compared.
    """

    name: str
    dtype: str
    run: Callable[[ops.Implementation], Any]
    expected: Callable[[], np.ndarray] | None


def cases(seed: int = 0) -> Iterator[Case]:
    """Yield the suite: decoding, row gathers, products and experts in each dtype, scale rules."""
    rng = np.random.default_rng(seed)
    table = MXFP4Array(*_decode_table())
    weight, experts = _weight(rng, 512, 2880), _experts(rng)
    ids = rng.integers(-512, 512, 64, np.int32)
    activations = rng.standard_normal((256, 2880))
    hidden = rng.standard_normal((64, experts[0].shape[-1]))
    for dtype in DTYPES:
        decode = partial(ops.dequantize, table, dtype)
        yield _case("dequantize, all scales x codes", dtype, decode, partial(_decode, table))
        take = partial(ops.take, weight, ids, dtype=dtype)
        yield _case("take 64 of [512, 2880]", dtype, take, lambda: _decode(weight)[ids])
        for rows in (1, 16, 256):
            x = activations[:rows].astype(dtype)
            expected = partial(_matmul, x, weight)
            product = partial(ops.matmul, x, weight)
            yield _case(f"matmul [{rows}, 2880] x [512, 2880]", dtype, product, expected)
        for tokens in (1, 64):
            x = hidden[:tokens].astype(dtype)
            routing = _routing(rng, tokens, experts[0].shape[0])
            moe = partial(ops.moe, x, *routing, experts[0], None, experts[1], None)
            yield _case(f"moe {tokens} tokens", dtype, moe, partial(_moe, x, *routing, *experts))
    for rule in get_args(ScaleRule):
        packed = partial(_quantized_bytes, activations.astype(np.float32), rule)
        yield Case(f"quantize {rule}", "uint8", lambda _, packed=packed: packed(), None)


def _case(
    name: str,
    dtype: np.dtype,
    operation: Callable[..., Any],
    expected: Callable[[], np.ndarray],
) -> Case:
    def run(implementation: ops.Implementation) -> Any:
        return operation(implementation=implementation)

    return Case(name, str(dtype), run, expected)


def _decode_table() -> tuple[np.ndarray, np.ndarray]:
    """All 256 scale bytes with all 16 codes: blocks [256, 1, 16], scales [256, 1]."""
    pairs = np.arange(0, 16, 2, dtype=np.uint8)
    codes = np.tile(pairs | (pairs + 1) << 4, 2).astype(np.uint8)
    return np.tile(codes, (256, 1, 1)), np.arange(256, dtype=np.uint8)[:, None]


def _weight(rng: np.random.Generator, *shape: int) -> MXFP4Array:
    """Random codes with scales around 2^-5, as in a trained layer."""
    *leading, k = shape
    blocks = rng.integers(0, 256, (*leading, k // 32, 16), np.uint8)
    return MXFP4Array(blocks, rng.integers(119, 125, (*leading, k // 32), np.uint8))


def _experts(rng: np.random.Generator) -> tuple[MXFP4Array, MXFP4Array]:
    return _weight(rng, 8, 512, 256), _weight(rng, 8, 256, 256)


def _routing(rng: np.random.Generator, tokens: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Four distinct experts for each token and their weights, which sum to one."""
    ids = np.argsort(rng.random((tokens, experts)), axis=-1)[:, :4].astype(np.int32)
    weights = rng.random((tokens, 4))
    return ids, (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def _decode(w: MXFP4Array) -> np.ndarray:
    """Exact values, float64 [..., K]."""
    values = np.array(E2M1_VALUES)[unpack_codes(w.blocks)].reshape(*w.scales.shape, -1)
    values = np.ldexp(values, w.scales.astype(np.int32)[..., None] - E8M0_BIAS)
    return np.where(w.scales[..., None] == E8M0_NAN, np.nan, values).reshape(w.shape)


def _matmul(x: np.ndarray, w: MXFP4Array) -> np.ndarray:
    return x.astype(np.float64) @ _decode(w).T


def _moe(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate_up: MXFP4Array, down: MXFP4Array
) -> np.ndarray:
    """The expert layer of `jax_mxfp4.moe`, in float64 but for the rounding of `hidden`."""
    out = np.zeros(x.shape)
    wide = x.astype(np.float64)
    gate_ups, downs = _decode(gate_up), _decode(down)
    for token, chosen in enumerate(ids):
        for expert, weight in zip(chosen, weights[token], strict=True):
            gu = gate_ups[expert] @ wide[token]
            gate, up = np.minimum(gu[0::2], _LIMIT), np.clip(gu[1::2], -_LIMIT, _LIMIT)
            hidden = gate / (1 + np.exp(-_ALPHA * gate)) * (up + 1)
            out[token] += weight * (downs[expert] @ hidden.astype(x.dtype).astype(np.float64))
    return out


def _quantized_bytes(x: np.ndarray, rule: ScaleRule) -> np.ndarray:
    packed = quantize(jnp.asarray(x), rule)
    return np.concatenate([np.asarray(packed.blocks), np.asarray(packed.scales)[..., None]], -1)
