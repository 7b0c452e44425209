// The GPT-OSS expert layer. One token: moe_one_token.cu. Few: moe_streaming.cuh. Others, with
// wgmma or tiled products: schedule -> (gather) -> gate_up + SwiGLU -> down -> sum over the top-k.
//
// The token-expert pairs are grouped by expert on the device, in tiles that one thread block's
// tokens share, so each expert's weights are read once per tile and no weight is ever unpacked to
// memory. The place of a pair inside its group comes from an atomic counter and may change from run
// to run; the result does not, because a row of a product does not depend on its neighbours and the
// last kernel adds the pairs of a token in their own order.
#include <cub/block/block_scan.cuh>

#include "device.h"
#include "gemm_tiled.cuh"
#include "gemm_wgmma.cuh"
#include "moe_one_token.h"
#include "moe_streaming.cuh"

namespace jax_mxfp4 {
namespace {

constexpr int kScheduleThreads = 1024;
constexpr int kCombineThreads = 256;
constexpr int kGatherThreads = 256;

// The workspace of int32 words: tile count and padding, tiles of four fields each, which are one
// 16-byte load, pairs by expert, and where each pair lies among them.
struct Schedule {
  int32_t *tile_count, *tiles, *sorted_pairs, *positions;

  Schedule(int32_t* words, int64_t pairs, int64_t max_tiles)
      : tile_count(words),
        tiles(words + 4),
        sorted_pairs(tiles + 4 * max_tiles),
        positions(sorted_pairs + pairs) {}
};

// use(pair, expert) for the pairs of this thread, all threads equally often; past the end the
// expert is none. Eight loads at a time: one block would wait for each of them in turn.
template <typename Use>
__device__ void for_each_id(const int32_t* expert_ids, int pairs, const Use& use) {
  constexpr int kAtOnce = 8;
  for (int first = 0; first < pairs; first += kAtOnce * kScheduleThreads) {
    unsigned experts[kAtOnce];  // negative ids become large
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int p = first + i * kScheduleThreads + int(threadIdx.x);
      experts[i] = p < pairs ? unsigned(expert_ids[p]) : ~0u;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kScheduleThreads >= pairs) break;
      use(first + i * kScheduleThreads + int(threadIdx.x), experts[i]);
    }
  }
}

// Dynamic shared memory: `experts` counters, which become each expert's next free position.
__global__ void __launch_bounds__(kScheduleThreads)
    schedule_kernel(const int32_t* expert_ids, int pairs, int experts, int tile_m, int max_tiles,
                    const Schedule schedule) {
  using Scan = cub::BlockScan<int2, kScheduleThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  extern __shared__ int32_t counters[];
  for (int e = threadIdx.x; e < experts; e += kScheduleThreads) counters[e] = 0;
  __syncthreads();
  for_each_id(expert_ids, pairs, [&](int, unsigned e) {
    if (e < unsigned(experts)) atomicAdd(&counters[e], 1);
  });
  __syncthreads();

  auto add = [](int2 a, int2 b) { return make_int2(a.x + b.x, a.y + b.y); };
  int2 base = make_int2(0, 0);  // pairs and tiles of the experts before
  for (int first = 0; first < experts; first += kScheduleThreads) {
    const int e = first + int(threadIdx.x);
    const int count = e < experts ? counters[e] : 0;
    const int2 mine = make_int2(count, (count + tile_m - 1) / tile_m);
    int2 before, total;
    Scan(scan_storage).ExclusiveScan(mine, before, make_int2(0, 0), add, total);
    before = add(base, before);
    base = add(base, total);
    for (int i = 0; i < mine.y; ++i)
      reinterpret_cast<int4*>(schedule.tiles)[before.y + i] =
          make_int4(e, before.x + i * tile_m, min(count - i * tile_m, tile_m), 0);
    if (e < experts) counters[e] = before.x;
    __syncthreads();
  }
  if (threadIdx.x == 0) *schedule.tile_count = base.y;
  // The grid of tiled kernels is sized for the worst routing; what this one lacks is empty.
  for (int i = base.y + int(threadIdx.x); i < max_tiles; i += kScheduleThreads)
    schedule.tiles[4 * int64_t(i) + 2] = 0;
  // One atomic operation for all lanes of a warp with the same expert: there are few experts, and
  // operations on one address wait for each other.
  for_each_id(expert_ids, pairs, [&](int p, unsigned e) {
    const int lane = threadIdx.x % 32;
    const bool valid = e < unsigned(experts);
    const uint32_t same = __match_any_sync(0xffffffffu, valid ? e : ~0u);
    const int leader = __ffs(same) - 1;
    int position = 0;
    if (valid && lane == leader) position = atomicAdd(&counters[e], __popc(same));
    position = __shfl_sync(0xffffffffu, position, leader) + __popc(same & ((1u << lane) - 1));
    if (valid) schedule.sorted_pairs[position] = p;
    if (p < pairs) schedule.positions[p] = valid ? position : -1;
  });
}

// out[t] = the weighted sum of its pairs' rows of `partial`, in their order. A thread block for
// each token.
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const float* partial, const int32_t* positions, const float* pair_weights,
                   int top_k, int quads, void* out, DType out_type) {
  const int64_t token = blockIdx.x;
  for (int quad = threadIdx.x; quad < quads; quad += kCombineThreads) {
    float sum[4] = {};
#pragma unroll 4
    for (int j = 0; j < top_k; ++j) {
      const int64_t pair = token * top_k + j, position = __ldg(positions + pair);
      if (position < 0) continue;  // without an expert
      const float weight = __ldg(pair_weights + pair);
      const float4 row = __ldcs(reinterpret_cast<const float4*>(partial) + position * quads + quad);
      sum[0] += weight * row.x;
      sum[1] += weight * row.y;
      sum[2] += weight * row.z;
      sum[3] += weight * row.w;
    }
    store_four(out, out_type, 4 * (token * quads + quad), sum);
  }
}

// sorted[i, :] = x[sorted_pairs[i] / top_k, :] in 16-byte units: the copy engine reads rows that
// lie one after another. A warp for each row.
__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(const uint4* x, const Schedule schedule, int top_k, int units, uint4* sorted) {
  const int tiles = *schedule.tile_count;
  if (tiles == 0) return;
  const int4 last = reinterpret_cast<const int4*>(schedule.tiles)[tiles - 1];
  const int row = int(blockIdx.x * (kGatherThreads / 32) + threadIdx.x / 32);
  if (row >= last.y + last.z) return;  // a pair without an expert
  const uint4* from = x + schedule.sorted_pairs[row] / top_k * int64_t(units);
  uint4* to = sorted + row * int64_t(units);
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < units; i += 32) to[i] = __ldg(from + i);
}

template <typename Act>
cudaError_t run_products(const MoeArgs& args, int config, int multiprocessors,
                         cudaStream_t stream) {
  const bool wgmma = kGemmConfigs[config].kind == GemmKind::kWgmma;
  const int64_t pairs = args.tokens * args.top_k;
  const int tile_m = kGemmConfigs[config].tile_m;
  const int64_t max_tiles = moe_max_tiles(pairs, args.experts, tile_m);
  const Schedule schedule(args.schedule, pairs, max_tiles);

  schedule_kernel<<<1, kScheduleThreads, args.experts * sizeof(int32_t), stream>>>(
      args.expert_ids, int(pairs), int(args.experts), tile_m, int(max_tiles), schedule);
  if (cudaError_t error = cudaGetLastError()) return error;

  GemmArgs gemm = {};
  gemm.m = pairs;
  gemm.experts = int(args.experts);
  gemm.tiles = schedule.tiles;
  gemm.tile_count = schedule.tile_count;
  gemm.sorted_pairs = schedule.sorted_pairs;
  gemm.top_k = int(args.top_k);
  gemm.alpha = args.alpha;
  gemm.limit = args.limit;
  const auto multiply = [&](Epilogue epilogue) {
    return wgmma ? launch_grouped_wgmma(epilogue, config, gemm, multiprocessors, stream)
                 : launch_tiled<Act>(epilogue, config, gemm, max_tiles, stream);
  };

  gemm.x = args.x;
  if (wgmma) {
    // In the memory of the partial sums, which are written after it has been read.
    uint4* sorted = reinterpret_cast<uint4*>(args.partial);
    constexpr int kRows = kGatherThreads / 32;
    gather_kernel<<<unsigned((pairs + kRows - 1) / kRows), kGatherThreads, 0, stream>>>(
        static_cast<const uint4*>(args.x), schedule, int(args.top_k),
        int(args.d * sizeof(Act) / sizeof(uint4)), sorted);
    if (cudaError_t error = cudaGetLastError()) return error;
    gemm.x = sorted;
  }
  gemm.weights = args.gate_up;
  gemm.bias = args.gate_up_bias;
  gemm.out = args.hidden;
  gemm.n = int(2 * args.inner);
  gemm.k = int(args.d);
  if (cudaError_t error = multiply(Epilogue::kGateUp)) return error;

  gemm.x = args.hidden;
  gemm.weights = args.down;
  gemm.bias = args.down_bias;
  gemm.out = args.partial;
  gemm.n = int(args.d);
  gemm.k = int(args.inner);
  if (cudaError_t error = multiply(Epilogue::kDown)) return error;

  combine_kernel<<<unsigned(args.tokens), kCombineThreads, 0, stream>>>(
      args.partial, schedule.positions, args.expert_weights, int(args.top_k), int(args.d / 4),
      args.out, args.out_type);
  return cudaGetLastError();
}

}  // namespace

int64_t moe_max_tiles(int64_t pairs, int64_t experts, int64_t tile_m) {
  const int64_t bound = experts + (pairs + tile_m - 1) / tile_m;
  return pairs < bound ? pairs : bound;
}

int64_t moe_schedule_size(int64_t pairs, int64_t experts) {
  int64_t smallest_tile = kGemmConfigs[0].tile_m;
  for (const GemmConfig& config : kGemmConfigs)
    if (config.tile_m < smallest_tile) smallest_tile = config.tile_m;
  return 4 + 4 * moe_max_tiles(pairs, experts, smallest_tile) + 2 * pairs;
}

cudaError_t moe(const MoeArgs& args, cudaStream_t stream) {
  const Multiprocessors available = multiprocessors_for(args.x_type);
  const int config = select_moe({args.tokens, args.top_k, args.experts, args.d, args.inner,
                                 available.streaming, available.wgmma});
  switch (args.x_type) {
    case DType::kBF16:
      if (kGemmConfigs[config].kind == GemmKind::kOneToken)
        return launch_one_token_moe(config, args, available.streaming, stream);
      if (kGemmConfigs[config].kind == GemmKind::kStreaming)
        return launch_streaming_moe(config, args, available.streaming, stream);
      return run_products<__nv_bfloat16>(args, config, available.wgmma, stream);
    case DType::kF16:
      return run_products<__half>(args, config, available.wgmma, stream);
    default:
      return run_products<float>(args, config, available.wgmma, stream);
  }
}

}  // namespace jax_mxfp4
