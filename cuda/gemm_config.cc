#include "gemm_config.h"

namespace jax_mxfp4 {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether stages of this configuration can be filled by bulk copies, whose addresses and sizes are
// multiples of 16 bytes. Codes always are; the scales of a tile are one copy if they lie in a
// single stage, otherwise one copy per row.
bool fits_streaming(const GemmConfig& config, const GemmShape& shape) {
  const int64_t scales_per_row = shape.k / 32;
  const bool one_stage = ceil_div(shape.k, 128) <= config.stage_chunks();
  return config.kind == GemmKind::kStreaming && shape.m <= config.tile_m &&
         shape.n % config.tile_n() == 0 && (one_stage || scales_per_row % 16 == 0);
}

// Rows that the busiest multiprocessor gets: what the slowest one streams is the time.
int64_t rows_of_busiest(const GemmConfig& config, const GemmShape& shape) {
  return ceil_div(shape.n / config.tile_n(), shape.streaming_multiprocessors) * config.tile_n();
}

int select_streaming(const GemmShape& shape) {
  const bool wide = ceil_div(shape.k, 128) % 32 == 0;  // whole stages for 16 warps of two chunks
  int best = -1;
  for (int i = 0; i < kNumGemmConfigs; ++i) {
    const GemmConfig& config = kGemmConfigs[i];
    if (!fits_streaming(config, shape)) continue;
    if (best < 0) {
      best = i;
      continue;
    }
    const GemmConfig& other = kGemmConfigs[best];
    // The smallest token tile, then the number of warps that K divides into, then balance; of two
    // equals the later has more rows, so each activation read serves more weights.
    if (config.tile_m != other.tile_m) continue;
    if (config.warps_k != other.warps_k) {
      if ((config.warps_k == 16) == wide) best = i;
      continue;
    }
    if (rows_of_busiest(config, shape) <= rows_of_busiest(other, shape)) best = i;
  }
  return best;
}

}  // namespace

int select_gemm_config(const GemmShape& shape) {
  if (shape.streaming_multiprocessors > 0) {
    const int streaming = select_streaming(shape);
    if (streaming >= 0) return streaming;
  }
  if (shape.m <= 16) return 0;  // at most two token tiles; the second read of the weights hits L2
  if (shape.m <= 64) return 1;
  return 2;
}

}  // namespace jax_mxfp4
