// Dense y = x * w^T + bias: choose a configuration, launch it.
#include "device.h"
#include "gemm_streaming.cuh"
#include "gemm_tiled.cuh"
#include "gemm_wgmma.cuh"

namespace jax_mxfp4 {
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
  const Multiprocessors available = multiprocessors_for(args.x_type);
  const GemmShape shape = {args.m, args.n, args.k, available.streaming, available.wgmma};
  const GemmChoice choice = select_gemm(shape);
  const GemmConfig& config = kGemmConfigs[choice.config];
  if (config.kind == GemmKind::kStreaming)
    return launch_streaming(choice.config, gemm, shape.streaming_multiprocessors, stream);
  if (config.kind == GemmKind::kWgmma)
    return launch_wgmma(choice.config, choice.split, gemm, shape.wgmma_multiprocessors, stream);
  const int64_t tiles_m = (args.m + config.tile_m - 1) / config.tile_m;
  switch (args.x_type) {
    case DType::kBF16:
      return launch_tiled<__nv_bfloat16>(Epilogue::kDense, choice.config, gemm, tiles_m, stream);
    case DType::kF16:
      return launch_tiled<__half>(Epilogue::kDense, choice.config, gemm, tiles_m, stream);
    default:
      return launch_tiled<float>(Epilogue::kDense, choice.config, gemm, tiles_m, stream);
  }
}

}  // namespace jax_mxfp4
