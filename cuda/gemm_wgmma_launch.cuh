// How a wgmma kernel is launched: tensor maps, arguments, clusters.
#pragma once

#include "gemm_wgmma.cuh"

namespace jax_mxfp4 {

template <int kConfig, Epilogue kEpilogue, bool kShared>
__global__ void __launch_bounds__(WgmmaGemm<kConfig, kEpilogue, kShared>::kThreads, 1)
    wgmma_kernel(const __grid_constant__ WgmmaArgs args, const __grid_constant__ WgmmaMaps maps) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char shared[];  // what a 128-byte swizzle wants
  WgmmaGemm<kConfig, kEpilogue, kShared>::run(args, maps, shared);
#endif
}

// From the driver, found at run time: the module must load on machines without one.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    if (error || found != cudaDriverEntryPointSuccess) entry = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return encoder;
}

struct Matrix {
  CUtensorMapDataType type;
  const void* data;
  int64_t inner, outer, pitch;  // elements, rows, bytes
};

inline cudaError_t encode(CUtensorMap* map, const Matrix& matrix, int box_inner, int box_outer,
                          CUtensorMapSwizzle swizzle,
                          CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const auto encoder = tensor_map_encoder();
  if (!encoder) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {cuuint64_t(matrix.inner), cuuint64_t(matrix.outer)};
  const cuuint64_t pitches[] = {cuuint64_t(matrix.pitch)};
  const cuuint32_t box[] = {cuuint32_t(box_inner), cuuint32_t(box_outer)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encoder(map, matrix.type, 2, const_cast<void*>(matrix.data), sizes, pitches, box, steps,
              CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

constexpr int64_t kReadAheadBytes = 16 << 20;  // of codes

// kShared: all thread blocks share all tiles; `split` is 1.
template <int kConfig, Epilogue kEpilogue, bool kShared = false>
cudaError_t launch_config(int split, const GemmArgs& gemm, int multiprocessors,
                          cudaStream_t stream) {
  using Kernel = WgmmaGemm<kConfig, kEpilogue, kShared>;
  constexpr auto kernel = wgmma_kernel<kConfig, kEpilogue, kShared>;
  if (cudaError_t error = opt_in_shared_memory<kernel>(Kernel::kSharedBytes)) return error;

  WgmmaArgs args = {};
  args.bias = gemm.bias;
  args.out = gemm.out;
  args.out_type = gemm.out_type;
  args.m = int(gemm.m);
  args.n = gemm.n;
  args.k = gemm.k;
  args.tiles_m = (args.m + Kernel::kTileM - 1) / Kernel::kTileM;
  args.tiles_n = (args.n + Kernel::kTileN - 1) / Kernel::kTileN;
  if (split > kMaxSplit) return cudaErrorInvalidValue;
  // Bulk copies bring it; tensor maps ask the same of the rest.
  if (reinterpret_cast<uintptr_t>(gemm.bias.data) % 16) return cudaErrorMisalignedAddress;
  if (kShared && (multiprocessors > kMaxSharers || gemm.k > kMaxSharedK ||
                  int64_t(args.tiles_m) * args.tiles_n > kMaxSharedWaves * multiprocessors))
    return cudaErrorInvalidValue;
  args.split = split;
  const int slabs = gemm.k / 64;
  for (int rank = 0; rank <= split; ++rank)
    args.first_slab[rank] = int(int64_t(slabs) * rank / split);
  if constexpr (!Kernel::kGrouped) {
    const int width = args.tiles_m < Kernel::kBand ? args.tiles_m : Kernel::kBand;
    args.band = Divisor(Kernel::kBand * args.tiles_n);
    args.band_width = Divisor(width);
    args.last_band_width = Divisor((args.tiles_m - 1) % Kernel::kBand + 1);
  }
  args.row_tiles = Divisor(args.tiles_n);
  args.turns = (Kernel::kTokenGroups + split - 1) / split;
  args.slabs = Divisor(slabs);
  args.blocks = Divisor(multiprocessors);
  args.scatter = Kernel::kGrouped || gemm.out_type != DType::kBF16 || gemm.n % 8 != 0;
  args.tiles = reinterpret_cast<const int4*>(gemm.tiles);
  args.tile_count = gemm.tile_count;
  args.alpha = gemm.alpha;
  args.limit = gemm.limit;

  // Reading 256 bytes of a row ahead is what memory is fast with, but the first slab waits for it:
  // not where that is most of the time.
  const bool ahead = Kernel::kGrouped || int64_t(gemm.n) * gemm.k / 2 > kReadAheadBytes;
  // With one tile of tokens every weight is read once, and the activations by all. But of rows that
  // begin anywhere in 256 bytes, L2 fetches pieces ahead, which it must then keep.
  const bool once = !Kernel::kGrouped && args.tiles_m == 1, shared = gemm.k % 512 != 0;
  args.reads_once = once && !(ahead && shared);
  args.shares_pieces = (once || Kernel::kGrouped) && ahead && shared;

  WgmmaMaps maps;
  const Matrix x = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, gemm.x, gemm.k, gemm.m, int64_t(gemm.k) * 2};
  const Matrix w = {CU_TENSOR_MAP_DATA_TYPE_UINT8, gemm.weights.blocks, gemm.k / 2,
                    Kernel::kGrouped ? int64_t(gemm.experts) * gemm.n : gemm.n, gemm.k / 2};
  const int scale_bytes = gemm.k / kBlockSize;
  args.scales = gemm.weights.scales;
  args.scale_slabs = Kernel::kSlabsOfScales;
  // A row of a tensor map is a multiple of 16 bytes, so it holds the scales of up to eight rows.
  int scale_rows = 1;
  while (scale_rows * scale_bytes % 16) scale_rows *= 2;
  if (w.outer % scale_rows) return cudaErrorInvalidValue;
  const Matrix scales = {CU_TENSOR_MAP_DATA_TYPE_UINT8, gemm.weights.scales,
                         scale_rows * scale_bytes, w.outer / scale_rows, scale_rows * scale_bytes};
  if (scale_bytes <= Kernel::kMaxScaleBytes)
    args.scale_slabs = slabs;  // of the whole tile
  else
    args.scale_rows = scale_rows;
  const Matrix out = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, gemm.out, gemm.n, gemm.m,
                      int64_t(gemm.n) * 2};
  if (cudaError_t error = encode(&maps.x, x, 64, Kernel::kBoxTokens, CU_TENSOR_MAP_SWIZZLE_128B))
    return error;
  if constexpr (!Kernel::kGrouped) {
    args.last_tokens = (args.m - 1) % Kernel::kTileM + 1;
    if (cudaError_t error =
            encode(&maps.last_x, x, 64, args.last_tokens, CU_TENSOR_MAP_SWIZZLE_128B))
      return error;
  }
  if (cudaError_t error =
          encode(&maps.w, w, 64, Kernel::kTileN, CU_TENSOR_MAP_SWIZZLE_64B,
                 ahead ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_NONE))
    return error;
  if (cudaError_t error =
          encode(&maps.scales, scales, Kernel::kScaleBoxBytes, Kernel::kTileN / scale_rows,
                 CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B))
    return error;
  if (!args.scatter)
    if (cudaError_t error =
            encode(&maps.out, out, 64, 8 * Kernel::kStagedGroups, CU_TENSOR_MAP_SWIZZLE_128B))
      return error;

  // How many tiles a grouped product has is known on the device only.
  const int tiles = Kernel::kGrouped ? multiprocessors : args.tiles_m * args.tiles_n;
  const int at_once = split > 1 ? tiles : multiprocessors;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = kShared ? multiprocessors : (tiles < at_once ? tiles : at_once) * split;
  launch.blockDim = Kernel::kThreads;
  launch.dynamicSmemBytes = Kernel::kSharedBytes;
  launch.stream = stream;
  cudaLaunchAttribute attribute;
  if (kShared) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(split), 1, 1};
  }
  launch.attrs = &attribute;
  launch.numAttrs = kShared || split > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&launch, kernel, args, maps);
}

}  // namespace jax_mxfp4
