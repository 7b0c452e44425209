#include "gemm_streaming.cuh"

namespace jax_mxfp4 {
namespace {

template <int kConfig, bool kCached>
__global__ void __launch_bounds__(StreamingGemm<kConfig>::kThreads, 1)
    streaming_kernel(const __grid_constant__ GemmArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  StreamingGemm<kConfig>::template run<kCached>(args, shared);
#endif
}

template <int kConfig, bool kCached>
cudaError_t launch_config(const GemmArgs& args, int multiprocessors, cudaStream_t stream) {
  using Kernel = StreamingGemm<kConfig>;
  constexpr auto kernel = streaming_kernel<kConfig, kCached>;
  if (cudaError_t error = opt_in_shared_memory<kernel>(Kernel::kSharedBytes)) return error;
  const int tiles = args.n / Kernel::kTileN;
  const int grid = tiles < multiprocessors ? tiles : multiprocessors;
  kernel<<<grid, Kernel::kThreads, Kernel::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_streaming(int config, const GemmArgs& args, int multiprocessors,
                             cudaStream_t stream) {
  return launch_with<is_kind<GemmKind::kStreaming>>(config, [&](auto c) {
    constexpr int kConfig = decltype(c)::value;
    const bool cached = args.k <= 128 * kGemmConfigs[kConfig].stage_chunks();
    return cached ? launch_config<kConfig, true>(args, multiprocessors, stream)
                  : launch_config<kConfig, false>(args, multiprocessors, stream);
  });
}

}  // namespace jax_mxfp4
