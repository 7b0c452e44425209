#include "gemm_wgmma_launch.cuh"

namespace jax_mxfp4 {
namespace {

template <int kConfig = 0>
cudaError_t launch(int config, int split, const GemmArgs& args, int multiprocessors,
                   cudaStream_t stream) {
  if constexpr (kConfig == kNumGemmConfigs) {
    return cudaErrorInvalidValue;
  } else {
    if constexpr (kGemmConfigs[kConfig].kind == GemmKind::kWgmma)
      if (config == kConfig) {
        if constexpr (can_share_tiles(kGemmConfigs[kConfig]))
          if (split == kShareTiles)
            return launch_config<kConfig, Epilogue::kDense, true>(1, args, multiprocessors, stream);
        if (split >= 1 && split <= max_split(kGemmConfigs[kConfig]))
          return launch_config<kConfig, Epilogue::kDense>(split, args, multiprocessors, stream);
      }
    return launch<kConfig + 1>(config, split, args, multiprocessors, stream);
  }
}

}  // namespace

cudaError_t launch_wgmma(int config, int split, const GemmArgs& args, int multiprocessors,
                         cudaStream_t stream) {
  return launch(config, split, args, multiprocessors, stream);
}

}  // namespace jax_mxfp4
