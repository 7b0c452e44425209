// Dense y = x * w^T + bias: choose a configuration, launch it.
#include "gemm.cuh"

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
  const int config = select_gemm_config({args.m, args.n, args.k});
  const int64_t tile_m = kGemmConfigs[config].tile_m;
  const int64_t tiles_m = (args.m + tile_m - 1) / tile_m;
  switch (args.x_type) {
    case DType::kBF16:
      return launch_gemm<__nv_bfloat16>(Epilogue::kDense, config, gemm, tiles_m, stream);
    case DType::kF16:
      return launch_gemm<__half>(Epilogue::kDense, config, gemm, tiles_m, stream);
    default:
      return launch_gemm<float>(Epilogue::kDense, config, gemm, tiles_m, stream);
  }
}

}  // namespace jax_mxfp4
