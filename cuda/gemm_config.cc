#include "gemm_config.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

namespace jax_mxfp4 {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr float kWeightBytes = 17.0f / 32;  // a code, and its share of a scale

// Whether stages of this configuration can be filled by bulk copies, whose addresses and sizes are
// multiples of 16 bytes. Codes always are; the scales of a tile are one copy if they lie in a
// single stage, otherwise one copy per row.
bool fits_streaming(const GemmConfig& config, const GemmShape& shape) {
  const int64_t scales_per_row = shape.k / 32;
  const bool one_stage = ceil_div(shape.k, 128) <= config.stage_chunks();
  return config.kind == GemmKind::kStreaming && shape.m <= config.tile_m &&
         shape.n % config.tile_n() == 0 && (one_stage || scales_per_row % 16 == 0);
}

// K in whole stages, which is what the warps walk through.
int64_t padded_k(const GemmConfig& config, const GemmShape& shape) {
  const int64_t stage = 128 * config.stage_chunks();
  return ceil_div(shape.k, stage) * stage;
}

bool is_one_stage(const GemmConfig& config, const GemmShape& shape) {
  return padded_k(config, shape) == 128 * config.stage_chunks();
}

// What the busiest multiprocessor reads, in bytes from memory: the weights of its tiles and, if K
// takes several stages, for each tile or each two all activations again. Those come from L2, at a
// fifth of the cost.
float streaming_cost(const GemmConfig& config, const GemmShape& shape) {
  constexpr float kActivation = 2 * 0.2f;
  const int64_t tiles = ceil_div(shape.n / config.tile_n(), shape.streaming_multiprocessors);
  const int64_t reads = is_one_stage(config, shape)   ? 0
                        : reads_for_two_tiles(config) ? ceil_div(tiles, 2)
                                                      : tiles;
  return float(padded_k(config, shape)) * (kWeightBytes * float(tiles * config.tile_n()) +
                                           kActivation * float(reads * config.tile_m));
}

// The time of a product with several stages of K and up to 8 tokens, fitted on an H100.
float streaming_us(const GemmConfig& config, const GemmShape& shape) {
  constexpr float kStart = 4.9f, kBytes = 23.8e3f;  // microseconds; bytes in one
  return kStart + streaming_cost(config, shape) / kBytes;
}

int select_streaming(const GemmShape& shape) {
  // With many tiles the warps stay busy from one to the next, activations are in registers, and
  // more warps hide more (measured: lm_head 104 instead of 108 us).
  const bool many = shape.k <= 4096 && shape.n >= 256 * int64_t(shape.streaming_multiprocessors);
  int best = -1;
  for (int i = 0; i < kNumGemmConfigs; ++i) {
    const GemmConfig& config = kGemmConfigs[i];
    if (!fits_streaming(config, shape)) continue;
    if (best < 0) {
      best = i;
      continue;
    }
    const GemmConfig& other = kGemmConfigs[best];
    // The smallest token tile, then K in one stage, then what has to be read; of two equals the
    // later has more rows or smaller stages.
    if (config.tile_m != other.tile_m) continue;
    if (many && config.rows == 1 && config.warps_k == 16) return i;
    const bool one_stage = is_one_stage(config, shape);
    if (one_stage != is_one_stage(other, shape)) {
      if (one_stage) best = i;
      continue;
    }
    if (streaming_cost(config, shape) <= streaming_cost(other, shape)) best = i;
  }
  return best;
}

// The model of a product's time, in microseconds: a launch with the first loads and the last
// stores, and then what takes longest of computing, reading operands from L2 and reading weights
// from memory. All constants were fitted to measurements of all configurations on an H100.
constexpr float kLaunch = 3.6f;
// Of a sum that goes to another thread block, through the cluster's network or through memory.
constexpr float kSum = 1.0f / 5000;

// `blocks`: thread blocks at work. Fewer than the multiprocessors get no more from memory each.
float loads_us(const GemmConfig& config, const GemmShape& shape, int64_t tiles, int64_t blocks) {
  constexpr float kL2 = 7.55e6f, kMemory = 2.92e6f;  // bytes in a microsecond
  const float of_tile = float(shape.k) * float(2 * config.tile_m + kWeightBytes * config.tile_n());
  const float share = std::min(1.0f, float(blocks) / float(shape.wgmma_multiprocessors));
  return std::max(float(tiles) * of_tile / kL2,
                  float(shape.n) * float(shape.k) * kWeightBytes / (kMemory * share));
}

// What lies between two tiles of a thread block beside their steps.
float next_tile_us(const GemmConfig& config) { return 0.18f + 0.028f * float(config.tile_m); }

// With an exchange of sums each of `split` thread blocks sends all of its tile but its own part. It
// takes less where several tiles of tokens share the rows (measured with 512 tokens).
float wgmma_us(const GemmConfig& config, const GemmShape& shape, int64_t tiles, int split) {
  const float exchange_us = shape.m > 2 * config.tile_m ? 0.16f : 0.26f;
  const int64_t waves = ceil_div(tiles * split, shape.wgmma_multiprocessors);
  const int64_t steps = ceil_div(shape.k / 64, split);
  const float sums = float(config.tile_m * config.tile_n()) * float(split - 1) / float(split);
  const float exchange = split > 1 ? exchange_us * float(split) + kSum * sums : 0.0f;
  const float computing =
      float(waves * steps) * config.step_us + float(waves - 1) * next_tile_us(config) + exchange;
  return kLaunch + std::max(computing, loads_us(config, shape, tiles, tiles * split));
}

// Clusters of `split` thread blocks that surely run at once. Pairs always fit; others lose what is
// left over in groups of 16 or 18 multiprocessors, and a second wave would cost more than a split
// gains (measured: 40 clusters of 3 and 23 of 5 do not fit the 132 of an H100).
int64_t clusters_at_once(int multiprocessors, int split) {
  if (split <= 2) return multiprocessors / split;
  return 16 / split * (multiprocessors / 16) * 15 / 16;
}

// The same where all thread blocks share all tiles: slabs in equal runs, and parts of tiles to hand
// over instead of a last wave that is not full. Steps are slower, as neighbours are at different
// places of their operands.
float shared_us(const GemmConfig& config, const GemmShape& shape, int64_t tiles) {
  constexpr float kApart = 1.13f;
  const float waves = float(tiles) / float(shape.wgmma_multiprocessors);
  const float computing = kApart * waves * float(shape.k / 64) * config.step_us +
                          (waves - 1) * next_tile_us(config) +
                          kSum * float(config.tile_m * config.tile_n());
  return kLaunch + std::max(computing, loads_us(config, shape, tiles, shape.wgmma_multiprocessors));
}

// Over many waves the runs of neighbours lie so far apart that their operands meet in L2 no more
// (measured: 70B down at 4096 tokens 4160 instead of 2570 us). Whole waves first and only the rest
// shared does not help either: multiprocessors that wait leave their power to the others (70B up at
// 512 tokens 345 instead of 333). With fewer tiles than thread blocks, parts would only come when
// their readers are done, too.
bool can_share(const GemmConfig& config, const GemmShape& shape, int64_t tiles) {
  const int blocks = shape.wgmma_multiprocessors;
  return can_share_tiles(config) && blocks <= kMaxSharers && shape.k <= kMaxSharedK &&
         tiles > blocks && tiles < kMaxSharedWaves * blocks;
}

constexpr int kSplits[] = {1, 2, 3, 4, 5, 8};

struct Estimate {
  GemmChoice choice;
  float us;
};

Estimate select_wgmma(const GemmShape& shape) {
  Estimate best = {{-1, 1}, 0};
  const auto consider = [&](GemmChoice choice, float us) {
    if (best.choice.config < 0 || us < best.us) best = {choice, us};
  };
  for (int i = 0; i < kNumGemmConfigs; ++i) {
    const GemmConfig& config = kGemmConfigs[i];
    if (config.kind != GemmKind::kWgmma) continue;
    if (config.tile_m < 96 && config.tile_m < shape.m) continue;  // else codes are decoded twice
    const int64_t tiles = ceil_div(shape.m, config.tile_m) * ceil_div(shape.n, config.tile_n());
    if (can_share(config, shape, tiles))
      consider({i, kShareTiles}, shared_us(config, shape, tiles));
    for (const int split : kSplits) {
      if (split > 1 && (tiles > clusters_at_once(shape.wgmma_multiprocessors, split) ||
                        split > ceil_div(shape.k, 128) || split > max_split(config)))
        continue;
      consider({i, split}, wgmma_us(config, shape, tiles, split));
    }
  }
  return best;
}

// Of two kernels that can run. wgmma tiles are better where rows are so few that they split K
// between thread blocks: streaming then leaves multiprocessors without work, or with more of it
// than others.
bool streaming_is_faster(const GemmConfig& streaming, const GemmShape& shape,
                         const Estimate& wgmma) {
  const bool splits = wgmma.choice.split > 1;
  if (is_one_stage(streaming, shape)) {
    // Measured with 16 tokens and K of 2880 and 3072: 3 to 12 % faster, with 1024 22 % slower.
    constexpr int64_t kWorthSplitting = 2048;
    return shape.m <= 8 || !splits || shape.k <= kWorthSplitting;
  }
  // Several stages read all activations again for every two tiles of 32 rows.
  if (shape.m > 8) return false;
  return shape.m <= 4 || !splits || streaming_us(streaming, shape) <= wgmma.us;
}

}  // namespace

GemmChoice select_gemm(const GemmShape& shape) {
  // The wgmma kernels' tensor map of the scales has up to eight rows of weights in one of its own.
  const bool can_wgmma =
      shape.wgmma_multiprocessors > 0 && shape.m > 4 && shape.k % 64 == 0 && shape.n % 8 == 0;
  const int streaming = shape.streaming_multiprocessors > 0 ? select_streaming(shape) : -1;
  if (can_wgmma) {
    const Estimate wgmma = select_wgmma(shape);
    if (streaming < 0 ? shape.m > 8 : !streaming_is_faster(kGemmConfigs[streaming], shape, wgmma))
      return wgmma.choice;
  }
  if (streaming >= 0) return {streaming, 1};
  if (shape.m <= 16)
    return {0, 1};  // at most two token tiles; the second read of the weights hits L2
  if (shape.m <= 64) return {1, 1};
  return {2, 1};
}

namespace {

// Tiles that an expert's pairs fill, expected if they choose independently: the sum over i of the
// probability of more than i * tile_m pairs, in the normal approximation of their Poisson count.
double tiles_of_expert(double mean, int tile_m) {
  double tiles = 1.0 - std::exp(-mean);
  for (int i = 1; i * tile_m < mean + 8 * std::sqrt(mean) + 8; ++i)
    tiles += 0.5 * std::erfc((i * tile_m + 0.5 - mean) / std::sqrt(2 * mean));
  return tiles;
}

int select_grouped_wgmma(const MoeShape& shape, double mean) {
  constexpr double kTile = 4.5;  // microseconds of a tile beside its steps
  int best = -1;
  double best_us = 0;
  for (int i = 0; i < kNumGemmConfigs; ++i) {
    const GemmConfig& config = kGemmConfigs[i];
    if (!is_grouped_wgmma(config)) continue;
    const double segments = shape.experts * tiles_of_expert(mean, config.tile_m);
    double us = 0;
    for (const bool down : {false, true}) {
      const int64_t n = down ? shape.d : 2 * shape.inner, k = down ? shape.inner : shape.d;
      const double tiles = segments * double(ceil_div(n, config.tile_n()));
      // Tiles are expected, not counted: half a wave more on average, whatever their number.
      us += (tiles / shape.wgmma_multiprocessors + 0.5) * (double(k) / 64 * config.step_us + kTile);
    }
    if (best < 0 || us < best_us) {
      best = i;
      best_us = us;
    }
  }
  return best;
}

// Whether one token's kernel can copy the scales of eight rows of down, and hold K in one stage.
bool fits_one_token(const GemmConfig& config, const MoeShape& shape) {
  const int64_t stage = 128 * config.stage_chunks();
  return config.kind == GemmKind::kOneToken && shape.streaming_multiprocessors > 0 &&
         shape.tokens == 1 && shape.top_k <= kOneTokenPairs && shape.d <= stage &&
         shape.inner <= kOneTokenMaxInner && shape.inner % 64 == 0;
}

}  // namespace

int select_moe(const MoeShape& shape) {
  for (int i = 0; i < kNumGemmConfigs; ++i)
    if (fits_one_token(kGemmConfigs[i], shape)) return i;
  const int64_t pairs = shape.tokens * shape.top_k;
  const double mean = double(pairs) / double(shape.experts);
  // Beyond some tokens an expert's second tile costs more than the wgmma kernels' launches
  // (measured: 12). Tiles of 16 pay where several experts have more than 8, which with few experts
  // is as soon as some thread blocks have twice the work (measured with 4: 168 instead of 185 us of
  // 32 experts, 640 instead of 627 us of 128).
  const int tile_m = mean >= (shape.experts <= 64 ? 4 : 5) ? 16 : 8;
  if (shape.streaming_multiprocessors > 0 && pairs <= kStreamingMoePairs &&
      shape.experts <= kStreamingMoeExperts && mean <= 12) {
    int best = -1;
    for (int i = 0; i < kNumGemmConfigs; ++i) {
      const GemmConfig& config = kGemmConfigs[i];
      const int64_t stage = 128 * config.stage_chunks();
      if (is_streaming_moe(config) && config.tile_m == tile_m && shape.d <= stage &&
          shape.inner <= stage && shape.d % config.tile_n() == 0 &&
          2 * shape.inner % config.tile_n() == 0)
        best = i;  // of two the later has more rows: fewer handovers
    }
    if (best >= 0) return best;
  }
  if (shape.wgmma_multiprocessors > 0 && mean > 4 && shape.d % 64 == 0 && shape.inner % 64 == 0)
    return select_grouped_wgmma(shape, mean);
  return select_gemm({ceil_div(pairs, shape.experts), 2 * shape.inner, shape.d, 0, 0}).config;
}

}  // namespace jax_mxfp4
