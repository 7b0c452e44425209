"""Writes ../mx/encode_even_rceil.npz: answers of torchao (EVEN) and NVIDIA's headers (RCEIL).

Needs torch 2.13.0, torchao 0.18.0, numpy, g++ and the headers of CUDA 13.0:

    CUDA_HOME=/usr/local/cuda python gen_encode_even_rceil.py
"""

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

HERE = Path(__file__).resolve().parent
BLOCK = 32
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def with_ulps(bits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves magnitudes by -1, 0 or +1 unit in the last place and gives them random signs."""
    moved = bits.astype(np.int64) + rng.integers(-1, 2, bits.shape)
    return np.maximum(moved, 0).astype(bits.dtype)


def edge_blocks(rng, count, exponents, amax_units, bits_of, sign_bit):
    """Returns blocks whose amax is next to `amax_units` * 2**e and the rest next to midpoints."""
    scale = 2.0 ** rng.choice(exponents, (count, 1))
    values = rng.choice(MIDPOINTS, (count, BLOCK)) * scale
    # Half the blocks see the midpoints of the doubled scale.
    values[::2] *= 2
    amax = rng.choice(amax_units, (count, 1)) * scale
    values = np.where(values < amax, values, values / 8)
    values[:, :1] = amax
    bits = with_ulps(bits_of(values), rng)
    bits |= rng.integers(0, 2, bits.shape).astype(bits.dtype) << bits.dtype.type(sign_bit)
    return rng.permuted(bits, axis=1)


def float32_blocks(rng: np.random.Generator) -> np.ndarray:
    """Returns float32 bits, uint32 [n, 32]."""

    def bits_of(values):
        return np.minimum(values, np.finfo(np.float32).max).astype(np.float32).view(np.uint32)

    units = [4, 6, 6, 7, 7, 8, 5, 6.5, 7.5]
    special = np.zeros((12, BLOCK), np.float32)
    special[1] = -0.0
    special[2:] = rng.standard_normal((10, BLOCK))
    special[3:5, 7] = np.nan
    special[5, 3], special[6, 4] = np.inf, -np.inf
    special[7, :2] = np.inf, np.nan
    special[8] *= np.float32(2.0**126)
    special[8, 0] = np.finfo(np.float32).max
    special[9, 1] = -np.finfo(np.float32).max
    special[10] = 0
    special[10, 5] = np.float32(2.0**-149)
    special[11] *= np.float32(2.0**-140)
    random = rng.integers(0, 2**32, (96, BLOCK), dtype=np.uint32)
    # Bits 30..23 set would be a NaN in one block of eight.
    random &= np.where((random >> 23) & 0xFF == 0xFF, np.uint32(0xBFFFFFFF), np.uint32(0xFFFFFFFF))
    return np.concatenate([
        rng.standard_normal((128, BLOCK)).astype(np.float32).view(np.uint32),
        (rng.standard_normal((64, BLOCK)) * 2.0 ** rng.uniform(-120, 120, (64, 1)))
        .astype(np.float32).view(np.uint32),
        edge_blocks(rng, 288, np.arange(-118, 124), units, bits_of, 31),
        edge_blocks(rng, 64, np.arange(-130, -118), units, bits_of, 31),
        edge_blocks(rng, 32, np.arange(124, 126), units, bits_of, 31),
        random,
        special.view(np.uint32),
    ])  # fmt: skip


def bfloat16_blocks(rng: np.random.Generator) -> np.ndarray:
    """Returns bfloat16 bits, uint16 [n, 32]."""

    def bits_of(values):
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return tensor.view(torch.uint16).numpy()

    units = [4, 6, 6, 7, 7, 8, 5, 6.5, 7.5]
    random = rng.integers(0, 2**16, (128, BLOCK), dtype=np.uint16)
    random &= np.where((random >> 7) & 0xFF == 0xFF, np.uint16(0xBFFF), np.uint16(0xFFFF))
    return np.concatenate([
        bits_of(rng.standard_normal((384, BLOCK)) * 0.02),
        bits_of(rng.integers(-32, 33, (192, BLOCK)) / 4 * 2.0 ** rng.integers(-20, 20, (192, 1))),
        edge_blocks(rng, 320, np.arange(-118, 124), units, bits_of, 15),
        random,
    ])  # fmt: skip


def torchao_even(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    scale, packed = to_mx(x, torch.float4_e2m1fn_x2, BLOCK, ScaleCalculationMode.EVEN)
    packed = packed.view(torch.uint8).reshape(len(x), BLOCK // 2)
    return scale.view(torch.uint8).numpy().reshape(-1), packed.numpy()


def nvidia_rceil(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "nvidia_encode"
        include = Path(os.environ["CUDA_HOME"]) / "include"
        source = HERE / "nvidia_encode.cc"
        subprocess.run(
            ["g++", "-O2", "-std=c++17", f"-I{include}", str(source), "-o", str(program)],
            check=True,
        )
        output = subprocess.run([program], input=x.tobytes(), capture_output=True, check=True)
    blocks = np.frombuffer(output.stdout, np.uint8).reshape(len(x), 1 + BLOCK // 2)
    return blocks[:, 0], blocks[:, 1:]


def main() -> None:
    rng = np.random.default_rng(20261122)
    f32_bits, bf16_bits = float32_blocks(rng), bfloat16_blocks(rng)
    widened = bf16_bits.astype(np.uint32) << 16
    x = np.concatenate([f32_bits, widened]).view(np.float32)

    even_f32 = torchao_even(torch.from_numpy(f32_bits.view(np.float32)))
    even_bf16 = torchao_even(torch.from_numpy(bf16_bits.view(np.int16)).view(torch.bfloat16))
    rceil_scale, rceil_packed = nvidia_rceil(x)

    with np.errstate(invalid="ignore"):  # signalling NaNs
        amax = np.max(np.abs(x.astype(np.float64)), axis=1)
    finite = np.isfinite(amax)
    np.savez_compressed(
        HERE.parent / "mx" / "encode_even_rceil.npz",
        f32_bits=f32_bits,
        bf16_bits=bf16_bits,
        even_scale=np.concatenate([even_f32[0], even_bf16[0]]),
        even_packed=np.concatenate([even_f32[1], even_bf16[1]]),
        rceil_scale=rceil_scale,
        rceil_packed=rceil_packed,
        # Known deviations, decided from the input alone; the README gives the reasons.
        nan=np.isnan(amax),
        inf=np.isinf(amax),
        even_top=finite & (amax >= 7 * 2.0**125),
        rceil_top=finite & (amax > 6 * 2.0**125),
        even_byte0=finite & (amax > 0) & (amax < 7 * 2.0**-127),
        rceil_subnormal_quotient=finite
        & (amax > 6 * 2.0**-127)
        & (amax / 6 < 2.0**-127 + 2.0**-150),
    )


if __name__ == "__main__":
    main()
