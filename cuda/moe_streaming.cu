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

}  // namespace

cudaError_t launch_streaming_moe(int config, const MoeArgs& args, int multiprocessors,
                                 cudaStream_t stream) {
  return launch_with<is_streaming_moe>(config, [&](auto c) {
    using Kernel = StreamingMoe<decltype(c)::value>;
    return launch_cooperative<streaming_moe_kernel<decltype(c)::value>>(
        args, Kernel::kThreads, Kernel::kSharedBytes, multiprocessors, stream);
  });
}

}  // namespace jax_mxfp4
