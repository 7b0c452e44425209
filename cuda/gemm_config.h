// Describe -> choose: which compiled configuration serves a product y[M,N] = x[M,K] * w[N,K]^T.
// Pure host code without CUDA or XLA headers, so that a test covers every shape without a GPU.
#pragma once

#include <cstdint>

namespace jax_mxfp4 {

struct GemmShape {
  int64_t m;  // rows of x; for grouped products the mean number of rows per expert, rounded up
  int64_t n;
  int64_t k;
};

struct GemmConfig {
  int tile_m;   // tokens of one thread block, the 8-wide side of the tensor-core instruction
  int rows;     // 16-row weight tiles of one warp
  int warps_n;  // warps side by side along N
  int warps_k;  // warps that share the rows and split K; their sums are added in a fixed order
  int stages;   // activation buffers in flight

  constexpr int tile_n() const { return 16 * rows * warps_n; }
  constexpr int tile_k() const { return 128 * warps_k; }
  constexpr int threads() const { return 32 * warps_n * warps_k; }
};

// Short on purpose: each row is compiled for three activation types and three epilogues.
inline constexpr GemmConfig kGemmConfigs[] = {
    // Few tokens: the weights are the traffic. 16-row blocks give N = 2880 180 of them, and eight
    // warps along K keep enough 16-byte loads in flight.
    {/*tile_m=*/8, /*rows=*/1, /*warps_n=*/1, /*warps_k=*/8, /*stages=*/2},
    // A few dozen tokens: activations are shared by four warps, else their reads pass the weights'.
    {/*tile_m=*/32, /*rows=*/1, /*warps_n=*/4, /*warps_k=*/2, /*stages=*/2},
    // Many tokens: each decoded weight serves 64 of them, 64 accumulators a thread.
    {/*tile_m=*/64, /*rows=*/2, /*warps_n=*/4, /*warps_k=*/1, /*stages=*/3},
};
inline constexpr int kNumGemmConfigs = sizeof(kGemmConfigs) / sizeof(kGemmConfigs[0]);

// Index into kGemmConfigs. The result depends on the shape alone: equal shapes give equal bits.
int select_gemm_config(const GemmShape& shape);

}  // namespace jax_mxfp4
