// Describe -> choose: which compiled configuration serves a product y[M,N] = x[M,K] * w[N,K]^T.
// Pure host code without CUDA or XLA headers, so that a test covers every shape without a GPU.
#pragma once

#include <cstdint>

namespace jax_mxfp4 {

struct GemmShape {
  int64_t m;  // rows of x
  int64_t n;
  int64_t k;
  // What the device and the call allow beside the tiled kernels: multiprocessors for the streaming
  // kernels (sm_90 and later) and for the wgmma kernels (sm_90 only). Both are 0 for activations
  // other than bf16.
  int streaming_multiprocessors;
  int wgmma_multiprocessors;
};

enum class GemmKind {
  kTiled,      // gemm_tiled.cuh: a thread block per output tile, mma.sync, sm_80 and later
  kStreaming,  // gemm_streaming.cuh: a thread block per multiprocessor, bulk copies, sm_90 and
               // later
  kWgmma,      // gemm_wgmma.cuh: warpgroups, sm_90 only
  kOneToken,   // moe_one_token.cu: as kStreaming, one launch for a token's expert layer
};

struct GemmConfig {
  GemmKind kind;
  int tile_m;   // tokens of one tile, in units of the tensor-core instruction's 8
  int rows;     // 16-row weight tiles of one warp
  int warps_n;  // warps side by side along N
  int warps_k;  // warps that share the rows and split K; their sums are added in a fixed order
  int chunks;   // of K that a warp takes from one stage, 128 elements each; not wgmma
  int stages;   // buffers in flight: of packed weights (streaming), of activations (others)
  float step_us = 0;  // wgmma only, measured: one tile, 64 elements of K

  constexpr int tile_n() const { return 16 * rows * warps_n; }
  constexpr int stage_chunks() const { return warps_k * chunks; }
  constexpr int compute_warps() const { return warps_n * warps_k; }
};

// Short on purpose: each tiled row is compiled for three activation types and three epilogues.
inline constexpr GemmConfig kGemmConfigs[] = {
    // Few tokens: the weights are the traffic. 16-row blocks give N = 2880 180 of them, and eight
    // warps along K keep enough 16-byte loads in flight.
    {GemmKind::kTiled, 8, 1, 1, 8, 1, 2},
    // A few dozen tokens: activations are shared by four warps, else their reads pass the weights'.
    {GemmKind::kTiled, 32, 1, 4, 2, 1, 2},
    // Many tokens: each decoded weight serves 64 of them, 64 accumulators a thread.
    {GemmKind::kTiled, 64, 2, 4, 1, 1, 3},
    // Up to 8 tokens. 12 warps of two chunks cover K = 2880 in one stage, 16 warps K = 4096; the
    // stages fill shared memory, about 160 KB in flight on each multiprocessor.
    {GemmKind::kStreaming, 8, 1, 1, 12, 2, 6},
    {GemmKind::kStreaming, 8, 2, 1, 12, 2, 3},
    {GemmKind::kStreaming, 8, 1, 1, 16, 2, 4},
    {GemmKind::kStreaming, 8, 2, 1, 16, 2, 2},
    // Longer K: smaller stages, more of them. Every two tiles read all activations again.
    {GemmKind::kStreaming, 8, 2, 1, 16, 1, 4},
    // Up to 16 tokens, K in one stage: twice the activation registers, so no 16-warp variant.
    {GemmKind::kStreaming, 16, 1, 1, 12, 2, 5},
    {GemmKind::kStreaming, 16, 2, 1, 12, 2, 2},
    // More tokens, or few with so few rows that K is split: the time of a step falls with the
    // tokens, tiles of 128, 192 or 256 rows fill the GPU as evenly as N allows. Four warpgroups
    // hide latencies best; more sums leave room for three or two.
    {GemmKind::kWgmma, 16, 1, 8, 1, 1, 10, 0.160f},
    {GemmKind::kWgmma, 16, 1, 16, 1, 1, 8, 0.317f},
    {GemmKind::kWgmma, 32, 1, 8, 1, 1, 10, 0.200f},
    {GemmKind::kWgmma, 32, 1, 12, 1, 1, 8, 0.267f},
    {GemmKind::kWgmma, 32, 1, 16, 1, 1, 7, 0.339f},
    {GemmKind::kWgmma, 64, 1, 8, 1, 1, 7, 0.227f},
    {GemmKind::kWgmma, 64, 1, 12, 1, 1, 5, 0.306f},
    {GemmKind::kWgmma, 64, 1, 16, 1, 1, 4, 0.434f},
    // With 96 and 104 tokens x 128 rows, 256 and 512 tokens of N = 5120 and 2880 are one wave.
    {GemmKind::kWgmma, 96, 1, 8, 1, 1, 5, 0.262f},
    {GemmKind::kWgmma, 96, 1, 12, 1, 1, 4, 0.376f},
    {GemmKind::kWgmma, 104, 1, 8, 1, 1, 5, 0.285f},
    {GemmKind::kWgmma, 128, 1, 8, 1, 1, 4, 0.311f},
    {GemmKind::kWgmma, 128, 1, 12, 1, 1, 3, 0.486f},
    // The tensor cores limit: several widths, so that one of them fills the last wave, as 176 x 128
    // does with 512 and 1024 tokens of N = 5120.
    {GemmKind::kWgmma, 160, 1, 12, 1, 1, 5, 0.602f},
    {GemmKind::kWgmma, 176, 1, 8, 1, 1, 6, 0.435f},
    {GemmKind::kWgmma, 176, 1, 12, 1, 1, 5, 0.653f},
    {GemmKind::kWgmma, 192, 1, 12, 1, 1, 4, 0.696f},
    {GemmKind::kWgmma, 192, 1, 8, 1, 1, 5, 0.470f},
    {GemmKind::kWgmma, 256, 1, 8, 1, 1, 4, 0.586f},
    // The expert layer of one token: what is left to do when the last weights have come counts, so
    // K is split between as many warps as there are registers for.
    {GemmKind::kOneToken, 8, 2, 1, 24, 1, 3},
};
inline constexpr int kNumGemmConfigs = sizeof(kGemmConfigs) / sizeof(kGemmConfigs[0]);

// Whether a streaming kernel multiplies two tiles with the activations that it has read, where K
// takes several stages.
constexpr bool reads_for_two_tiles(const GemmConfig& config) { return config.chunks == 1; }

// The expert layer streams too: both products with K in one stage, and the schedule of its pairs in
// shared memory.
constexpr bool is_streaming_moe(const GemmConfig& config) {
  return config.kind == GemmKind::kStreaming && config.stage_chunks() == 24;
}
// Activations of a grouped tile come in boxes of 32 tokens, or of 64.
constexpr bool is_grouped_wgmma(const GemmConfig& config) {
  return config.kind == GemmKind::kWgmma && config.tile_m >= 32 && config.tile_m % 32 == 0 &&
         (config.tile_n() >= 192 || config.tile_m == 256);
}
inline constexpr int kOneTokenPairs = 4, kOneTokenMaxInner = 3072;
inline constexpr int kStreamingMoePairs = 1024;
inline constexpr int kStreamingMoeExperts = 512;

// Those for which it was fastest somewhere: each takes another kernel.
constexpr bool can_share_tiles(const GemmConfig& config) {
  return config.kind == GemmKind::kWgmma && config.tile_n() == 128 &&
         (config.tile_m == 16 || config.tile_m == 128);
}
inline constexpr int kMaxSplit = 8;
// Larger tiles leave no room for the sums of as many thread blocks.
constexpr int max_split(const GemmConfig& config) {
  return config.tile_m * config.tile_n() >= 192 * 192 ? 1 : config.tile_m > 128 ? 2 : kMaxSplit;
}
inline constexpr int kShareTiles = 0, kMaxSharers = 144;  // multiprocessors of any sm_90
inline constexpr int kMaxSharedWaves = 2, kMaxSharedK = 1 << 20;

struct GemmChoice {
  int config;  // index into kGemmConfigs
  // Thread blocks that split K of one tile, 1 but for wgmma; kShareTiles: all of the GPU's take
  // equal parts of all tiles.
  int split;
};

// The result depends on the shape alone: equal shapes give equal bits.
GemmChoice select_gemm(const GemmShape& shape);

struct MoeShape {
  int64_t tokens, top_k;
  int64_t experts;
  int64_t d, inner;
  int streaming_multiprocessors, wgmma_multiprocessors;  // as for GemmShape
};

// The configuration of both products of an expert layer. It cannot depend on how many pairs an
// expert gets, which only the device knows.
int select_moe(const MoeShape& shape);

}  // namespace jax_mxfp4
