// The GPT-OSS expert layer: schedule -> gate_up + SwiGLU -> down -> sum over the top-k.
//
// The token-expert pairs are grouped by expert on the device, in tiles that one thread block's
// tokens share, so each expert's weights are read once per tile and no weight is ever unpacked to
// memory. The place of a pair inside its group comes from an atomic counter and may change from run
// to run; the result does not, because a row of a product does not depend on its neighbours and the
// last kernel adds the pairs of a token in their own order.
#include <cub/block/block_scan.cuh>

#include "gemm_tiled.cuh"

namespace jax_mxfp4 {
namespace {

constexpr int kScheduleThreads = 1024;
constexpr int kCombineThreads = 256;

// Dynamic shared memory: `experts` counters, which become each expert's next free position.
__global__ void __launch_bounds__(kScheduleThreads)
    schedule_kernel(const int32_t* expert_ids, int pairs, int experts, int tile_m, int max_tiles,
                    int32_t* sorted_pairs, int32_t* tiles) {
  using Scan = cub::BlockScan<int2, kScheduleThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  extern __shared__ int32_t counters[];
  for (int e = threadIdx.x; e < experts; e += kScheduleThreads) counters[e] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < pairs; p += kScheduleThreads) {
    unsigned e = unsigned(expert_ids[p]);  // negative ids become large
    if (e < unsigned(experts)) atomicAdd(&counters[e], 1);
  }
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
    for (int i = 0; i < mine.y; ++i) {
      int32_t* fields = tiles + 4 * int64_t(before.y + i);
      fields[0] = e;
      fields[1] = before.x + i * tile_m;
      fields[2] = min(count - i * tile_m, tile_m);
    }
    if (e < experts) counters[e] = before.x;
    __syncthreads();
  }
  // The grid is sized for the worst routing; tiles that this routing does not have are empty.
  for (int i = base.y + int(threadIdx.x); i < max_tiles; i += kScheduleThreads)
    tiles[4 * int64_t(i) + 2] = 0;
  for (int p = threadIdx.x; p < pairs; p += kScheduleThreads) {
    unsigned e = unsigned(expert_ids[p]);
    if (e < unsigned(experts)) sorted_pairs[atomicAdd(&counters[e], 1)] = p;
  }
}

__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const float* partial, const int32_t* expert_ids, int top_k, int experts,
                   int64_t d, int64_t elements, void* out, DType out_type) {
  for (int64_t i = int64_t(blockIdx.x) * kCombineThreads + threadIdx.x; i < elements;
       i += int64_t(gridDim.x) * kCombineThreads) {
    const int64_t token = i / d, column = i % d;
    float sum = 0.0f;
    for (int j = 0; j < top_k; ++j) {
      const int64_t pair = token * top_k + j;
      // A pair without an expert has no partial row: its memory was never written.
      if (unsigned(expert_ids[pair]) < unsigned(experts)) sum += partial[pair * d + column];
    }
    store_float(out, out_type, i, sum);
  }
}

template <typename Act>
cudaError_t run_moe(const MoeArgs& args, cudaStream_t stream) {
  const int64_t pairs = args.tokens * args.top_k;
  const int64_t mean_rows = (pairs + args.experts - 1) / args.experts;
  const int config = select_gemm({mean_rows, 2 * args.inner, args.d, 0, 0}).config;
  const int tile_m = kGemmConfigs[config].tile_m;
  const int64_t max_tiles = moe_max_tiles(pairs, args.experts, tile_m);
  int32_t* sorted_pairs = args.schedule;
  int32_t* tiles = args.schedule + pairs;

  schedule_kernel<<<1, kScheduleThreads, args.experts * sizeof(int32_t), stream>>>(
      args.expert_ids, int(pairs), int(args.experts), tile_m, int(max_tiles), sorted_pairs, tiles);
  if (cudaError_t error = cudaGetLastError()) return error;

  GemmArgs gemm = {};
  gemm.tiles = tiles;
  gemm.sorted_pairs = sorted_pairs;
  gemm.pair_weights = args.expert_weights;
  gemm.top_k = int(args.top_k);
  gemm.alpha = args.alpha;
  gemm.limit = args.limit;

  gemm.x = args.x;
  gemm.weights = args.gate_up;
  gemm.bias = args.gate_up_bias;
  gemm.out = args.hidden;
  gemm.n = int(2 * args.inner);
  gemm.k = int(args.d);
  if (cudaError_t error = launch_tiled<Act>(Epilogue::kGateUp, config, gemm, max_tiles, stream))
    return error;

  gemm.x = args.hidden;
  gemm.weights = args.down;
  gemm.bias = args.down_bias;
  gemm.out = args.partial;
  gemm.n = int(args.d);
  gemm.k = int(args.inner);
  if (cudaError_t error = launch_tiled<Act>(Epilogue::kDown, config, gemm, max_tiles, stream))
    return error;

  const int64_t elements = args.tokens * args.d;
  const int64_t blocks = (elements + kCombineThreads - 1) / kCombineThreads;
  combine_kernel<<<unsigned(blocks < 65536 ? blocks : 65536), kCombineThreads, 0, stream>>>(
      args.partial, args.expert_ids, int(args.top_k), int(args.experts), args.d, elements, args.out,
      args.out_type);
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
  return pairs + 4 * moe_max_tiles(pairs, experts, smallest_tile) + experts + 1;
}

cudaError_t moe(const MoeArgs& args, cudaStream_t stream) {
  switch (args.x_type) {
    case DType::kBF16:
      return run_moe<__nv_bfloat16>(args, stream);
    case DType::kF16:
      return run_moe<__half>(args, stream);
    default:
      return run_moe<float>(args, stream);
  }
}

}  // namespace jax_mxfp4
