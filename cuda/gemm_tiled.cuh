// Fused dequantize-GEMM in tiles, for sm_80 and later: every shape, every activation type, dense
// and grouped. Packed weights go straight from global memory to the registers of the lane that owns
// them; activations are shared by the block's warps through a ring of cp.async buffers.
#pragma once

#include <type_traits>

#include "gemm.cuh"

namespace jax_mxfp4 {

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
struct TiledGemm {
  static constexpr GemmConfig config = kGemmConfigs[kConfig];
  static constexpr int kTileM = config.tile_m;
  static constexpr int kTileN = config.tile_n();
  static constexpr int kRows = config.rows;
  static constexpr int kWarpsK = config.warps_k;
  static constexpr int kThreads = (32 * config.compute_warps());
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
    ScaleFactor scale[kRows][2];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) scale[r][half] = scale_factor(weights.scale[r][half]);

    multiply_groups<kWide>(weights, scale, tile, acc);
  }

  // Products of group kGroup of every block, and of those that follow.
  template <bool kWide, int kGroup = 0>
  __device__ static void multiply_groups(const Weights& weights,
                                         const ScaleFactor (&scale)[kRows][2], uint32_t tile,
                                         float (&acc)[kRows][kGroups][4]) {
    const int lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    uint32_t a[kRows][2][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        decode_group<kGroup, kWide>(weights.codes[r][half], scale[r][half], a[r][half]);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      uint4 raw[Terms::kUnits];
#pragma unroll
      for (int u = 0; u < Terms::kUnits; ++u)
        raw[u] = ptx::load_shared16(
            tile + Tile::unit_offset(8 * j + g, (4 * t + kGroup) * Terms::kUnits + u));
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
    if constexpr (kGroup < 3) multiply_groups<kWide, kGroup + 1>(weights, scale, tile, acc);
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
          static_cast<float*>(args.out)[(work.first_row + token) * args.n + n] = v;
        }
      }
    }
  }

  static constexpr DType kActType = std::is_same_v<Act, float>    ? DType::kF32
                                    : std::is_same_v<Act, __half> ? DType::kF16
                                                                  : DType::kBF16;
};

template <typename Act, int kConfig, Epilogue kEpilogue>
__global__ void __launch_bounds__(32 * kGemmConfigs[kConfig].compute_warps())
    tiled_kernel(const __grid_constant__ GemmArgs args) {
  using Kernel = TiledGemm<Act, kConfig, kEpilogue>;
  extern __shared__ __align__(128) char shared[];
  // Neighbouring blocks share the tokens and read different weights.
  const int tile_n = int(blockIdx.x % unsigned(args.tiles_n));
  const int tile_m = int(blockIdx.x / unsigned(args.tiles_n));
  TileWork work;
  if (Kernel::find_work(args, tile_m, work)) Kernel::run(args, tile_n, work, shared);
}

template <typename Act, int kConfig, Epilogue kEpilogue>
cudaError_t launch_config(GemmArgs args, int64_t tiles_m, cudaStream_t stream) {
  using Kernel = TiledGemm<Act, kConfig, kEpilogue>;
  constexpr auto kernel = tiled_kernel<Act, kConfig, kEpilogue>;
  if (cudaError_t error = opt_in_shared_memory<kernel>(Kernel::kSharedBytes)) return error;
  args.tiles_n = (args.n + Kernel::kTileN - 1) / Kernel::kTileN;
  const int64_t grid = tiles_m * args.tiles_n;
  if (grid > 0x7fffffff) return cudaErrorInvalidConfiguration;
  kernel<<<unsigned(grid), Kernel::kThreads, Kernel::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

// One definition per activation type, in a translation unit of its own:
// gemm_tiled_{bf16,f16,f32}.cu.
template <typename Act>
cudaError_t launch_tiled(Epilogue epilogue, int config, const GemmArgs& args, int64_t tiles_m,
                         cudaStream_t stream);

}  // namespace jax_mxfp4
