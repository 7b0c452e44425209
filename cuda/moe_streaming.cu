#include "moe_streaming.cuh"

namespace jax_mxfp4 {
namespace {

template <int kConfig>
__global__ void __launch_bounds__(StreamingMoe<kConfig>::kThreads, 1)
    streaming_moe_kernel(const __grid_constant__ MoeArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  StreamingMoe<kConfig>::run(args, shared);
#endif
}

template <int kConfig = 0>
cudaError_t launch(int config, const MoeArgs& args, int multiprocessors, cudaStream_t stream) {
  if constexpr (kConfig == kNumGemmConfigs) {
    return cudaErrorInvalidValue;
  } else {
    if constexpr (is_streaming_moe(kGemmConfigs[kConfig]))
      if (config == kConfig)
        return launch_cooperative<streaming_moe_kernel<kConfig>>(
            args, StreamingMoe<kConfig>::kThreads, StreamingMoe<kConfig>::kSharedBytes,
            multiprocessors, stream);
    return launch<kConfig + 1>(config, args, multiprocessors, stream);
  }
}

}  // namespace

cudaError_t launch_streaming_moe(int config, const MoeArgs& args, int multiprocessors,
                                 cudaStream_t stream) {
  return launch(config, args, multiprocessors, stream);
}

}  // namespace jax_mxfp4
