// Fused dequantize-GEMM for more than a few tokens: sm_90a, bf16.
//
// Weights are the register operand A of wgmma (64 rows a warpgroup), tokens its operand B in shared
// memory, so that a decoded weight never goes back to memory and serves up to 256 tokens.
//
//   copy warps    | codes of 128 of K, scales | activations                       (tensor maps)
//   warpgroup 0   | decode | wgmma, fetch | decode | wgmma, fetch        ...
//   warpgroup 1   |     decode | wgmma, fetch | decode | wgmma, fetch    ...
//
// K is walked through in slabs of 64, the rows of 128 bytes that the tensor cores read of the
// activations. Slab i is decoded while the product of slab i - 1 runs, and the codes of slab i + 2
// are fetched after that.
//
// Lane (g, c) = (lane / 4, lane % 4) holds rows g and g + 8 of a warp's 16, and of every 8
// positions of K the pair 2c, 2c + 1: word c of a prepared block, which is what one ldmatrix gives
// it of two blocks of both rows.
//
// Grouped products (the expert layer) read their token tiles from a schedule in device memory; each
// tile belongs to one expert. For gate_up a lane holds rows 2g and 2g + 1 instead, gate and up of
// one column, so that the activation needs no exchange.
//
// Where tiles are too few for the GPU, the thread blocks of a cluster split K and exchange their
// sums through distributed shared memory; each adds its part of the tile in the order of ranks.
// Where they leave a last wave that is far from full, all thread blocks share all tiles: each takes
// an equal run of slabs, and parts of tiles go through device memory to who has the beginning.
#pragma once

#include <cuda.h>

#include "gemm.cuh"
#include "ptx_wgmma.cuh"

namespace jax_mxfp4 {

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
  int split;        // thread blocks of a cluster, which share a tile and split K
  int scale_rows;   // that lie in one row of `maps.scales`; 0: a tile's scales are copied at once
  int scale_slabs;  // slabs whose scales are copied together
  bool scatter;     // `out` cannot be written by the copy engine
};

struct WgmmaMaps {     // boxes are {inner, outer}
  CUtensorMap x;       // bf16 [m, k], {64, kBoxTokens}
  CUtensorMap w;       // u8 [n, k / 2], {64, tile_n}
  CUtensorMap scales;  // u8 [n / scale_rows, scale_rows * k / 32], {48, tile_n / scale_rows}
  CUtensorMap out;     // 16-bit [m, n], {64, kStoreTokens}, or {64, 8} where K is split
};

// Where all thread blocks share all tiles: of each at most one part of a tile, for the thread block
// that has the tile's beginning, and whether its warpgroups have written it; who reads a part
// resets that. Kernels that use this are cooperative launches that fill the GPU: one runs at a
// time.
constexpr int kMaxPart = 256 * 128;
static __device__ float4 g_parts[kMaxSharers][kMaxPart / 4];
static __device__ unsigned g_part_written[kMaxSharers][4];

template <int kConfig, Epilogue kEpilogue, bool kShared = false>
struct WgmmaGemm {
  static constexpr bool kGrouped = kEpilogue != Epilogue::kDense;
  // Rows of W in a lane: kFirstRow * g, and kSecondRow further on.
  static constexpr int kFirstRow = kEpilogue == Epilogue::kGateUp ? 2 : 1;
  static constexpr int kSecondRow = kEpilogue == Epilogue::kGateUp ? 1 : 8;
  static constexpr GemmConfig config = kGemmConfigs[kConfig];
  static constexpr int kTileM = config.tile_m;
  static constexpr int kWarpgroups = config.warps_n / 4;  // that compute, 64 rows each
  static constexpr int kTileN = config.tile_n();
  static_assert(kTileN == 64 * kWarpgroups);
  static constexpr int kThreads = 128 * (kWarpgroups + 1);

  // Slabs that are copied together: each copy costs its barriers. More activations leave no room.
  static constexpr int kSlabsOfX = kTileM <= 64 ? 2 : 1, kSlabsOfCodes = 2;
  // A row's scales: those of K up to 3072 at once; otherwise, in 48 bytes, those of 16 slabs and
  // what aligning the first one costs. Rows of 48 bytes lie in different banks.
  static constexpr int kMaxScaleBytes = 96, kScaleBoxBytes = 48, kSlabsOfScales = 16;
  static constexpr int kSlabBytes = kTileM * 128;
  static constexpr int kXBytes = kSlabsOfX * kSlabBytes;
  static constexpr int kCodeBytes = kTileN * 64, kScaleBytes = kTileN * kMaxScaleBytes;
  // A grouped tile with few tokens multiplies fewer columns; it copies boxes of so many tokens.
  static constexpr int kBoxTokens = !kGrouped ? kTileM : kTileM > 96 ? 64 : 32;
  // Sums of a thread come in groups of four: rows g and g + 8, two of eight tokens.
  static constexpr int kTokenGroups = kTileM / 8;
  static constexpr int kStagedGroups = kTileM > 96 ? kTokenGroups / 2 : kTokenGroups;
  static constexpr int kStagingBytes = kWarpgroups * kStagedGroups * 1024;
  static constexpr int kStoreTokens = 8 * kStagedGroups;

  static constexpr int kAlignment = 1024;  // of a 128-byte swizzle
  static constexpr int kBarrierBytes = 512;
  static constexpr int kXStages = config.stages, kScaleStages = 2;
  static constexpr int kScaleOffset = kXStages * kXBytes;
  static constexpr int kStagingOffset = kScaleOffset + kScaleStages * kScaleBytes;
  static constexpr int kCodeOffset = kStagingOffset + kStagingBytes;
  static constexpr int kFree = 227 * 1024 - kAlignment - kBarrierBytes - kCodeOffset;
  static constexpr int kCodeStages = kFree / kCodeBytes < 8 ? kFree / kCodeBytes : 8;
  static constexpr int kBarrierOffset = kCodeOffset + kCodeStages * kCodeBytes;
  static constexpr int kSharedBytes = kBarrierOffset + kBarrierBytes + kAlignment;
  static_assert(kCodeStages >= 3);
  static_assert(kStagingOffset % 1024 == 0 && kCodeOffset % 1024 == 0);
  static_assert(16 * (kXStages + kScaleStages + kCodeStages) + 8 <= kBarrierBytes);

  // The register file holds 64 K; what the copy warpgroup gives up goes to the others.
  static constexpr int kComputeRegisters = kWarpgroups == 2   ? 232
                                           : kWarpgroups == 4 ? 112
                                           : kTileM > 96      ? 160
                                                              : 152;
  static constexpr int kCopyRegisters = kWarpgroups == 2                  ? 40
                                        : kWarpgroups == 4 || kTileM > 96 ? 32
                                                                          : 56;

  static constexpr int kSlotBytes = kWarpgroups * 128 * 16;  // of the exchange of sums, one group

  // Whether the exchange has room before the staging slots, which it goes on to fill.
  static constexpr bool can_split(int split) {
    const int turns = (kTokenGroups + split - 1) / split;
    return turns * split * kSlotBytes <= kStagingOffset && turns <= kStagedGroups;
  }
  static_assert(kGrouped ||
                (can_split(2) && can_split(3) && can_split(4) && can_split(5) && can_split(8)));

  struct Block {  // what a thread block works on
    uint32_t shared;
    uint32_t x_full, x_empty, code_full, code_empty, scale_full, scale_empty;
    uint32_t exchanged;  // barrier: all sums of the part that this thread block adds have come
    int rank;            // in its cluster
    int slabs, tiles;    // of a tile, and how many of them

    __device__ explicit Block(const WgmmaArgs& args, char* memory) {
      const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
      shared = (base + kAlignment - 1) / kAlignment * kAlignment;
      x_full = shared + kBarrierOffset;
      x_empty = x_full + 8 * kXStages;
      code_full = x_empty + 8 * kXStages;
      code_empty = code_full + 8 * kCodeStages;
      scale_full = code_empty + 8 * kCodeStages;
      scale_empty = scale_full + 8 * kScaleStages;
      exchanged = scale_empty + 8 * kScaleStages;
      rank = args.split > 1 ? int(ptx::cluster_rank()) : 0;
      slabs = args.k / 64;
      tiles = (kGrouped ? __ldg(args.tile_count) : args.tiles_m) * args.tiles_n;
    }
    __device__ uint32_t x(int stage) const { return shared + stage * kXBytes; }
    __device__ uint32_t codes(int stage) const { return shared + kCodeOffset + stage * kCodeBytes; }
    __device__ uint32_t scales(int stage) const {
      return shared + kScaleOffset + stage * kScaleBytes;
    }
    // One kilobyte: eight tokens of 64 rows, 16 bytes swizzled within 128.
    __device__ uint32_t staging(int warpgroup, int slot) const {
      return shared + kStagingOffset + (warpgroup * kStagedGroups + slot) * 1024;
    }
  };

  // The tiles of a thread block one after the other, and which slabs of each are its own. All in
  // values: with references to what they come from, the compiler no longer sees that the main loop
  // is the same for all lanes, and it takes 5 % longer.
  struct Walk {
    int tile, begin, end;
    int stride, tiles, slabs;  // of the whole product; slabs of one tile
    int left;                  // shared: slabs from `begin` on, of all tiles

    // Shared: the slabs of all tiles, one tile after the other, in equal runs.
    __device__ static int first_slab(const Block& block, int rank) {
      return int(int64_t(block.tiles) * block.slabs * rank / gridDim.x);
    }
    __device__ Walk(const WgmmaArgs& args, const Block& block)
        : stride(gridDim.x / args.split), tiles(block.tiles), slabs(block.slabs) {
      if constexpr (kShared) {
        const int first = first_slab(block, blockIdx.x);
        left = first_slab(block, blockIdx.x + 1) - first;
        tile = first / block.slabs;
        begin = first % block.slabs;
        end = min(block.slabs, begin + left);
      } else {
        tile = blockIdx.x / args.split;
        begin = block.slabs * block.rank / args.split;
        end = block.slabs * (block.rank + 1) / args.split;
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
        const int4 fields = __ldg(args.tiles + index / args.tiles_n);
        row = index % args.tiles_n * kTileN;
        token = fields.y;
        rows = fields.z;
        expert_row = int64_t(fields.x) * args.n;
      } else {
        // Bands of 2048 tokens, in which thread blocks that run together share both operands in
        // L2.
        constexpr int kBand = 2048 / kTileM;
        const int band = index / (kBand * args.tiles_n);
        const int rest = index - band * kBand * args.tiles_n;
        const int width = min(kBand, args.tiles_m - band * kBand);
        row = rest / width * kTileN;
        token = (band * kBand + rest % width) * kTileM;
        rows = args.m - token;
        expert_row = 0;
      }
    }
  };

  __device__ static void copy_weights(const WgmmaArgs& args, const WgmmaMaps& maps,
                                      const Block& block) {
    Ring<kCodeStages> codes;
    Ring<kScaleStages> scales;
    const int scale_bytes = args.k / kBlockSize, group = args.scale_rows;
    for (Walk walk(args, block); !walk.done(); walk.next()) {
      const Tile tile(args, walk.tile);
      const int row = int(tile.expert_row) + tile.row;
      int next_scales = walk.begin;
      for (int slab = walk.begin; slab < walk.end; slab += kSlabsOfCodes, codes.advance()) {
        if (slab == next_scales) {
          ptx::barrier_wait(block.scale_empty + 8 * scales.index, scales.parity ^ 1);
          const uint32_t full = block.scale_full + 8 * scales.index;
          const uint32_t to = block.scales(scales.index);
          if (group) {
            ptx::barrier_arrive_expect(full, kTileN * kScaleBoxBytes);
            for (int i = 0; i < group; ++i)
              ptx::tensor_load(to + i * (kTileN / group * kScaleBoxBytes), &maps.scales,
                               first_scale(i * scale_bytes, slab) / 16 * 16, row / group, full);
          } else {
            const int bytes = min(kTileN, args.n - tile.row) * scale_bytes;
            ptx::barrier_arrive_expect(full, bytes);
            ptx::bulk_copy(to, args.scales + int64_t(row) * scale_bytes, bytes, full);
          }
          scales.advance();
          next_scales += args.scale_slabs;
        }
        ptx::barrier_wait(block.code_empty + 8 * codes.index, codes.parity ^ 1);
        const uint32_t full = block.code_full + 8 * codes.index;
        ptx::barrier_arrive_expect(full, kCodeBytes);
        ptx::tensor_load(block.codes(codes.index), &maps.w, slab * 32, row, full);
      }
    }
  }

  // Where the scales of a row from `slab` on begin, in a row of the tensor map.
  __device__ static int first_scale(int row_offset, int slab) { return row_offset + 2 * slab; }

  __device__ static void copy_activations(const WgmmaArgs& args, const WgmmaMaps& maps,
                                          const Block& block) {
    Ring<kXStages> ring;
    for (Walk walk(args, block); !walk.done(); walk.next()) {
      const Tile tile(args, walk.tile);
      const int width = tile.width();
      for (int slab = walk.begin; slab < walk.end; slab += kSlabsOfX, ring.advance()) {
        ptx::barrier_wait(block.x_empty + 8 * ring.index, ring.parity ^ 1);
        const uint32_t full = block.x_full + 8 * ring.index;
        ptx::barrier_arrive_expect(full, width * kSlabsOfX * 128);
#pragma unroll
        for (int i = 0; i < kSlabsOfX; ++i) {
          const uint32_t to = block.x(ring.index) + i * kSlabBytes;
          const int k = (slab + i) * 64;
          for (int token = 0; token < width; token += kBoxTokens)
            ptx::tensor_load(to + token * 128, &maps.x, k, tile.token + token, full);
        }
      }
    }
  }

  // For a warp, whose accesses so far are over.
  __device__ static void arrive(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(barrier);
  }

  // What a lane needs for one slab.
  struct Packed {
    uint4 codes;         // of rows g and g + 8: two words of the first block, two of the next
    uint32_t scales[2];  // of rows g and g + 8: two bytes
  };

  __device__ static uint32_t half_of(uint32_t pair, int half) {
    const __nv_bfloat162 v = reinterpret_cast<const __nv_bfloat162&>(pair);
    const __nv_bfloat162 both = half ? __high2bfloat162(v) : __low2bfloat162(v);
    return reinterpret_cast<const uint32_t&>(both);
  }

  // Operand A of a slab's k16 steps: registers are rows g, g + 8, then the same 8 of K later.
  using Operand = uint32_t[4][4];
  using Sums = float[kTileM / 2];

  // kWide: for any scale.
  template <bool kWide>
  __device__ static void decode(const Packed& packed, Operand& a) {
    const uint4& w = packed.codes;
    const uint32_t words[2][2] = {{w.x, w.z}, {w.y, w.w}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t scales = packed.scales[half];
      const uint32_t narrow = __byte_perm(scales, 0, 0x4140) * 128u + 126u * 0x00800080u;
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const ScaleFactor factor = kWide ? scale_factor(scales >> (8 * block) & 0xff)
                                         : ScaleFactor{half_of(narrow, block), 0};
        const uint32_t word = words[half][block];
        a[2 * block][half] = decode_pair<0, kWide>(word, factor);
        a[2 * block][2 + half] = decode_pair<1, kWide>(word, factor);
        a[2 * block + 1][half] = decode_pair<2, kWide>(word, factor);
        a[2 * block + 1][2 + half] = decode_pair<3, kWide>(word, factor);
      }
    }
  }

  // Whether a scale may need two factors: those from 128 on, of which 128 itself does not.
  __device__ static bool may_be_wide(const Packed& packed) {
    return ((packed.scales[0] | packed.scales[1]) & 0x8080u) != 0;
  }

  // A computing warpgroup's place in the rings, which goes on from tile to tile.
  struct Cursor {
    Ring<kXStages> x;
    Ring<kCodeStages> codes;
    Ring<kScaleStages> scales;
    uint32_t code_offset;      // of the row and the block whose address a lane gives to ldmatrix
    uint32_t scale_offset[2];  // of rows g and g + 8
    int scale_row[2];
    uint32_t scale[2];  // addresses, of the pair of slabs that is next
    int next_scales;    // slab that needs another stage
    int begin;          // of the tile

    __device__ Cursor(const WgmmaArgs& args) {
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = args.scale_rows;
      const int row = warp * 16 + lane % 8 * kFirstRow + lane / 8 % 2 * kSecondRow;
      // The copy engine swaps the four blocks of a row by bits 1 and 2 of the row's number.
      code_offset = row * 64 + (lane / 16 ^ row / 2 % 4) * kBlockBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane / 4 * kFirstRow + half * kSecondRow;
        const int scale_bytes = args.k / kBlockSize;
        scale_offset[half] = group ? (row % group * (kTileN / group) + row / group) * kScaleBoxBytes
                                   : row * scale_bytes;
        scale_row[half] = group ? row % group * scale_bytes : 0;
      }
    }
  };

  // Slab i of the tile, odd or even, the last one perhaps. Frees what is not needed any more.
  template <int kOdd>
  __device__ static void fetch(const WgmmaArgs& args, const Block& block, Cursor& cursor, int i,
                               bool last, Packed& packed) {
    if (!kOdd && i == cursor.next_scales) {
      const int scale_mask = args.scale_rows ? 15 : ~0;
      ptx::barrier_wait(block.scale_full + 8 * cursor.scales.index, cursor.scales.parity);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        cursor.scale[half] = block.scales(cursor.scales.index) + cursor.scale_offset[half] +
                             (first_scale(cursor.scale_row[half], cursor.begin + i) & scale_mask);
      cursor.next_scales += args.scale_slabs;
    }
    if (!kOdd) ptx::barrier_wait(block.code_full + 8 * cursor.codes.index, cursor.codes.parity);
    packed.codes =
        ptx::load_matrices(block.codes(cursor.codes.index) + (cursor.code_offset ^ (kOdd * 32)));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      packed.scales[half] = ptx::load_shared2(cursor.scale[half] + 2 * kOdd);
      if (kOdd) cursor.scale[half] += 4;
    }
    if (kOdd || last) {
      arrive(block.code_empty + 8 * cursor.codes.index);
      cursor.codes.advance();
      if (last || i + 1 == cursor.next_scales) {
        ptx::barrier_arrive(block.scale_empty + 8 * cursor.scales.index);
        cursor.scales.advance();
      }
    }
  }
  static_assert(kSlabsOfCodes == 2 && kSlabsOfScales % 2 == 0);

  // Descriptor of operand B: rows of 128 bytes, swizzled, eight rows 1024 bytes apart.
  __device__ static uint64_t descriptor(uint32_t shared) {
    return (uint64_t(1) << 62) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 16) | (shared >> 4);
  }

  // One slab: the products of the first kWidth tokens.
  template <int kWidth>
  __device__ static void multiply_slab(const Operand& a, uint64_t x, Sums& sums) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      ptx::Wgmma<kWidth>::multiply(reinterpret_cast<float (&)[kWidth / 2]>(sums), a[k],
                                   x + k * 32 / 16);
  }

  // What the even and the odd slabs of a tile have each.
  struct Pipeline {
    Packed packed[2];
    Operand operands[2];
    uint32_t x_empty[2];  // of the slabs whose products may be running
  };

  template <int kOdd>
  __device__ static void do_slab(const WgmmaArgs& args, const Block& block, int i, int slabs,
                                 int width, Cursor& cursor, Pipeline& pipeline, Sums& sums) {
    Packed& packed = pipeline.packed[kOdd];
    Operand& a = pipeline.operands[kOdd];
    ptx::wgmma_wait<1>();  // the product before the last one has read its operands
    if (i > 1 && (kOdd || kSlabsOfX == 1)) arrive(pipeline.x_empty[kOdd]);
    if (__builtin_expect(__any_sync(0xffffffffu, may_be_wide(packed)), false))
      decode<true>(packed, a);
    else
      decode<false>(packed, a);
    if (kSlabsOfX == 1 || !kOdd)
      ptx::barrier_wait(block.x_full + 8 * cursor.x.index, cursor.x.parity);
    ptx::wgmma_fence();
    const uint64_t x =
        descriptor(block.x(cursor.x.index) + (kSlabsOfX == 2 ? kOdd * kSlabBytes : 0));
    // One copy of this loop: with one for each width, registers are spilled.
    if (kNarrowest < kNarrower && width == kNarrowest)
      multiply_slab<kNarrowest>(a, x, sums);
    else if (kNarrower < kTileM && width == kNarrower)
      multiply_slab<kNarrower>(a, x, sums);
    else
      multiply_slab<kTileM>(a, x, sums);
    ptx::wgmma_commit();
    pipeline.x_empty[kOdd] = block.x_empty + 8 * cursor.x.index;
    if (kSlabsOfX == 1 || kOdd || i + 1 == slabs) cursor.x.advance();
    if (i + 2 < slabs) fetch<kOdd>(args, block, cursor, i + 2, i + 3 == slabs, packed);
  }

  __device__ static void multiply_tile(const WgmmaArgs& args, const Block& block, const Tile& tile,
                                       const Walk& walk, Cursor& cursor, Sums& sums) {
    const int slabs = walk.end - walk.begin, width = tile.width();
    Pipeline pipeline;
    cursor.next_scales = 0;
    cursor.begin = walk.begin;
    fetch<0>(args, block, cursor, 0, slabs == 1, pipeline.packed[0]);
    if (slabs > 1) fetch<1>(args, block, cursor, 1, slabs == 2, pipeline.packed[1]);
    for (int i = 0; i < slabs; i += 2) {
      do_slab<0>(args, block, i, slabs, width, cursor, pipeline, sums);
      if (i + 1 == slabs) break;
      do_slab<1>(args, block, i + 1, slabs, width, cursor, pipeline, sums);
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTileM / 2; ++i) ptx::keep_register(sums[i]);
    // Of the last two slabs, which may be those of one stage.
    arrive(pipeline.x_empty[0]);
    if (slabs > 1 && (kSlabsOfX == 1 || slabs % 2 == 1)) arrive(pipeline.x_empty[1]);
  }

  __device__ static void compute(const WgmmaArgs& args, const WgmmaMaps& maps, const Block& block) {
    Cursor cursor(args);
    for (Walk walk(args, block); !walk.done(); walk.next()) {
      const Tile tile(args, walk.tile);
      Sums sums = {};
      multiply_tile(args, block, tile, walk, cursor, sums);
      if constexpr (kEpilogue == Epilogue::kGateUp)
        write_hidden(args, block, tile, sums);
      else if constexpr (kEpilogue == Epilogue::kDown)
        write_partial(args, tile, sums);
      else if constexpr (kShared)
        finish_shared(args, maps, block, tile, walk, sums);
      else if (args.split == 1)
        write_tile(args, maps, block, tile, sums);
      else
        exchange(args, maps, block, tile, sums);
    }
    if (threadIdx.x % 128 == 0) ptx::bulk_store_wait_read();
  }

  // The thread block that has a tile's first slab adds what the others, which follow it, bring.
  __device__ static void finish_shared(const WgmmaArgs& args, const WgmmaMaps& maps,
                                       const Block& block, const Tile& tile, const Walk& walk,
                                       Sums& sums) {
    if (walk.begin > 0) {
      hand_over(sums);
    } else {
      const int end = (walk.tile + 1) * block.slabs;
      for (int rank = blockIdx.x + 1; rank < int(gridDim.x); ++rank) {
        const int first = Walk::first_slab(block, rank);
        if (first >= end) break;
        if (first < Walk::first_slab(block, rank + 1)) collect(rank, sums);
      }
      write_tile(args, maps, block, tile, sums);
    }
  }

  __device__ static float4* part_of(int rank) {
    static_assert(kTileM * kTileN <= kMaxPart);
    return g_parts[rank] + threadIdx.x / 128 * kTokenGroups * 128 + threadIdx.x % 128;
  }

  __device__ static void hand_over(const Sums& sums) {
    const int warpgroup = threadIdx.x / 128;
    float4* to = part_of(blockIdx.x);
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      const float* v = sums + 4 * j;
      __stcg(to + j * 128, make_float4(v[0], v[1], v[2], v[3]));
    }
    ptx::named_barrier_sync(1 + warpgroup, 128);
    if (threadIdx.x % 128 == 0) {
      __threadfence();
      atomicExch(&g_part_written[blockIdx.x][warpgroup], 1u);
    }
  }

  __device__ static void collect(int rank, Sums& sums) {
    const int warpgroup = threadIdx.x / 128;
    if (threadIdx.x % 128 == 0) {
      unsigned* written = &g_part_written[rank][warpgroup];
      while (ptx::load_relaxed(written) == 0) {
      }
      __threadfence();
      *written = 0;
    }
    ptx::named_barrier_sync(1 + warpgroup, 128);
    const float4* from = part_of(rank);
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      const float4 v = __ldcg(from + j * 128);
      sums[4 * j] += v.x;
      sums[4 * j + 1] += v.y;
      sums[4 * j + 2] += v.z;
      sums[4 * j + 3] += v.w;
    }
  }

  // Sums of group j (eight tokens), with the bias, to the staging slot or, where
  // the copy engine cannot write them, to `out`.
  __device__ static void put(const WgmmaArgs& args, const Block& block, const Tile& tile, int j,
                             int slot, float (&v)[4]) {
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int row = tile.row + warpgroup * 64 + warp * 16 + lane / 4;
    if (args.bias.data) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = min(row + 8 * half, args.n - 1);
        const float bias = load_float(args.bias.data, args.bias.type, n);
        v[2 * half] += bias;
        v[2 * half + 1] += bias;
      }
    }
    if (args.scatter) {
      const int token = tile.token + j * 8 + 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = token + i % 2, n = row + 8 * (i / 2);
        if (m < args.m && n < args.n)
          store_float(args.out, args.out_type, int64_t(m) * args.n + n, v[i]);
      }
    } else {
      const int token = lane % 8, unit = 2 * warp + lane / 8 % 2;
      ptx::store_matrix_transposed(
          block.staging(warpgroup, slot) + token * 128 + (unit ^ token) * 16,
          pack_pair(v[0], v[1], args.out_type), pack_pair(v[2], v[3], args.out_type));
    }
  }

  __device__ static void write_tile(const WgmmaArgs& args, const WgmmaMaps& maps,
                                    const Block& block, const Tile& tile, Sums& sums) {
    const int warpgroup = threadIdx.x / 128;
    const bool leader = threadIdx.x % 128 == 0;
#pragma unroll
    for (int first = 0; first < kTokenGroups; first += kStagedGroups) {
      if (leader) ptx::bulk_store_wait_read();
      ptx::named_barrier_sync(1 + warpgroup, 128);
#pragma unroll
      for (int j = first; j < first + kStagedGroups; ++j) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = sums[4 * j + i];
        put(args, block, tile, j, j - first, v);
      }
      if (args.scatter) continue;
      ptx::async_proxy_fence();
      ptx::named_barrier_sync(1 + warpgroup, 128);
      if (leader) {
        // A box is kStoreTokens tokens of 64 rows.
        for (int j = first; j < first + kStagedGroups; j += kStoreTokens / 8) {
          const int row = tile.row + warpgroup * 64;
          const int token = tile.token + j * 8;
          if (row < args.n && token < args.m)
            ptx::tensor_store(&maps.out, row, token, block.staging(warpgroup, j - first));
        }
        ptx::bulk_store_commit();
      }
    }
  }
  // Bias and clamped SwiGLU; through shared memory, so that a token's 32 columns leave together.
  // The copy engine would also write what lies past the last token, which belongs to another tile.
  __device__ static void write_hidden(const WgmmaArgs& args, const Block& block, const Tile& tile,
                                      const Sums& sums) {
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    const int warp = thread / 32, lane = thread % 32;
    const int first_row = tile.row + warpgroup * 64, row = first_row + warp * 16 + lane / 4 * 2;
    float bias[2] = {};
    if (args.bias.data && row < args.n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        bias[i] = load_float(args.bias.data, args.bias.type, tile.expert_row + row + i);
    const uint32_t staging = block.staging(warpgroup, 0);
    ptx::named_barrier_sync(1 + warpgroup, 128);  // the tile before has left it
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      if (8 * j >= tile.rows) break;
      float h[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        h[i] = clamped_swiglu(sums[4 * j + i] + bias[0], sums[4 * j + 2 + i] + bias[1], args.alpha,
                              args.limit);
      const int token = lane % 8;
      ptx::store_matrix_transposed(staging + (8 * j + token) * 64 + (warp ^ (token / 2)) * 16,
                                   pack_pair(h[0], h[1], DType::kBF16));
    }
    ptx::named_barrier_sync(1 + warpgroup, 128);
    const int columns = args.n / 2;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out);
    for (int i = thread; i < 4 * tile.rows; i += 128) {
      const int token = i / 4, unit = i % 4, column = first_row / 2 + unit * 8;
      if (column < columns)
        *reinterpret_cast<uint4*>(out + int64_t(tile.token + token) * columns + column) =
            ptx::load_shared16(staging + token * 64 + (unit ^ (token / 2 % 4)) * 16);
    }
  }

  // With the bias: eight rows of a token fill a sector, so every lane writes for itself.
  __device__ static void write_partial(const WgmmaArgs& args, const Tile& tile, const Sums& sums) {
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int row = tile.row + warpgroup * 64 + warp * 16 + lane / 4;
    const int first_token = 2 * (lane % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = row + 8 * half;
      if (n >= args.n) continue;
      const float bias =
          args.bias.data ? load_float(args.bias.data, args.bias.type, tile.expert_row + n) : 0.0f;
      float* out = static_cast<float*>(args.out) + int64_t(tile.token + first_token) * args.n + n;
#pragma unroll
      for (int j = 0; j < kTokenGroups; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (8 * j + i + first_token < tile.rows)
            out[int64_t(8 * j + i) * args.n] = sums[4 * j + 2 * half + i] + bias;
        }
    }
  }

  __device__ static void exchange(const WgmmaArgs& args, const WgmmaMaps& maps, const Block& block,
                                  const Tile& tile, Sums& sums) {
    const int warpgroup = threadIdx.x / 128;
    ptx::cluster_sync_relaxed();  // nobody reads its rings any more
    const uint32_t mine = block.shared + threadIdx.x * 16;
    int owner = 0, turn = 0;
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = sums[4 * j + i];
      ptx::store_async16(
          ptx::shared_of_rank(mine + (turn * args.split + block.rank) * kSlotBytes, owner), v,
          ptx::shared_of_rank(block.exchanged, owner));
      if (++owner == args.split) {
        owner = 0;
        ++turn;
      }
    }
    ptx::barrier_wait(block.exchanged, 0);
    for (int j = block.rank, i = 0; j < kTokenGroups; j += args.split, ++i) {
      float v[4] = {};
      for (int rank = 0; rank < args.split; ++rank) {
        const uint4 part = ptx::load_shared16(mine + (i * args.split + rank) * kSlotBytes);
        v[0] += __uint_as_float(part.x);
        v[1] += __uint_as_float(part.y);
        v[2] += __uint_as_float(part.z);
        v[3] += __uint_as_float(part.w);
      }
      put(args, block, tile, j, i, v);
    }
    if (args.scatter) return;
    ptx::async_proxy_fence();
    ptx::named_barrier_sync(1 + warpgroup, 128);
    if (threadIdx.x % 128 == 0) {
      for (int j = block.rank, i = 0; j < kTokenGroups; j += args.split, ++i) {
        const int row = tile.row + warpgroup * 64;
        const int token = tile.token + j * 8;
        if (row < args.n && token < args.m)
          ptx::tensor_store(&maps.out, row, token, block.staging(warpgroup, i));
      }
      ptx::bulk_store_commit();
    }
  }

  __device__ static void run(const WgmmaArgs& args, const WgmmaMaps& maps, char* memory) {
    const Block block(args, memory);
    if (threadIdx.x == 0) {
      init_ring(block.x_full, kXStages, 4 * kWarpgroups);
      init_ring(block.code_full, kCodeStages, 4 * kWarpgroups);
      // Every lane frees scales: racecheck does not see that a lane may do it for its warp, and
      // looks at plain bulk copies.
      init_ring(block.scale_full, kScaleStages, 128 * kWarpgroups);
      if (args.split > 1) {
        const int groups = (kTokenGroups - block.rank + args.split - 1) / args.split;
        ptx::barrier_init(block.exchanged, 1);
        ptx::barrier_arrive_expect(block.exchanged, groups * args.split * kSlotBytes);
      }
      ptx::barrier_init_fence();
    } else if (threadIdx.x == 32) {
      ptx::prefetch_tensor_map(&maps.x);
      ptx::prefetch_tensor_map(&maps.w);
      ptx::prefetch_tensor_map(&maps.scales);
      if (!args.scatter) ptx::prefetch_tensor_map(&maps.out);
    }
    __syncthreads();
    if (threadIdx.x < 128 * kWarpgroups) {
      ptx::claim_registers<kComputeRegisters>();
      compute(args, maps, block);
    } else {
      ptx::release_registers<kCopyRegisters>();
      const int thread = threadIdx.x - 128 * kWarpgroups;
      if (thread == 0)
        copy_weights(args, maps, block);
      else if (thread == 32)
        copy_activations(args, maps, block);
      __syncwarp();
      if (args.split > 1) ptx::cluster_sync_relaxed();  // which counts every thread
    }
  }

  // The copy warps fill; so many arrivals of the computing warps empty. The empty barriers lie
  // behind the full ones.
  __device__ static void init_ring(uint32_t full, int stages, int arrivals) {
    for (int s = 0; s < stages; ++s) {
      ptx::barrier_init(full + 8 * s, 1);
      ptx::barrier_init(full + 8 * (stages + s), arrivals);
    }
  }
};

// y = x * w^T + bias, or a grouped product (split 1), with a wgmma configuration; see
// gemm_wgmma.cu and moe_wgmma.cu.
// `split` as in GemmChoice.
cudaError_t launch_wgmma(int config, int split, const GemmArgs& args, int multiprocessors,
                         cudaStream_t stream);
cudaError_t launch_grouped_wgmma(Epilogue epilogue, int config, const GemmArgs& args,
                                 int multiprocessors, cudaStream_t stream);

}  // namespace jax_mxfp4
