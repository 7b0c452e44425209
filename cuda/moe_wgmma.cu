// Grouped products with wgmma: the table of compiled kernels.
#include "gemm_wgmma_launch.cuh"

namespace jax_mxfp4 {
namespace {

template <Epilogue kEpilogue, int kConfig = 0>
cudaError_t launch(int config, const GemmArgs& args, int multiprocessors, cudaStream_t stream) {
  if constexpr (kConfig == kNumGemmConfigs) {
    return cudaErrorInvalidValue;
  } else {
    if constexpr (is_grouped_wgmma(kGemmConfigs[kConfig]))
      if (config == kConfig)
        return launch_config<kConfig, kEpilogue>(1, args, multiprocessors, stream);
    return launch<kEpilogue, kConfig + 1>(config, args, multiprocessors, stream);
  }
}

}  // namespace

cudaError_t launch_grouped_wgmma(Epilogue epilogue, int config, const GemmArgs& args,
                                 int multiprocessors, cudaStream_t stream) {
  switch (epilogue) {
    case Epilogue::kGateUp:
      return launch<Epilogue::kGateUp>(config, args, multiprocessors, stream);
    case Epilogue::kDown:
      return launch<Epilogue::kDown>(config, args, multiprocessors, stream);
    case Epilogue::kDense:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_mxfp4
