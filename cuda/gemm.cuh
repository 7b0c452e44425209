// Fused dequantize-GEMM on mma.sync: y = x * w^T with w packed, for sm_80 and later.
//
// The weights are the 16-row operand A of m16n8k16 and the tokens its 8 columns (B), so one token
// wastes nothing but columns. A product may permute K if both operands do it alike; that lets the
// canonical bytes be used as they lie. Lane (g, t) = (lane / 4, lane % 4) owns row g and, of every
// 128 elements of K, the 32 of block t: one 16-byte load and one scale.
//
// clang-format off
//        K ->   block 0      block 1      block 2      block 3      (one chunk: 4 x 32 elements)
//   row g   [   lane t=0 |   lane t=1 |   lane t=2 |   lane t=3 ]   16 bytes each, straight to
//   row g+8 [   lane t=0 |   lane t=1 |   lane t=2 |   lane t=3 ]   registers
// clang-format on
//
// Word i (elements 8i..8i+7) of a block feeds two k16 steps; step s takes from each lane the
// elements {8i+2s, 8i+4+2s, 8i+1+2s, 8i+5+2s} as its k-slots {2t, 2t+1, 2t+8, 2t+9} (the order that
// decode8 gives). The token side reads the same elements of its own block t from shared memory.
//
// f16 and f32 activations are split into two and three bf16 terms whose sum is exact, one MMA each:
// products with the (bf16-exact) weights are then exact too, for every scale byte, and there is no
// TF32 anywhere.
#pragma once

#include <atomic>
#include <type_traits>

#include "gemm_config.h"
#include "kernels.h"
#include "mxfp4.cuh"
#include "ptx.cuh"

namespace jax_mxfp4 {

constexpr int kChunk = 128;  // elements of K that one warp consumes per step

enum class Epilogue {
  kDense,   // out[m, n] = acc + bias
  kGateUp,  // hidden[row, n/2] = clamped SwiGLU of the row pair (2i, 2i+1)
  kDown,    // partial[pair, n] = routing weight * (acc + bias)
};

struct GemmArgs {
  const void* x;
  PackedWeights weights;  // grouped: those of expert 0
  Bias bias;
  void* out;
  DType out_type;  // kDense only
  int64_t m;       // rows of x; grouped: unused
  int n, k;
  int tiles_n;
  // Grouped epilogues only.
  const int32_t* tiles;         // {expert, first position, rows, unused} per token tile
  const int32_t* sorted_pairs;  // position -> pair
  const float* pair_weights;
  int top_k;
  float alpha, limit;
};

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

// GPT-OSS activation: gate is clamped from above only, up from both sides. NaN passes through,
// which fminf alone would swallow.
__device__ __forceinline__ float clamped_swiglu(float gate, float up, float alpha, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : (up < -limit ? -limit : up);
  return gate / (1.0f + expf(-alpha * gate)) * (up + 1.0f);
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

// Elements 8i..8i+7 of one token's block t as bf16 pairs in decode8's order, per exact term.
template <>
struct Activation<__nv_bfloat16> {
  static constexpr int kTerms = 1;
  static constexpr int kUnits = 1;  // 16-byte units of eight elements
  __device__ static void terms(const uint4 (&raw)[1], uint32_t (&out)[1][4]) {
    out[0][0] = __byte_perm(raw[0].x, raw[0].z, 0x5410);
    out[0][1] = __byte_perm(raw[0].x, raw[0].z, 0x7632);
    out[0][2] = __byte_perm(raw[0].y, raw[0].w, 0x5410);
    out[0][3] = __byte_perm(raw[0].y, raw[0].w, 0x7632);
  }
};

template <int kTerms>
__device__ __forceinline__ void split_terms(float (&v)[8], uint32_t (&out)[kTerms][4]) {
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[term][i] = truncate_pair(v[i], v[i + 4]);
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

// Activations of one chunk in shared memory: tile_m rows of 128 elements in 16-byte units. The XOR
// spreads the units that eight neighbouring lanes (two rows, four blocks t) read at once over all
// banks.
template <typename Act>
struct ActivationTile {
  static constexpr int kUnitElements = 16 / sizeof(Act);
  static constexpr int kRowUnits = kChunk / kUnitElements;  // 16 or 32
  __device__ static int unit_offset(int row, int unit) {
    constexpr int kParityShift = kRowUnits == 16 ? 1 : 2;
    int swizzle = (unit >> 3) | ((row & 1) << kParityShift);
    return (row * kRowUnits + (unit ^ swizzle)) * 16;
  }
};

// One output tile of tile_m tokens x tile_n weight rows.
struct TileWork {
  int64_t first_row;  // dense: of x and out; grouped: position in the sorted pairs
  int rows;           // valid tokens
  int expert;
};

template <typename Act, int kConfig, Epilogue kEpilogue>
struct GemmKernel {
  static constexpr GemmConfig config = kGemmConfigs[kConfig];
  static constexpr int kTileM = config.tile_m;
  static constexpr int kTileN = config.tile_n();
  static constexpr int kRows = config.rows;
  static constexpr int kWarpsK = config.warps_k;
  static constexpr int kThreads = config.threads();
  // f32 stages are twice as large; two of them keep a block under sm_86's 99 KB.
  static constexpr int kStages = sizeof(Act) == 4 ? 2 : config.stages;
  static constexpr int kGroups = kTileM / 8;  // 8-token column groups
  using Tile = ActivationTile<Act>;
  using Terms = Activation<Act>;

  static constexpr int kChunkBytes = kTileM * kChunk * int(sizeof(Act));
  static constexpr int kStageBytes = kWarpsK * kChunkBytes;
  // Padded so that the accumulators' (token, row) scatter hits 32 different banks.
  static constexpr int kSumStride = kTileN + 4;
  static constexpr int kSumBytes = kWarpsK * kTileM * kSumStride * 4;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;

  struct Weights {  // of one chunk: rows g and g + 8 of each 16-row tile, block t
    uint4 codes[kRows][2];
    uint32_t scale[kRows][2];
  };

  __device__ static bool find_work(const GemmArgs& args, int tile, TileWork& work) {
    if constexpr (kEpilogue == Epilogue::kDense) {
      work.first_row = int64_t(tile) * kTileM;
      work.rows = int(min(args.m - work.first_row, int64_t(kTileM)));
      work.expert = 0;
      return true;
    } else {
      const int32_t* fields = args.tiles + 4 * int64_t(tile);
      work = {fields[1], fields[2], fields[0]};
      return work.rows > 0;
    }
  }

  __device__ static int64_t x_row(const GemmArgs& args, const TileWork& work, int row) {
    if constexpr (kEpilogue == Epilogue::kGateUp)
      return args.sorted_pairs[work.first_row + row] / args.top_k;
    else
      return work.first_row + row;
  }

  __device__ static void load_activations(const GemmArgs& args, const TileWork& work, int step,
                                          uint32_t stage) {
    constexpr int kUnits = kWarpsK * kTileM * Tile::kRowUnits;
    const Act* x = static_cast<const Act*>(args.x);
#pragma unroll 4
    for (int i = threadIdx.x; i < kUnits; i += kThreads) {
      int unit = i % Tile::kRowUnits;
      int row = i / Tile::kRowUnits % kTileM;
      int chunk = i / (Tile::kRowUnits * kTileM);
      int k = (step * kWarpsK + chunk) * kChunk + unit * Tile::kUnitElements;
      bool valid = row < work.rows && k < args.k;
      const Act* source = valid ? x + x_row(args, work, row) * args.k + k : x;
      ptx::cp_async16(stage + chunk * kChunkBytes + Tile::unit_offset(row, unit), source, valid);
    }
  }

  __device__ static void load_weights(const GemmArgs& args, const PackedWeights& w, int first_n,
                                      int chunk, Weights& out) {
    const int lane = threadIdx.x % 32;
    const int blocks_per_row = args.k / kBlockSize;
    const int block = chunk * (kChunk / kBlockSize) + lane % 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int n = first_n + 16 * r + 8 * half + lane / 4;
        bool valid = n < args.n && block < blocks_per_row;
        int64_t index = int64_t(n) * blocks_per_row + block;
        out.codes[r][half] =
            valid ? ptx::load_streaming16(w.blocks + index * kBlockBytes) : make_uint4(0, 0, 0, 0);
        out.scale[r][half] = valid ? __ldg(w.scales + index) : 0u;
      }
    }
  }

  __device__ static bool any_wide(const Weights& weights) {
    bool wide = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      wide |= is_wide(weights.scale[r][0]) | is_wide(weights.scale[r][1]);
    return __any_sync(0xffffffffu, wide);
  }

  template <bool kWide>
  __device__ static void multiply(const Weights& weights, uint32_t tile,
                                  float (&acc)[kRows][kGroups][4]) {
    const int lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    ScaleFactor scale[kRows][2];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) scale[r][half] = scale_factor(weights.scale[r][half]);

#pragma unroll
    for (int i = 0; i < 4; ++i) {  // words of a block
      uint32_t a[kRows][2][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4& codes = weights.codes[r][half];
          uint32_t word = i == 0 ? codes.x : i == 1 ? codes.y : i == 2 ? codes.z : codes.w;
          decode8<kWide>(word, scale[r][half], a[r][half]);
        }
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        uint4 raw[Terms::kUnits];
#pragma unroll
        for (int u = 0; u < Terms::kUnits; ++u)
          raw[u] = ptx::load_shared16(
              tile + Tile::unit_offset(8 * j + g, (4 * t + i) * Terms::kUnits + u));
        uint32_t b[Terms::kTerms][4];
        Terms::terms(raw, b);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int term = 0; term < Terms::kTerms; ++term)
#pragma unroll
            for (int s = 0; s < 4; s += 2)
              ptx::mma_m16n8k16(acc[r][j], a[r][0][s], a[r][1][s], a[r][0][s + 1], a[r][1][s + 1],
                                b[term][s], b[term][s + 1]);
      }
    }
  }

  __device__ static void run(const GemmArgs& args, int tile_n, const TileWork& work, char* shared) {
    const int warp = threadIdx.x / 32;
    const int warp_n = warp % config.warps_n, warp_k = warp / config.warps_n;
    const int first_n = tile_n * kTileN;
    const int warp_first_n = first_n + warp_n * 16 * kRows;
    const int chunks = (args.k + kChunk - 1) / kChunk;
    const int steps = (chunks + kWarpsK - 1) / kWarpsK;
    const uint32_t shared_base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));

    const int64_t weight_rows = int64_t(work.expert) * args.n;
    const int64_t first_block = weight_rows * (args.k / kBlockSize);
    const PackedWeights w = {args.weights.blocks + first_block * kBlockBytes,
                             args.weights.scales + first_block};

    float acc[kRows][kGroups][4] = {};
    Weights next;
    load_weights(args, w, warp_first_n, warp_k, next);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) load_activations(args, work, s, shared_base + s * kStageBytes);
      ptx::cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      Weights current = next;
      if (step + 1 < steps)
        load_weights(args, w, warp_first_n, (step + 1) * kWarpsK + warp_k, next);
      ptx::cp_async_wait<kStages - 2>();
      // Everybody's copies of this stage are visible, and everybody has left the stage that is
      // refilled next.
      __syncthreads();
      int refill = step + kStages - 1;
      if (refill < steps)
        load_activations(args, work, refill, shared_base + refill % kStages * kStageBytes);
      ptx::cp_async_commit();
      const uint32_t tile = shared_base + step % kStages * kStageBytes + warp_k * kChunkBytes;
      if (any_wide(current))
        multiply<true>(current, tile, acc);
      else
        multiply<false>(current, tile, acc);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();

    // The sums change from fragment order to [warp_k][token][row], in the stages' memory.
    float* sums = reinterpret_cast<float*>(shared);
    const int lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < kGroups; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          int token = 8 * j + 2 * t + c % 2;
          int row = (warp_n * kRows + r) * 16 + 8 * (c / 2) + g;
          sums[(warp_k * kTileM + token) * kSumStride + row] = acc[r][j][c];
        }
    __syncthreads();
    write_out(args, work, first_n, weight_rows, sums);
  }

  __device__ static float biased_sum(const GemmArgs& args, const float* sums, int token, int row,
                                     int64_t bias_index) {
    float v = 0.0f;
#pragma unroll
    for (int wk = 0; wk < kWarpsK; ++wk) v += sums[(wk * kTileM + token) * kSumStride + row];
    return args.bias.data ? v + load_float(args.bias.data, args.bias.type, bias_index) : v;
  }

  __device__ static void write_out(const GemmArgs& args, const TileWork& work, int first_n,
                                   int64_t weight_rows, const float* sums) {
    constexpr int kWidth = kEpilogue == Epilogue::kGateUp ? kTileN / 2 : kTileN;
    for (int i = threadIdx.x; i < kWidth * work.rows; i += kThreads) {
      const int token = i / kWidth;
      const int column = i % kWidth;
      if constexpr (kEpilogue == Epilogue::kGateUp) {
        const int n = first_n + 2 * column;
        if (n >= args.n) continue;
        float gate = biased_sum(args, sums, token, 2 * column, weight_rows + n);
        float up = biased_sum(args, sums, token, 2 * column + 1, weight_rows + n + 1);
        float h = clamped_swiglu(gate, up, args.alpha, args.limit);
        store_float(args.out, kActType, (work.first_row + token) * (args.n / 2) + n / 2, h);
      } else {
        const int n = first_n + column;
        if (n >= args.n) continue;
        float v = biased_sum(args, sums, token, column, weight_rows + n);
        if constexpr (kEpilogue == Epilogue::kDense) {
          store_float(args.out, args.out_type, (work.first_row + token) * args.n + n, v);
        } else {
          int pair = args.sorted_pairs[work.first_row + token];
          static_cast<float*>(args.out)[int64_t(pair) * args.n + n] = args.pair_weights[pair] * v;
        }
      }
    }
  }

  static constexpr DType kActType = std::is_same_v<Act, float>    ? DType::kF32
                                    : std::is_same_v<Act, __half> ? DType::kF16
                                                                  : DType::kBF16;
};

template <typename Act, int kConfig, Epilogue kEpilogue>
__global__ void __launch_bounds__(kGemmConfigs[kConfig].threads())
    gemm_kernel(const __grid_constant__ GemmArgs args) {
  using Kernel = GemmKernel<Act, kConfig, kEpilogue>;
  extern __shared__ __align__(128) char shared[];
  // Neighbouring blocks share the tokens and read different weights.
  const int tile_n = int(blockIdx.x % unsigned(args.tiles_n));
  const int tile_m = int(blockIdx.x / unsigned(args.tiles_n));
  TileWork work;
  if (Kernel::find_work(args, tile_m, work)) Kernel::run(args, tile_n, work, shared);
}

template <typename Act, int kConfig, Epilogue kEpilogue>
cudaError_t launch_config(GemmArgs args, int64_t tiles_m, cudaStream_t stream) {
  using Kernel = GemmKernel<Act, kConfig, kEpilogue>;
  auto kernel = gemm_kernel<Act, kConfig, kEpilogue>;
  // More than 48 KB of shared memory is an opt-in per device; a host call, legal during capture.
  static std::atomic<uint64_t> opted_in{0};
  int device;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (device >= 64 || !(opted_in.load() >> device & 1)) {
    if (cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes))
      return error;
    if (device < 64) opted_in.fetch_or(uint64_t(1) << device);
  }
  args.tiles_n = (args.n + Kernel::kTileN - 1) / Kernel::kTileN;
  const int64_t grid = tiles_m * args.tiles_n;
  if (grid > 0x7fffffff) return cudaErrorInvalidConfiguration;
  kernel<<<unsigned(grid), Kernel::kThreads, Kernel::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

// One definition per activation type, in a translation unit of its own: gemm_{bf16,f16,f32}.cu.
template <typename Act>
cudaError_t launch_gemm(Epilogue epilogue, int config, const GemmArgs& args, int64_t tiles_m,
                        cudaStream_t stream);

}  // namespace jax_mxfp4
