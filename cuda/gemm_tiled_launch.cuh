// The table of compiled kernels: configuration x epilogue, for one activation type per translation
// unit.
#pragma once

#include "gemm_tiled.cuh"

namespace jax_mxfp4 {

template <typename Act, Epilogue kEpilogue, int kConfig = 0>
cudaError_t launch_epilogue(int config, const GemmArgs& args, int64_t tiles_m,
                            cudaStream_t stream) {
  if constexpr (kConfig == kNumGemmConfigs) {
    return cudaErrorInvalidValue;
  } else if constexpr (kGemmConfigs[kConfig].kind != GemmKind::kTiled) {
    return launch_epilogue<Act, kEpilogue, kConfig + 1>(config, args, tiles_m, stream);
  } else {
    if (config == kConfig) return launch_config<Act, kConfig, kEpilogue>(args, tiles_m, stream);
    return launch_epilogue<Act, kEpilogue, kConfig + 1>(config, args, tiles_m, stream);
  }
}

template <typename Act>
cudaError_t launch_tiled(Epilogue epilogue, int config, const GemmArgs& args, int64_t tiles_m,
                         cudaStream_t stream) {
  switch (epilogue) {
    case Epilogue::kDense:
      return launch_epilogue<Act, Epilogue::kDense>(config, args, tiles_m, stream);
    case Epilogue::kGateUp:
      return launch_epilogue<Act, Epilogue::kGateUp>(config, args, tiles_m, stream);
    case Epilogue::kDown:
      return launch_epilogue<Act, Epilogue::kDown>(config, args, tiles_m, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_mxfp4
