// Grouped products with wgmma: the table of compiled kernels.
#include "gemm_wgmma_launch.cuh"

namespace jax_mxfp4 {

cudaError_t launch_grouped_wgmma(Epilogue epilogue, int config, const GemmArgs& args,
                                 int multiprocessors, cudaStream_t stream) {
  return launch_with<is_grouped_wgmma>(config, [&](auto c) {
    constexpr int kConfig = decltype(c)::value;
    switch (epilogue) {
      case Epilogue::kGateUp:
        return launch_config<kConfig, Epilogue::kGateUp>(1, args, multiprocessors, stream);
      case Epilogue::kDown:
        return launch_config<kConfig, Epilogue::kDown>(1, args, multiprocessors, stream);
      case Epilogue::kDense:
        break;
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace jax_mxfp4
