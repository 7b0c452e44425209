// Dense products with wgmma: the table of compiled kernels.
#include "gemm_wgmma_launch.cuh"

namespace jax_mxfp4 {

cudaError_t launch_wgmma(int config, int split, const GemmArgs& args, int multiprocessors,
                         cudaStream_t stream) {
  return launch_with<is_kind<GemmKind::kWgmma>>(config, [&](auto c) {
    constexpr int kConfig = decltype(c)::value;
    if constexpr (can_share_tiles(kGemmConfigs[kConfig]))
      if (split == kShareTiles)
        return launch_config<kConfig, Epilogue::kDense, true>(1, args, multiprocessors, stream);
    if (split >= 1 && split <= max_split(kGemmConfigs[kConfig]))
      return launch_config<kConfig, Epilogue::kDense>(split, args, multiprocessors, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace jax_mxfp4
