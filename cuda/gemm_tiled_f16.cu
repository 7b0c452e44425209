#include "gemm_tiled_launch.cuh"

template cudaError_t jax_mxfp4::launch_tiled<__half>(Epilogue, int, const GemmArgs&, int64_t,
                                                     cudaStream_t);
