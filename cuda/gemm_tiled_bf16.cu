#include "gemm_tiled_launch.cuh"

template cudaError_t jax_mxfp4::launch_tiled<__nv_bfloat16>(Epilogue, int, const GemmArgs&, int64_t,
                                                            cudaStream_t);
