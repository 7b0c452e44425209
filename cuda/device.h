// Which kernels the device of this call can run.
#pragma once

#include "kernels.h"

namespace jax_mxfp4 {

// Multiprocessors for kernels beside the tiled ones; 0 where those cannot run, be it that the
// device cannot be asked.
struct Multiprocessors {
  int streaming;  // sm_90 and later with 227 KB of shared memory, bf16
  int wgmma;      // sm_90 only, bf16
};

inline Multiprocessors multiprocessors_for(DType x_type) {
  int device, major, minor, count, shared;
  if (x_type != DType::kBF16 || cudaGetDevice(&device) ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ||
      major < 9 || shared < 227 * 1024)
    return {0, 0};
  return {count, major == 9 && minor == 0 ? count : 0};
}

}  // namespace jax_mxfp4
