// Dense y = x * w^T + bias: choose a configuration, launch it.
#include "gemm_streaming.cuh"
#include "gemm_tiled.cuh"

namespace jax_mxfp4 {
namespace {

// What GemmShape::streaming_multiprocessors says of this call; 0 where the device cannot be asked.
int streaming_multiprocessors(DType x_type) {
  if (x_type != DType::kBF16) return 0;
  int device, major, count;
  if (cudaGetDevice(&device) ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device))
    return 0;
  return major >= 9 ? count : 0;
}

}  // namespace

cudaError_t matmul(const MatmulArgs& args, cudaStream_t stream) {
  GemmArgs gemm = {};
  gemm.x = args.x;
  gemm.weights = args.weights;
  gemm.bias = args.bias;
  gemm.out = args.out;
  gemm.out_type = args.out_type;
  gemm.m = args.m;
  gemm.n = int(args.n);
  gemm.k = int(args.k);
  const int multiprocessors = streaming_multiprocessors(args.x_type);
  const int config = select_gemm_config({args.m, args.n, args.k, multiprocessors});
  if (kGemmConfigs[config].kind == GemmKind::kStreaming)
    return launch_streaming(config, gemm, multiprocessors, stream);
  const int64_t tile_m = kGemmConfigs[config].tile_m;
  const int64_t tiles_m = (args.m + tile_m - 1) / tile_m;
  switch (args.x_type) {
    case DType::kBF16:
      return launch_tiled<__nv_bfloat16>(Epilogue::kDense, config, gemm, tiles_m, stream);
    case DType::kF16:
      return launch_tiled<__half>(Epilogue::kDense, config, gemm, tiles_m, stream);
    default:
      return launch_tiled<float>(Epilogue::kDense, config, gemm, tiles_m, stream);
  }
}

}  // namespace jax_mxfp4
