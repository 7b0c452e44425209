// Launchers: raw pointers and sizes in, cudaError_t out. Nothing here allocates, synchronizes or
// reads device data on the host, so every call can be captured into a CUDA graph.
//
// Packed weights: blocks [.., K/32, 16] and scales [.., K/32], rows contiguous, pointers aligned to
// 16 bytes. K is a positive multiple of 32. Codes lie in their blocks in prepared order
// (mxfp4.cuh); where a call has `prepared` and it is false, in canonical order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_mxfp4 {

enum class DType { kF32, kF16, kBF16 };

struct PackedWeights {
  const uint8_t* blocks;
  const uint8_t* scales;
};

// Null data stands for no bias.
struct Bias {
  const void* data;
  DType type;
};

// out[r, :] = weights[r, :] for all rows * K elements.
cudaError_t dequantize(PackedWeights weights, int64_t rows, int64_t k, void* out, DType out_type,
                       bool prepared, cudaStream_t stream);

// out[i, :] = weights[ids[i], :]; ids in [-vocab, -1] count from the end, others outside
// [0, vocab) give NaN.
cudaError_t take(PackedWeights weights, const int32_t* ids, int64_t count, int64_t vocab, int64_t k,
                 void* out, DType out_type, bool prepared, cudaStream_t stream);

struct MatmulArgs {
  const void* x;  // [m, k]
  DType x_type;
  PackedWeights weights;  // [n, k]
  Bias bias;              // [n]
  void* out;              // [m, n]
  DType out_type;
  int64_t m, n, k;
};
cudaError_t matmul(const MatmulArgs& args, cudaStream_t stream);

struct MoeArgs {
  const void* x;  // [tokens, d]
  DType x_type;
  const int32_t* expert_ids;    // [tokens, top_k]; outside [0, experts) contributes zero
  const float* expert_weights;  // [tokens, top_k]
  PackedWeights gate_up;        // [experts, 2 * inner, d], rows 2i gate and 2i + 1 up
  Bias gate_up_bias;            // [experts, 2 * inner]
  PackedWeights down;           // [experts, d, inner]
  Bias down_bias;               // [experts, d]
  void* out;                    // [tokens, d]
  DType out_type;
  void* hidden;       // workspace, x_type [tokens * top_k, inner]
  float* partial;     // workspace [tokens * top_k, d]
  int32_t* schedule;  // workspace [moe_schedule_size(tokens * top_k, experts)]
  int64_t tokens, top_k, experts, d, inner;
  float alpha, limit;
};
cudaError_t moe(const MoeArgs& args, cudaStream_t stream);

// int32 elements of MoeArgs::schedule: four words of head, up to so many tiles of four fields each,
// the pairs sorted by expert and where each of them lies.
int64_t moe_max_tiles(int64_t pairs, int64_t experts, int64_t tile_m);
int64_t moe_schedule_size(int64_t pairs, int64_t experts);

}  // namespace jax_mxfp4
