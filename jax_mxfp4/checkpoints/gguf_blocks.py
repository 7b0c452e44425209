"""Block formats of GGUF files as bytes: MXFP4 to and from ours, Q8_0 to float32.

A GGUF block of MXFP4 is 17 bytes: the E8M0 scale, then 16 bytes of codes, of which byte j holds
element j in its low and element j + 16 in its high nibble (ggml `block_mxfp4`). Ours pairs
elements 2j and 2j + 1. Both hold the same codes and the same scale, so that repacking is lossless.
"""

import numpy as np

from jax_mxfp4.format import BLOCK_BYTES

MXFP4_BYTES = 1 + BLOCK_BYTES
"""Bytes of one MXFP4 block in a GGUF file."""

# One block as numbers: the scale, codes of bytes 0 to 7, codes of bytes 8 to 15.
_BLOCK = np.dtype([("scale", "u1"), ("first", "<u8"), ("second", "<u8")])
_WORD = np.dtype("<u8")
# Blocks that are converted at a time, so that the words in between stay in the cache.
_CHUNK = 2**15
_NIBBLES, _BYTES, _PAIRS, _HALF = (
    np.uint64(mask)
    for mask in (0x0F0F0F0F0F0F0F0F, 0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF)
)
_SHIFTS = tuple(np.uint64(bits) for bits in (4, 8, 16, 32))


def unpack_mxfp4(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks uint8 [..., G, 16] and scales uint8 [..., G] of `raw` uint8 [..., G, 17]."""
    stored = np.ascontiguousarray(raw).reshape(-1).view(_BLOCK)
    words = np.empty((stored.size, 2), _WORD)
    for start in range(0, stored.size, _CHUNK):
        rows = slice(start, start + _CHUNK)
        first, second = (stored[name][rows].copy() for name in ("first", "second"))
        # Low nibbles are elements 0 to 15, the first half of our block; high nibbles the others.
        words[rows, 0] = _gather(first) | _gather(second) << _SHIFTS[3]
        first >>= _SHIFTS[0]
        second >>= _SHIFTS[0]
        words[rows, 1] = _gather(first) | _gather(second) << _SHIFTS[3]
    return words.view(np.uint8).reshape(*raw.shape[:-1], BLOCK_BYTES), raw[..., 0].copy()


def pack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return uint8 [..., G, 17] of blocks [..., G, 16] and scales [..., G]: the inverse."""
    words = np.ascontiguousarray(blocks).reshape(-1).view(_WORD).reshape(-1, 2)
    stored = np.empty(scales.size, _BLOCK)
    stored["scale"] = scales.reshape(-1)
    for start in range(0, stored.size, _CHUNK):
        rows = slice(start, start + _CHUNK)
        low, high = (words[rows, half].copy() for half in (0, 1))
        stored["first"][rows] = _spread(low & _HALF) | _spread(high & _HALF) << _SHIFTS[0]
        low >>= _SHIFTS[3]
        high >>= _SHIFTS[3]
        stored["second"][rows] = _spread(low) | _spread(high) << _SHIFTS[0]
    return stored.view(np.uint8).reshape(*scales.shape, MXFP4_BYTES)


def _gather(words: np.ndarray) -> np.ndarray:
    """Move the low nibbles of the 8 bytes of each word next to each other: 4 bytes."""
    words = words & _NIBBLES
    for shift, mask in zip(_SHIFTS, (_BYTES, _PAIRS, _HALF), strict=False):
        words |= words >> shift
        words &= mask
    return words


def _spread(words: np.ndarray) -> np.ndarray:
    """Move the 8 nibbles of the low 4 bytes of each word into bytes of their own."""
    for shift, mask in zip(_SHIFTS[2::-1], (_PAIRS, _BYTES, _NIBBLES), strict=True):
        words = words | words << shift
        words &= mask
    return words


def dequantize_q8_0(raw: np.ndarray) -> np.ndarray:
    """Return float32 [..., 32 * G] of Q8_0 blocks uint8 [..., G, 34]: scale x value, rounded once.

    A block is a float16 scale and 32 int8 values. Source: ggml `dequantize_row_q8_0`.
    """
    scales = np.ascontiguousarray(raw[..., :2]).view("<f2").astype(np.float32)
    values = np.ascontiguousarray(raw[..., 2:]).view(np.int8).astype(np.float32)
    values *= scales
    return values.reshape(*raw.shape[:-2], raw.shape[-2] * 32)
