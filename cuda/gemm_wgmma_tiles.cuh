// What the parts of the wgmma kernels (gemm_wgmma.cuh) have in common: arguments, the layout of
// shared memory, and which tiles a thread block works on.
#pragma once

#include <cuda.h>

#include "gemm.cuh"

namespace jax_mxfp4 {

// Quotients by a number that the host knows: a division costs a hundred cycles at a tile's start.
struct Divisor {
  int divisor;
  uint32_t multiplier;
  int shift;

  Divisor() = default;
  // For 0 <= n < 2^31: n / d = n * m >> 31 + l with m = ceil(2^(31 + l) / d) and 2^l >= d.
  explicit Divisor(int d) : divisor(d), multiplier(0), shift(0) {
    int bits = 0;
    while ((int64_t(1) << bits) < d) ++bits;
    if (d > 1) {
      multiplier = uint32_t(((uint64_t(1) << (31 + bits)) + d - 1) / d);
      shift = bits - 1;
    }
  }
  __device__ int quotient(int n) const {
    return divisor == 1 ? n : int(__umulhi(n, multiplier) >> shift);
  }
};

struct WgmmaArgs {
  Bias bias;
  void* out;
  DType out_type;
  int m, n, k;
  int tiles_m, tiles_n;  // dense; grouped: tiles_n only
  const uint8_t* scales;
  // Grouped epilogues only; see GemmArgs.
  const int4* tiles;
  const int32_t* tile_count;
  float alpha, limit;
  // Dense: tiles of a full band, and token tiles of a full one and of the last one.
  Divisor band, band_width, last_band_width;
  Divisor row_tiles;              // tiles_n
  Divisor slabs, blocks;          // shared
  int first_slab[kMaxSplit + 1];  // of each rank, and behind the last one
  int split;                      // thread blocks of a cluster, which share a tile and split K
  int turns;        // groups of eight tokens whose sums each of them adds up, but for the last ones
  int scale_rows;   // that lie in one row of `maps.scales`; 0: a tile's scales are copied at once
  int scale_slabs;  // slabs whose scales are copied together
  bool reads_once;  // the weights, whose rows are whole pieces of what L2 fetches
  bool shares_pieces;  // rows of the weights share such pieces with their neighbours
  bool scatter;        // `out` is not bf16 or its rows are not multiples of 16 bytes
  int last_tokens;     // dense: of the last tile of tokens
};

struct WgmmaMaps {     // boxes are {inner, outer}
  CUtensorMap x;       // bf16 [m, k], {64, kBoxTokens}
  CUtensorMap w;       // u8 [n, k / 2], {64, tile_n}
  CUtensorMap scales;  // u8 [n / scale_rows, scale_rows * k / 32], {48, tile_n / scale_rows}
  CUtensorMap out;     // bf16 [m, n], {64, 8 * kStagedGroups}
  CUtensorMap last_x;  // dense: x, {64, last_tokens}
};

template <int kConfig, Epilogue kEpilogue, bool kShared>
struct WgmmaTiles {
  static constexpr bool kGrouped = kEpilogue != Epilogue::kDense;
  // Rows of W in a lane: kFirstRow * g, and kSecondRow further on.
  static constexpr int kFirstRow = kEpilogue == Epilogue::kGateUp ? 2 : 1;
  static constexpr int kSecondRow = kEpilogue == Epilogue::kGateUp ? 1 : 8;
  static constexpr GemmConfig config = kGemmConfigs[kConfig];
  static constexpr int kTileM = config.tile_m;
  static constexpr int kWarpgroups = config.warps_n / 4;  // that compute, 64 rows each
  static constexpr int kTileN = config.tile_n();
  static_assert(kTileN == 64 * kWarpgroups);

  // Slabs that are copied together: each copy costs its barriers. More activations leave no room.
  static constexpr int kSlabsOfX = kTileM <= 128 ? 2 : 1, kSlabsOfCodes = 2;
  // Both operands of the same slabs have their barriers in common: a twelfth fewer instructions.
  // With four warpgroups there is no room for as many activations as codes.
  static constexpr bool kOneRing = kSlabsOfX == kSlabsOfCodes && kWarpgroups < 4;
  // A row's scales: those of K up to 3072 at once; otherwise, in 48 bytes, those of 16 slabs and
  // what aligning the first one costs. Rows of 48 bytes lie in different banks.
  static constexpr int kMaxScaleBytes = 96, kScaleBoxBytes = 48, kSlabsOfScales = 16;
  static constexpr int kSlabBytes = kTileM * 128;
  static constexpr int kXBytes = kSlabsOfX * kSlabBytes;
  static constexpr int kCodeBytes = kTileN * 64, kScaleBytes = kTileN * kMaxScaleBytes;
  // A grouped tile with few tokens multiplies fewer columns; it copies boxes of so many tokens.
  static constexpr int kBoxTokens = !kGrouped ? kTileM : kTileM % 64 == 0 && kTileM > 64 ? 64 : 32;
  // Sums of a thread come in groups of four: rows g and g + 8, two of eight tokens.
  static constexpr int kTokenGroups = kTileM / 8;
  static constexpr int kStagedGroups = kTileM > 104 ? kTokenGroups / 2 : kTokenGroups;
  static constexpr int kStagingBytes = kWarpgroups * kStagedGroups * 1024;

  static constexpr int kBarrierBytes = 512, kBiasBytes = kTileN * 4;
  static constexpr int kXStages = config.stages, kScaleStages = 2;
  static constexpr int kScaleOffset = kXStages * kXBytes;
  static constexpr int kStagingOffset = kScaleOffset + kScaleStages * kScaleBytes;
  static constexpr int kCodeOffset = kStagingOffset + kStagingBytes;
  // Each stage of scales has room for a bias beside it; a tile's comes with its last scales.
  static constexpr int kFree = 227 * 1024 - kBarrierBytes - kScaleStages * kBiasBytes - kCodeOffset;
  static constexpr int kMostCodeStages = kOneRing ? kXStages : 8;
  static constexpr int kCodeStages =
      kFree / kCodeBytes < kMostCodeStages ? kFree / kCodeBytes : kMostCodeStages;
  static_assert(!kOneRing || kCodeStages == kXStages);
  static constexpr int kBarrierOffset = kCodeOffset + kCodeStages * kCodeBytes;
  static constexpr int kBiasOffset = kBarrierOffset + kBarrierBytes;
  static constexpr int kSharedBytes = kBiasOffset + kScaleStages * kBiasBytes;
  static_assert(kCodeStages >= 3);
  static_assert(kStagingOffset % 1024 == 0 && kCodeOffset % 1024 == 0);
  static_assert(16 * (kXStages + kScaleStages + kCodeStages) + 8 + 8 * (kTokenGroups / 2) <=
                kBarrierBytes);

  struct Block {  // what a thread block works on
    uint32_t shared;
    uint32_t x_full, x_empty, code_full, code_empty, scale_full, scale_empty;
    uint32_t nothing;    // a barrier that nobody waits for
    uint32_t exchanged;  // of each group of sums that this thread block adds: all have come
    int rank;            // in its cluster
    int slabs, tiles;    // of a tile, and how many of them

    __device__ explicit Block(const WgmmaArgs& args, char* memory) {
      shared = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
      x_full = shared + kBarrierOffset;
      x_empty = x_full + 8 * kXStages;
      code_full = kOneRing ? x_full : x_empty + 8 * kXStages;
      code_empty = code_full + 8 * kCodeStages;
      scale_full = code_empty + 8 * kCodeStages;
      scale_empty = scale_full + 8 * kScaleStages;
      nothing = scale_empty + 8 * kScaleStages;
      exchanged = nothing + 8;
      rank = args.split > 1 ? int(ptx::cluster_rank()) : 0;
      slabs = args.k / 64;
      tiles = (kGrouped ? __ldg(args.tile_count) : args.tiles_m) * args.tiles_n;
    }
    __device__ uint32_t x(int stage) const { return shared + stage * kXBytes; }
    __device__ uint32_t codes(int stage) const { return shared + kCodeOffset + stage * kCodeBytes; }
    __device__ uint32_t scales(int stage) const {
      return shared + kScaleOffset + stage * kScaleBytes;
    }
    __device__ uint32_t bias(int stage) const { return shared + kBiasOffset + stage * kBiasBytes; }
    // Of a warpgroup: a kilobyte for every eight tokens of its 64 rows, 16 bytes swizzled within
    // 128.
    __device__ uint32_t staging(int warpgroup) const {
      return shared + kStagingOffset + warpgroup * kStagedGroups * 1024;
    }
  };

  // The tiles of a thread block one after the other, and which slabs of each are its own. All in
  // values: with references to what they come from, the compiler no longer sees that the main loop
  // is the same for all lanes, and it takes 5 % longer.
  struct Walk {
    int tile, begin, end;
    int stride, tiles, slabs;  // of the whole product; slabs of one tile
    int left;                  // shared: slabs from `begin` on, of all tiles

    // Shared: the slabs of all tiles, one tile after the other, in equal runs. kMaxSharedK and
    // kMaxSharedWaves keep the products in range.
    __device__ static int first_slab(const WgmmaArgs& args, const Block& block, int rank) {
      return args.blocks.quotient(block.tiles * block.slabs * rank);
    }
    __device__ Walk(const WgmmaArgs& args, const Block& block)
        : stride(ptx::clusters()), tiles(block.tiles), slabs(block.slabs) {
      if constexpr (kShared) {
        const int first = first_slab(args, block, blockIdx.x);
        left = first_slab(args, block, blockIdx.x + 1) - first;
        tile = args.slabs.quotient(first);
        begin = first - tile * block.slabs;
        end = min(block.slabs, begin + left);
      } else {
        tile = ptx::cluster();
        begin = args.first_slab[block.rank];
        end = args.first_slab[block.rank + 1];
      }
    }
    __device__ bool done() const { return kShared ? left == 0 : tile >= tiles; }
    __device__ void next() {
      if constexpr (kShared) {
        left -= end - begin;
        ++tile;
        begin = 0;
        end = min(slabs, left);
      } else {
        tile += stride;
      }
    }
  };

  static constexpr int kNarrower = !kGrouped ? kTileM : kTileM > 128 ? 128 : kTileM > 64 ? 64 : 32;
  static constexpr int kNarrowest = kGrouped && kTileM > 128 ? 64 : kNarrower;

  // Dense tiles come in bands of 2048 tokens, in which thread blocks that run together share both
  // operands in L2.
  static constexpr int kBand = 2048 / kTileM;

  struct Tile {
    int token, row;      // first ones; grouped: positions in the sorted pairs, rows of the expert
    int rows;            // grouped: valid tokens
    int64_t expert_row;  // grouped: the expert's first row of all weights

    // Columns to multiply: the narrowest that is compiled and holds the tokens.
    __device__ int width() const {
      return rows <= kNarrowest ? kNarrowest : rows <= kNarrower ? kNarrower : kTileM;
    }

    __device__ Tile(const WgmmaArgs& args, int index) {
      if constexpr (kGrouped) {
        const int segment = args.row_tiles.quotient(index);
        const int4 fields = __ldg(args.tiles + segment);
        row = (index - segment * args.row_tiles.divisor) * kTileN;
        token = fields.y;
        rows = fields.z;
        expert_row = int64_t(fields.x) * args.n;
      } else {
        const int band = args.band.quotient(index), rest = index - band * args.band.divisor;
        const bool last = (band + 1) * kBand >= args.tiles_m;
        const Divisor& width = last ? args.last_band_width : args.band_width;
        const int row_tile = width.quotient(rest);
        row = row_tile * kTileN;
        token = (band * kBand + rest - row_tile * width.divisor) * kTileM;
        rows = args.m - token;
        expert_row = 0;
      }
    }
  };
};

}  // namespace jax_mxfp4
