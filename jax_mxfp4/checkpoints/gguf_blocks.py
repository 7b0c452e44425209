"""Block formats of GGUF files as bytes: MXFP4 to and from ours, Q8_0 to float32.

A GGUF block of MXFP4 is 17 bytes: the E8M0 scale, then 16 bytes of codes, of which byte j holds
element j in its low and element j + 16 in its high nibble (ggml `block_mxfp4`). Ours pairs
elements 2j and 2j + 1. Both hold the same codes and the same scale, so that repacking is lossless.
"""

import numpy as np

from jax_mxfp4.format import BLOCK_BYTES

MXFP4_BYTES = 1 + BLOCK_BYTES
"""Bytes of one MXFP4 block in a GGUF file."""

_BLOCK = np.dtype([("scale", "u1"), ("codes", f"V{BLOCK_BYTES}")])
# Neighbouring bytes, and half a block of ours.
_PAIR, _HALF = np.dtype("<u2"), np.dtype("<u8")
# Blocks that are converted at a time, so that what is made of them on the way stays in the cache.
_CHUNK = 2**14
_LOW_NIBBLES, _NIBBLE_BITS = np.uint16(0x0F0F), np.uint16(4)


def unpack_mxfp4(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks uint8 [..., G, 16] and scales uint8 [..., G] of `raw` uint8 [..., G, 17]."""
    stored = np.ascontiguousarray(raw).reshape(-1).view(_BLOCK)
    halves = np.empty((stored.size, 2), _HALF)
    for start in range(0, stored.size, _CHUNK):
        rows = slice(start, start + _CHUNK)
        pairs = stored["codes"][rows].copy().view(_PAIR)
        # Low nibbles are elements 0 to 15, the first half of our block; high nibbles the others.
        halves[rows, 0] = _gather(pairs)
        pairs >>= _NIBBLE_BITS
        halves[rows, 1] = _gather(pairs)
    return halves.view(np.uint8).reshape(*raw.shape[:-1], BLOCK_BYTES), raw[..., 0].copy()


def pack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return uint8 [..., G, 17] of blocks [..., G, 16] and scales [..., G]: the inverse."""
    halves = np.ascontiguousarray(blocks).reshape(-1).view(_HALF).reshape(-1, 2)
    stored = np.empty(scales.size, _BLOCK)
    stored["scale"] = scales.reshape(-1)
    for start in range(0, stored.size, _CHUNK):
        rows = slice(start, start + _CHUNK)
        low, high = (_spread(halves[rows, half].copy()) for half in (0, 1))
        high <<= _NIBBLE_BITS
        low |= high
        stored["codes"][rows] = low.view(_BLOCK["codes"])
    return stored.view(np.uint8).reshape(*scales.shape, MXFP4_BYTES)


def _gather(pairs: np.ndarray) -> np.ndarray:
    """Return half a block for 8 pairs of bytes: of each pair the two low nibbles as one byte."""
    pairs = pairs & _LOW_NIBBLES
    pairs |= pairs >> _NIBBLE_BITS
    return pairs.astype(np.uint8).view(_HALF)  # the upper bytes are dropped


def _spread(halves: np.ndarray) -> np.ndarray:
    """Return 8 pairs of bytes for half a block: of each byte the two nibbles as low ones."""
    pairs = halves.view(np.uint8).astype(_PAIR)
    pairs |= pairs << _NIBBLE_BITS
    pairs &= _LOW_NIBBLES
    return pairs


def dequantize_q8_0(raw: np.ndarray) -> np.ndarray:
    """Return float32 [..., 32 * G] of Q8_0 blocks uint8 [..., G, 34]: scale x value, rounded once.

    A block is a float16 scale and 32 int8 values. Source: ggml `dequantize_row_q8_0`.
    """
    scales = np.ascontiguousarray(raw[..., :2]).view("<f2").astype(np.float32)
    values = np.ascontiguousarray(raw[..., 2:]).view(np.int8).astype(np.float32)
    values *= scales
    return values.reshape(*raw.shape[:-2], raw.shape[-2] * 32)
