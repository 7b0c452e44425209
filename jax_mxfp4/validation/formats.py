"""Formats for weights that MXFP4 is compared with, each as a rounding of float32 values.

A format here is a "fake quantizer": it answers with the values that would be read back from
storage, and says how many bits that storage takes. Matrices are [..., N, K], contracted along K,
which is also the axis of blocks. "Per tensor" means per matrix, so that each expert of a stack
[E, N, K] has its own scale.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_mxfp4.format import decode
from jax_mxfp4.quantize import SCALE_RULES, quantize
from jax_mxfp4.validation.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, Minifloat
from jax_mxfp4.validation.q4_k import SUPERBLOCK, round_q4_k

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Format:
    """A storage format for weights.

    Attributes:
      name: as on the command line.
      source: where its definition is from.
      block: the length of rows must be a multiple of this.
      bits: shape -> bits of storage for a weight, scales included.
      values: float32 [..., N, K] -> the float32 values that are read back; use `round`.
    """

    name: str
    source: str
    block: int
    bits: Callable[[Shape], float]
    values: Callable[[np.ndarray], np.ndarray]

    def why_not(self, shape: Shape) -> str | None:
        """Return why a matrix of `shape` cannot be stored in this format, or None."""
        if shape[-1] % self.block == 0:
            return None
        return f"rows of {shape[-1]} are not a multiple of {self.block}"

    def round(self, x: np.ndarray) -> np.ndarray:
        """Return what is read back after storing `x`.

        Args:
          x: float32 [..., N, K], finite.

        Returns:
          float32 [..., N, K].

        Raises:
          ValueError: `x` cannot be stored, or is not finite.
        """
        reason = self.why_not(x.shape)
        if reason is None and not np.isfinite(x).all():
            reason = "it has values that are not finite"
        if reason is not None:
            raise ValueError(f"x {list(x.shape)} cannot be stored as {self.name}: {reason}")
        return self.values(np.asarray(x, np.float32))


def _blocks(x: np.ndarray, size: int) -> np.ndarray:
    """View [..., K] as [..., ceil(K / size), size]; a last block that is short ends in zeros."""
    if missing := -x.shape[-1] % size:
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], -1, size)


def _unblocks(blocks: np.ndarray, shape: Shape) -> np.ndarray:
    return blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]


def _amax(x: np.ndarray, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    return np.max(np.abs(x), axis=axis, keepdims=True)


def _divide(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x / scale, where zeros have a scale of zero."""
    return x / np.where(scale == 0, np.float32(1), scale)


def _scaled_float(element: Minifloat, axis: int | tuple[int, ...]) -> Callable:
    """A float32 scale maps the largest magnitude along `axis` to the element's largest."""

    def values(x: np.ndarray) -> np.ndarray:
        scale = _amax(x, axis) / np.float32(element.largest)
        return element.round(_divide(x, scale)) * scale

    return values


def _scaled_integer(bits: int, axis: int | tuple[int, ...]) -> Callable:
    """A float32 scale maps the largest magnitude along `axis` to the largest integer."""
    top = np.float32(2 ** (bits - 1) - 1)

    def values(x: np.ndarray) -> np.ndarray:
        scale = _amax(x, axis) / top
        return np.rint(_divide(x, scale)) * scale

    return values


def _int4(group: int) -> Callable:
    """Symmetric integers -7..7 with a float16 scale for each group of a row."""

    def values(x: np.ndarray) -> np.ndarray:
        blocks = _blocks(x, group)
        scale = (_amax(blocks) / np.float32(7)).astype(np.float16).astype(np.float32)
        # Clipped because the rounded scale can be a little too small.
        return _unblocks(np.clip(np.rint(_divide(blocks, scale)), -7, 7) * scale, x.shape)

    return values


def _mx(element: Minifloat) -> Callable:
    """Blocks of 32 with a power-of-two scale by the rule of OCP MX v1.0, section 6.3 (floor)."""

    def values(x: np.ndarray) -> np.ndarray:
        blocks = _blocks(x, 32)
        exponent = np.frexp(_amax(blocks))[1] - 1 - element.max_exponent
        scale = np.ldexp(np.float32(1), np.clip(exponent, -126, 127))
        return _unblocks(element.round(blocks / scale) * scale, x.shape)

    return values


def _mxfp4(scale_rule: str) -> Callable:
    def values(x: np.ndarray) -> np.ndarray:
        packed = quantize(jnp.asarray(x), scale_rule)  # pyright: ignore[reportArgumentType]
        return np.asarray(decode(packed.blocks, packed.scales, jnp.float32))

    return values


def _nvfp4(x: np.ndarray) -> np.ndarray:
    """Blocks of 16 with an E4M3 scale, and one float32 scale for the matrix."""
    top = np.float32(E4M3.largest * E2M1.largest)
    whole = _amax(x, (-2, -1))[..., None] / top
    blocks = _blocks(x, 16)
    scale = E4M3.round(_divide(_amax(blocks) / np.float32(E2M1.largest), whole)) * whole
    return _unblocks(E2M1.round(_divide(blocks, scale)) * scale, x.shape)


# The 16 values of NormalFloat4: quantiles of the normal distribution, scaled to [-1, 1].
NF4_VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def _nf4(x: np.ndarray) -> np.ndarray:
    """Blocks of 64 of a row, each with a float32 scale, rounded to the nearest of 16 quantiles."""
    blocks = _blocks(x, 64)
    scale = _amax(blocks)
    midpoints = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / np.float32(2)
    nearest = NF4_VALUES[np.searchsorted(midpoints, _divide(blocks, scale))]
    return _unblocks(nearest * scale, x.shape)


def _ggml(name: str) -> Callable:
    def values(x: np.ndarray) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize
        from gguf import quantize as encode

        kind = GGMLQuantizationType[name]
        return dequantize(encode(x, kind), kind).reshape(x.shape)

    return values


def _q4_k_or_q5_0(x: np.ndarray) -> np.ndarray:
    return _ggml("Q5_0")(x) if x.shape[-1] % SUPERBLOCK else round_q4_k(x)


def _per_block(element: float, scale: int, block: int) -> Callable[[Shape], float]:
    """Bits where each block of a row, also a short last one, has a scale."""
    return lambda shape: element + scale * -(-shape[-1] // block) / shape[-1]


def _per_row(element: int) -> Callable[[Shape], float]:
    return lambda shape: element + 32 / shape[-1]


def _per_tensor(element: float) -> Callable[[Shape], float]:
    return lambda shape: element + 32 / (shape[-1] * shape[-2])


_OCP = "OCP MX v1.0, sections 5.2 and 6.3"
_GGML = "ggml/src/ggml-quants.c, by the gguf package"
_MATRIX = (-2, -1)

_ALL = (
    Format(
        "bf16",
        "round to nearest even",
        1,
        lambda shape: 16.0,
        lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
    ),
    Format("int8-row", "symmetric, absmax", 1, _per_row(8), _scaled_integer(8, -1)),
    Format("int8-tensor", "symmetric, absmax", 1, _per_tensor(8), _scaled_integer(8, _MATRIX)),
    Format("fp8-row", "E4M3; arXiv 2209.05433", 1, _per_row(8), _scaled_float(E4M3, -1)),
    Format("fp8-tensor", "E4M3; arXiv 2209.05433", 1, _per_tensor(8), _scaled_float(E4M3, _MATRIX)),
    Format("mxfp8-e4m3", _OCP, 32, _per_block(8, 8, 32), _mx(E4M3)),
    Format("mxfp8-e5m2", _OCP, 32, _per_block(8, 8, 32), _mx(E5M2)),
    Format("mxfp6-e2m3", _OCP, 32, _per_block(6, 8, 32), _mx(E2M3)),
    Format("mxfp6-e3m2", _OCP, 32, _per_block(6, 8, 32), _mx(E3M2)),
    Format("q4_k", _GGML + " and q4_k.py", SUPERBLOCK, lambda shape: 4.5, round_q4_k),
    Format(
        "q4_k/q5_0",
        "Q4_K where rows are multiples of 256, else Q5_0, as llama.cpp falls back",
        32,
        lambda shape: 5.5 if shape[-1] % SUPERBLOCK else 4.5,
        _q4_k_or_q5_0,
    ),
    Format("q4_0", _GGML, 32, _per_block(4, 16, 32), _ggml("Q4_0")),
    Format(
        "nvfp4",
        "NVIDIA, Introducing NVFP4 for Efficient and Accurate Low-Precision Inference (2025)",
        16,
        lambda shape: _per_block(4, 8, 16)(shape) + _per_tensor(0)(shape),
        _nvfp4,
    ),
    Format("nf4", "QLoRA, arXiv 2305.14314, appendix E", 1, _per_block(4, 32, 64), _nf4),
    Format("int4-g32", "symmetric, absmax, float16 scale", 1, _per_block(4, 16, 32), _int4(32)),
    Format("int4-g128", "symmetric, absmax, float16 scale", 1, _per_block(4, 16, 128), _int4(128)),
    *(
        Format(f"mxfp4-{rule}", "jax_mxfp4.quantize", 32, _per_block(4, 8, 32), _mxfp4(rule))
        for rule in SCALE_RULES
    ),
)

FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
"""Every format by name, widest first."""
