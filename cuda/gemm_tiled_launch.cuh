// The table of compiled kernels: configuration x epilogue, for one activation type per translation
// unit.
#pragma once

#include "gemm_tiled.cuh"

namespace jax_mxfp4 {

template <typename Act>
cudaError_t launch_tiled(Epilogue epilogue, int config, const GemmArgs& args, int64_t tiles_m,
                         cudaStream_t stream) {
  return launch_with<is_kind<GemmKind::kTiled>>(config, [&](auto c) {
    constexpr int kConfig = decltype(c)::value;
    switch (epilogue) {
      case Epilogue::kDense:
        return launch_config<Act, kConfig, Epilogue::kDense>(args, tiles_m, stream);
      case Epilogue::kGateUp:
        return launch_config<Act, kConfig, Epilogue::kGateUp>(args, tiles_m, stream);
      case Epilogue::kDown:
        return launch_config<Act, kConfig, Epilogue::kDown>(args, tiles_m, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace jax_mxfp4
