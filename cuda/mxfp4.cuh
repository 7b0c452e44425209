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
// decode8). Code bits placed into a bf16 read as value * 2^-126, so the multiplier is
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

// Eight codes of one word -> four bf16x2 of exact products with the scale. The halves of a register
// hold elements four apart, because one AND and one shift then place both at once:
//   out[0] = {e0, e4}  out[1] = {e1, e5}  out[2] = {e2, e6}  out[3] = {e3, e7}
//
// A code's sign belongs to bit 15 and its e, e, m to bits 8..6, where bf16 keeps its exponent's end
// and mantissa's top: shifts by two amounts. With kMultiply one multiplication does both, on the
// FMA pipe; that wins where the logic pipe is the limit, and loses where multiplications already
// are.
template <bool kWide, bool kMultiply = false>
__device__ __forceinline__ void decode8(uint32_t word, const ScaleFactor& scale,
                                        uint32_t (&out)[4]) {
  const uint32_t upper = word >> 8;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    uint32_t raw;
    if (kMultiply) {
      const uint32_t codes = (i < 2 ? word : upper) & (i % 2 ? 0x00f000f0u : 0x000f000fu);
      raw = (codes * (i % 2 ? 0x0104u : 0x1040u)) & 0x81c081c0u;
    } else {
      const uint32_t codes = word << (12 - 4 * i);
      raw = (codes & 0x80008000u) | ((codes & 0x70007000u) >> 6);
    }
    out[i] = mul_bf16x2(raw, scale.first);
    if (kWide) out[i] = mul_bf16x2(out[i], scale.second);
  }
}

__device__ __forceinline__ float e8m0_to_float(uint32_t byte) {
  if (byte == 0u) return __uint_as_float(0x00400000u);    // 2^-127, a subnormal
  if (byte == 255u) return __uint_as_float(0x7fc00000u);  // NaN
  return __uint_as_float(byte << 23);
}

// Exact: the code's bits read as value * 2^-126 in f32, and both products are powers of two.
// Beyond the largest f32 the result is Inf (IEEE; the specification leaves it open).
__device__ __forceinline__ float e2m1_to_float(uint32_t code, float scale) {
  float raw = __uint_as_float(((code & 8u) << 28) | ((code & 7u) << 22));
  return (raw * 0x1p126f) * scale;
}

}  // namespace jax_mxfp4
