// Bit facts of MXFP4 (OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4.1). The only device
// code that knows the format.
//
//   E2M1 code   s e e m        bias 1, magnitudes 0 .5 1 1.5 2 3 4 6, no Inf, no NaN
//   E8M0 scale  2^(byte - 127) byte 255 is NaN; there is no zero
//   block       32 codes in 16 bytes (element 2j in the low nibble of byte j) and one scale byte
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_mxfp4 {

constexpr int kBlockSize = 32;   // elements that share one scale
constexpr int kBlockBytes = 16;  // their codes

__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  __nv_bfloat162 product =
      __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
  return reinterpret_cast<uint32_t&>(product);
}

// A scale as bf16 multipliers for codes that still carry the exponent bias of a raw bf16 (see
// raw_pair). Code bits placed into a bf16 read as value * 2^-126, so the multiplier is
// 2^(byte - 127 + 126). That overflows bf16 from byte 129 on; there the factor is split in two.
// Released checkpoints hold bytes near 120, so the second product is left to a rare path, which a
// warp takes or leaves as a whole: a branch per lane would cut the decoding into small blocks.
struct ScaleFactor {
  uint32_t first;   // bf16x2, both halves alike
  uint32_t second;  // bf16x2; one unless is_wide
};

constexpr uint32_t kLargestNarrow = 128;  // scale bytes up to here need one factor

__device__ __forceinline__ bool is_wide(uint32_t byte) { return byte - 129u < 126u; }

__device__ __forceinline__ ScaleFactor scale_factor(uint32_t byte) {
  uint32_t exponent = min(byte + 126u, 254u);
  uint32_t first = byte == 255u ? 0x7fc0u : exponent << 7;
  uint32_t second = is_wide(byte) ? (byte - 1u) << 7 : 0x3f80u;  // 2^(byte - 128)
  return {first * 0x00010001u, second * 0x00010001u};
}

// The factor of a scale that is not wide, without the cases of scale_factor: two operations fewer
// in loops that have already asked whether any scale is beyond 128.
__device__ __forceinline__ uint32_t narrow_factor(uint32_t byte) {
  return byte * 0x00800080u + 126u * 0x00800080u;
}

// The prepared layout, which `prepare` of the Python package makes of canonical blocks once: word c
// of a block's four holds the elements 8p + 2c in its lower half and 8p + 2c + 1 in its upper one,
// p = 0 .. 3, their bits s, e1, e0, m at these places of the half:
//
//   p = 0   15, 8, 7, 6            a bf16 keeps its sign at bit 15, and at 8..6 the end of its
//   p = 1   12, 5, 4, 3            exponent and the top of its mantissa: one AND, or a shift
//   p = 2    9, 2, 1, 0            and an AND, for two elements
//   p = 3   14, 13, 10, 11, where bit 13 is e1 ^ m
//
// What the first three leave free for p = 3 is not the same pattern. Shifted right by 5, its bits
// are 9 (s), 8 (e1 ^ m), 6 (m) and 5 (e0); the product with 1 + 4 + 64 adds them two and six places
// higher: e0 comes to 7, s to 15, and at 8 the second m restores e1. Carries go no further than
// from 8 to 13, where nothing is added.
//
// Word c is what lane c of a quad needs of a tensor-core operand whose K has its natural order. The
// result, a bf16 pair, reads as value * 2^-126.
constexpr uint32_t kRawBits = 0x81c081c0u;
constexpr uint32_t kLastShift = 5, kLastBits = 0x03600360u, kLastFactor = 1 + 4 + 64;  // p = 3

template <int kGroup>
__device__ __forceinline__ uint32_t raw_pair(uint32_t word) {
  static_assert(kGroup >= 0 && kGroup < 4);
  if constexpr (kGroup < 3)
    return (word << (3 * kGroup)) & kRawBits;
  else
    return ((word >> kLastShift & kLastBits) * kLastFactor) & kRawBits;
}

// Two elements, exactly.
template <int kGroup, bool kWide>
__device__ __forceinline__ uint32_t decode_pair(uint32_t word, const ScaleFactor& scale) {
  const uint32_t pair = mul_bf16x2(raw_pair<kGroup>(word), scale.first);
  return kWide ? mul_bf16x2(pair, scale.second) : pair;
}

// Elements 8p .. 8p + 7 of a block, in pairs.
template <int kGroup, bool kWide>
__device__ __forceinline__ void decode_group(const uint4& block, const ScaleFactor& scale,
                                             uint32_t (&out)[4]) {
  out[0] = decode_pair<kGroup, kWide>(block.x, scale);
  out[1] = decode_pair<kGroup, kWide>(block.y, scale);
  out[2] = decode_pair<kGroup, kWide>(block.z, scale);
  out[3] = decode_pair<kGroup, kWide>(block.w, scale);
}

__device__ __forceinline__ float e8m0_to_float(uint32_t byte) {
  if (byte == 0u) return __uint_as_float(0x00400000u);    // 2^-127, a subnormal
  if (byte == 255u) return __uint_as_float(0x7fc00000u);  // NaN
  return __uint_as_float(byte << 23);
}

}  // namespace jax_mxfp4
