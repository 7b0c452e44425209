// What the GEMM kernels share: arguments, the order in which operands meet, scalar conversions.
//
// The weights are the 16-row operand A of mma.m16n8k16 and the tokens its 8 columns (B), so one
// token wastes nothing but columns. A product may permute K if both operands do it alike: lane
// (g, t) = (lane / 4, lane % 4) owns rows g and g + 8 and, of every chunk of 128 elements of K, the
// 32 of block t: 16 bytes of prepared codes (see mxfp4.cuh) and one scale for each row.
//
// clang-format off
//        K ->   block 0      block 1      block 2      block 3      (one chunk: 4 x 32 elements)
//   row g   [   lane t=0 |   lane t=1 |   lane t=2 |   lane t=3 ]   16 bytes each, straight to
//   row g+8 [   lane t=0 |   lane t=1 |   lane t=2 |   lane t=3 ]   registers
// clang-format on
//
// Group p of a block, its elements 8p .. 8p + 7, feeds two k16 steps; step s takes from each lane
// the elements 8p + 4s .. 8p + 4s + 3 as its k-slots {2t, 2t+1, 2t+8, 2t+9}. The token side reads
// the same elements of its own block t.
//
// f16 and f32 activations are split into two and three bf16 terms whose sum is exact, one MMA each:
// products with the (bf16-exact) weights are then exact too, for every scale byte, and there is no
// TF32 anywhere.
#pragma once

#include <atomic>
#include <utility>

#include "gemm_config.h"
#include "kernels.h"
#include "mxfp4.cuh"
#include "ptx.cuh"

namespace jax_mxfp4 {

constexpr int kChunk = 128;  // elements of K that one warp consumes per step

enum class Epilogue {
  kDense,   // out[m, n] = acc + bias
  kGateUp,  // hidden[row, n/2] = clamped SwiGLU of the row pair (2i, 2i+1)
  kDown,    // partial[row, n] = acc + bias, in f32
};

struct GemmArgs {
  const void* x;
  PackedWeights weights;  // grouped: those of expert 0
  Bias bias;
  void* out;
  DType out_type;  // kDense only
  int64_t m;       // rows of x
  int n, k;
  int tiles_n;  // tiled kernels only
  // Grouped epilogues only.
  int experts;
  const int32_t* tiles;  // {expert, first position, rows, unused} per token tile
  const int32_t* tile_count;
  const int32_t* sorted_pairs;  // position -> pair
  int top_k;
  float alpha, limit;
};

constexpr __host__ __device__ int size_of(DType type) { return type == DType::kF32 ? 4 : 2; }

__device__ __forceinline__ float load_shared_float(uint32_t shared, DType type, int i) {
  if (type == DType::kF32) return __uint_as_float(ptx::load_shared4(shared + 4 * i));
  const uint32_t word = ptx::load_shared4(shared + i / 2 * 4) >> (i % 2 * 16);
  return type == DType::kF16 ? __half2float(__ushort_as_half(uint16_t(word)))
                             : __uint_as_float(word << 16);
}

__device__ __forceinline__ float load_float(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::kBF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::kF16:
      return __half2float(static_cast<const __half*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

// Two values as f16 or bf16.
__device__ __forceinline__ uint32_t pack_pair(float a, float b, DType type) {
  if (type == DType::kF16) {
    const __half2 v = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(v);
  }
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(v);
}

__device__ __forceinline__ void store_float(void* data, DType type, int64_t i, float v) {
  switch (type) {
    case DType::kBF16:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(v);
      break;
    case DType::kF16:
      static_cast<__half*>(data)[i] = __float2half_rn(v);
      break;
    default:
      static_cast<float*>(data)[i] = v;
  }
}

// Four neighbours at once; the first is aligned to four.
__device__ __forceinline__ void store_four(void* data, DType type, int64_t first,
                                           const float (&v)[4]) {
  if (type == DType::kF32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + first) =
        make_float4(v[0], v[1], v[2], v[3]);
    return;
  }
  const uint2 words = {pack_pair(v[0], v[1], type), pack_pair(v[2], v[3], type)};
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + first) = words;
}

// GPT-OSS activation: gate is clamped from above only, up from both sides. NaN passes through,
// which fminf alone would swallow.
__device__ __forceinline__ float clamped_swiglu(float gate, float up, float alpha, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : (up < -limit ? -limit : up);
  return __fdividef(gate, 1.0f + __expf(-alpha * gate)) * (up + 1.0f);
}

// The high halves of two f32 as a bf16 pair: truncation, so that what remains is exact.
__device__ __forceinline__ uint32_t truncate_pair(float lo, float hi) {
  return __byte_perm(__float_as_uint(lo), __float_as_uint(hi), 0x7632);
}

// What truncation to bf16 left over. Inf and NaN are all in the first term.
__device__ __forceinline__ float remainder_of(float v) {
  uint32_t bits = __float_as_uint(v);
  float high = __uint_as_float(bits & 0xffff0000u);
  return (bits & 0x7f800000u) == 0x7f800000u ? 0.0f : v - high;
}

template <typename Act>
struct Activation;

// Eight neighbouring elements of one token as bf16 pairs, per exact term.
template <>
struct Activation<__nv_bfloat16> {
  static constexpr int kTerms = 1;
  static constexpr int kUnits = 1;  // 16-byte units of eight elements
  __device__ static void terms(const uint4 (&raw)[1], uint32_t (&out)[1][4]) {
    out[0][0] = raw[0].x;
    out[0][1] = raw[0].y;
    out[0][2] = raw[0].z;
    out[0][3] = raw[0].w;
  }
};

template <int kTerms>
__device__ __forceinline__ void split_terms(float (&v)[8], uint32_t (&out)[kTerms][4]) {
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[term][i] = truncate_pair(v[2 * i], v[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = remainder_of(v[i]);
  }
}

template <>
struct Activation<__half> {
  static constexpr int kTerms = 2;  // 8 + 3 significant bits
  static constexpr int kUnits = 1;
  __device__ static void terms(const uint4 (&raw)[1], uint32_t (&out)[2][4]) {
    const uint32_t words[4] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w};
    float v[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      v[2 * i] = pair.x;
      v[2 * i + 1] = pair.y;
    }
    split_terms(v, out);
  }
};

template <>
struct Activation<float> {
  static constexpr int kTerms = 3;  // 8 + 8 + 8 significant bits
  static constexpr int kUnits = 2;
  __device__ static void terms(const uint4 (&raw)[2], uint32_t (&out)[3][4]) {
    float v[8];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      v[4 * h + 0] = __uint_as_float(raw[h].x);
      v[4 * h + 1] = __uint_as_float(raw[h].y);
      v[4 * h + 2] = __uint_as_float(raw[h].z);
      v[4 * h + 3] = __uint_as_float(raw[h].w);
    }
    split_terms(v, out);
  }
};

// A position in a ring of barriers: which one, and the parity of its current phase.
template <int kSize>
struct Ring {
  int index = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++index == kSize) {
      index = 0;
      parity ^= 1;
    }
  }
};

// launch(c) for c of which c.value is `config`, among the configurations that kCompiled names:
// their kernels are what is compiled.
template <bool (*kCompiled)(const GemmConfig&), typename Launch, int... kConfigs>
cudaError_t launch_with(int config, const Launch& launch, std::integer_sequence<int, kConfigs...>) {
  cudaError_t error = cudaErrorInvalidValue;
  const auto attempt = [&](auto c) {
    if constexpr (kCompiled(kGemmConfigs[decltype(c)::value]))
      if (config == decltype(c)::value) error = launch(c);
  };
  (attempt(std::integral_constant<int, kConfigs>{}), ...);
  return error;
}
template <bool (*kCompiled)(const GemmConfig&), typename Launch>
cudaError_t launch_with(int config, const Launch& launch) {
  return launch_with<kCompiled>(config, launch, std::make_integer_sequence<int, kNumGemmConfigs>{});
}
template <GemmKind kKind>
constexpr bool is_kind(const GemmConfig& config) {
  return config.kind == kKind;
}

// More than 48 KB of shared memory is an opt-in per kernel and device: a host call, legal during
// stream capture, made once.
template <auto kKernel>
cudaError_t opt_in_shared_memory(int bytes) {
  static std::atomic<uint64_t> devices{0};
  int device;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (device < 64 && (devices.load() >> device & 1)) return cudaSuccess;
  if (cudaError_t error =
          cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  if (device < 64) devices.fetch_or(uint64_t(1) << device);
  return cudaSuccess;
}

// A thread block on each multiprocessor, all running at once, so that they may wait for each other.
template <auto kKernel, typename Args>
cudaError_t launch_cooperative(const Args& args, int threads, int shared_bytes, int multiprocessors,
                               cudaStream_t stream) {
  if (cudaError_t error = opt_in_shared_memory<kKernel>(shared_bytes)) return error;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = unsigned(multiprocessors);
  launch.blockDim = unsigned(threads);
  launch.dynamicSmemBytes = size_t(shared_bytes);
  launch.stream = stream;
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  launch.attrs = &cooperative;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, kKernel, args);
}

}  // namespace jax_mxfp4
