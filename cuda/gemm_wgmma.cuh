// Fused dequantize-GEMM for more than a few tokens: sm_90a, bf16.
//
// Weights are the register operand A of wgmma (64 rows a warpgroup), tokens its operand B in shared
// memory, so that a decoded weight never goes back to memory and serves up to 256 tokens.
//
//   copy warps    | codes of 128 of K, scales of 512 of K | activations            (tensor maps)
//   order warps   |                         up to 96 tokens: transpose activations
//   warpgroup 0   | fetch, decode | wgmma        | fetch, decode | wgmma        ...
//   warpgroup 1   |       fetch, decode | wgmma        | fetch, decode | wgmma  ...
//
// A step is 128 of K, or 64 for more tokens. Step i is decoded while the product of step i - 1
// runs, and the codes of step i + 1 are fetched before.
//
// Lane (g, c) = (lane / 4, lane % 4) holds rows g and g + 8 of a warp's 16, and of every 8
// positions of K the pair 2c, 2c + 1. There are two ways to meet this with the canonical bytes:
//
// clang-format off
//   kTransposed   Of each 64 lane c takes words 2c and 2c + 1, and the nibbles i of both are its pair
//                 in positions 8i + 2c and 8i + 2c + 1: position 8i + w is element 8w + i. The
//                 activations are brought into this order in place: the eight 16-byte rows of 64
//                 elements of a token are transposed by one ldmatrix and one stmatrix. Decoding
//                 costs 18 instructions for 8 weights.
//   otherwise     K as it is: lane c takes byte c of each word, out of a 16-byte load which the four
//                 lanes of a row share. 22 instructions for 8 weights, which more tokens hide, and
//                 nothing added to the traffic of shared memory, which more tokens fill.
// clang-format on
//
// Grouped products (the expert layer) read their token tiles from a schedule in device memory; each
// tile belongs to one expert. For gate_up a lane holds rows 2g and 2g + 1 instead, gate and up of
// one column, so that the activation needs no exchange.
//
// Where tiles are too few for the GPU, the thread blocks of a cluster split K and exchange their
// sums through distributed shared memory; each adds its part of the tile in the order of ranks.
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
  // Grouped epilogues only; see GemmArgs.
  const int4* tiles;
  const int32_t* tile_count;
  float alpha, limit;
  int split;       // thread blocks of a cluster, which share a tile and split K
  int scale_rows;  // that lie in one row of `maps.scales`
  bool scatter;    // `out` cannot be written by the copy engine
};

struct WgmmaMaps {     // boxes are {inner, outer}
  CUtensorMap x;       // bf16 [m, k], {64, kBoxTokens}
  CUtensorMap w;       // u8 [n, k / 2], {64, tile_n}
  CUtensorMap scales;  // u8 [n / scale_rows, scale_rows * k / 32], {32, tile_n / scale_rows}
  CUtensorMap out;     // 16-bit [m, n], {64, kStoreTokens}, or {64, 8} where K is split
};

template <int kConfig, Epilogue kEpilogue>
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
  static constexpr bool kTransposed = kTileM <= 96;

  // Of K. A step costs its barriers, so that it should be long, but more sums leave it no
  // registers.
  static constexpr int kStep = kTileM > 64 ? 64 : 128;
  static constexpr int kStepsPerCodes = 128 / kStep, kStepsPerScales = 512 / kStep;
  // Rows of 128 bytes, 64 elements of K, are what the tensor cores read: a slab.
  static constexpr int kSlabs = kStep / 64, kSlabBytes = kTileM * 128;
  static constexpr int kScaleRowBytes = 32;  // 16, and what aligning the first one costs
  static constexpr int kXBytes = kSlabs * kSlabBytes;
  static constexpr int kCodeBytes = kTileN * 64, kScaleBytes = kTileN * kScaleRowBytes;
  // A grouped tile with few tokens multiplies fewer columns; it copies boxes of so many tokens.
  static constexpr int kBoxTokens = !kGrouped ? kTileM : kTileM > 96 ? 64 : 32;
  // Sums of a thread come in groups of four: rows g and g + 8, two of eight tokens.
  static constexpr int kTokenGroups = kTileM / 8;
  static constexpr int kStagedGroups = kTileM > 128 ? kTokenGroups / 2 : kTokenGroups;
  static constexpr int kStagingBytes = kWarpgroups * kStagedGroups * 1024;
  static constexpr int kStoreTokens = kTileM > 128 ? kTileM / 2 : kTileM;

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
  static_assert(kCodeStages >= 3 && kStagingOffset % 1024 == 0 && kCodeOffset % 1024 == 0);
  static_assert(24 * kXStages + 16 * (kScaleStages + kCodeStages) <= kBarrierBytes);

  // The register file holds 64 K; what the copy warpgroup gives up goes to the others.
  static constexpr int kComputeRegisters = kWarpgroups == 2 ? 224 : kTileM > 96 ? 160 : 152;
  static constexpr int kCopyRegisters = kWarpgroups == 2 ? 56 : kTileM > 96 ? 32 : 56;

  // Whether the exchange of sums has room in the memory of the rings.
  static constexpr bool can_split(int split) {
    return (kTokenGroups + split - 1) / split * split * kWarpgroups * 128 * 16 <=
           kCodeOffset + kCodeStages * kCodeBytes;
  }
  static_assert(kGrouped || kTileM > kMaxSplitTileM ||
                (can_split(2) && can_split(3) && can_split(4) && can_split(5) && can_split(8)));

  struct Block {  // what a thread block works on
    uint32_t shared;
    uint32_t x_full, x_empty, x_ready, code_full, code_empty, scale_full, scale_empty;
    int rank;        // in its cluster
    int begin, end;  // steps
    bool ragged;     // half of the last step is past the end of K
    int first_tile, tile_stride, tiles;

    __device__ explicit Block(const WgmmaArgs& args, char* memory) {
      const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
      shared = (base + kAlignment - 1) / kAlignment * kAlignment;
      x_full = shared + kBarrierOffset;
      x_empty = x_full + 8 * kXStages;
      x_ready = kTransposed ? x_empty + 8 * kXStages : x_full;  // in the order of K that is used
      code_full = x_empty + 16 * kXStages;
      code_empty = code_full + 8 * kCodeStages;
      scale_full = code_empty + 8 * kCodeStages;
      scale_empty = scale_full + 8 * kScaleStages;
      rank = args.split > 1 ? int(ptx::cluster_rank()) : 0;
      const int steps = (args.k + kStep - 1) / kStep;
      begin = steps * rank / args.split;
      end = steps * (rank + 1) / args.split;
      ragged = kSlabs > 1 && end == steps && args.k % kStep != 0;
      first_tile = blockIdx.x / args.split;
      tile_stride = gridDim.x / args.split;
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
    for (int t = block.first_tile; t < block.tiles; t += block.tile_stride) {
      const Tile tile(args, t);
      const int row = int(tile.expert_row) + tile.row;
      for (int step = block.begin; step < block.end; step += kStepsPerCodes, codes.advance()) {
        if ((step - block.begin) % kStepsPerScales == 0) {
          ptx::barrier_wait(block.scale_empty + 8 * scales.index, scales.parity ^ 1);
          const uint32_t full = block.scale_full + 8 * scales.index;
          ptx::barrier_arrive_expect(full, kScaleBytes);
          for (int i = 0; i < group; ++i)
            ptx::tensor_load(block.scales(scales.index) + i * (kScaleBytes / group), &maps.scales,
                             first_scale(i * scale_bytes, step) / 16 * 16, row / group, full);
          scales.advance();
        }
        ptx::barrier_wait(block.code_empty + 8 * codes.index, codes.parity ^ 1);
        const uint32_t full = block.code_full + 8 * codes.index;
        ptx::barrier_arrive_expect(full, kCodeBytes);
        ptx::tensor_load(block.codes(codes.index), &maps.w, step * (kStep / 2), row, full);
      }
    }
  }

  // Where the scales of a row from `step` on begin, in a row of the tensor map.
  __device__ static int first_scale(int row_offset, int step) {
    return row_offset + step * (kStep / kBlockSize);
  }

  __device__ static void copy_activations(const WgmmaArgs& args, const WgmmaMaps& maps,
                                          const Block& block) {
    Ring<kXStages> ring;
    for (int t = block.first_tile; t < block.tiles; t += block.tile_stride) {
      const Tile tile(args, t);
      const int width = tile.width();
      for (int step = block.begin; step < block.end; ++step, ring.advance()) {
        ptx::barrier_wait(block.x_empty + 8 * ring.index, ring.parity ^ 1);
        const uint32_t full = block.x_full + 8 * ring.index;
        ptx::barrier_arrive_expect(full, width * kSlabs * 128);
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab)
          for (int token = 0; token < width; token += kBoxTokens)
            ptx::tensor_load(block.x(ring.index) + slab * kSlabBytes + token * 128, &maps.x,
                             step * kStep + slab * 64, tile.token + token, full);
      }
    }
  }

  // For a warp, whose accesses so far are over.
  __device__ static void arrive(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(barrier);
  }

  // Chunk r of a token's eight becomes element r of each of them. Two warps have a slab each, or
  // every other 16 tokens of the only one.
  __device__ static void transpose_activations(const WgmmaArgs& args, const Block& block,
                                               int warp) {
    constexpr int kWarpsPerSlab = 2 / kSlabs;
    const int slab = warp / kWarpsPerSlab, first_token = warp % kWarpsPerSlab * 16;
    const int lane = threadIdx.x % 32, token = lane / 8, chunk = lane % 8;
    const uint32_t low = token * 128 + (chunk ^ token) * 16;  // tokens 8n to 8n + 3
    const uint32_t high = 512 + (low ^ 64);                   // 8n + 4 to 8n + 7
    Ring<kXStages> ring;
    for (int t = block.first_tile; t < block.tiles; t += block.tile_stride) {
      const int width = Tile(args, t).width();
      for (int step = block.begin; step < block.end; ++step, ring.advance()) {
        ptx::barrier_wait(block.x_full + 8 * ring.index, ring.parity);
        const uint32_t tokens = block.x(ring.index) + slab * kSlabBytes;
        for (int first = first_token; first < width; first += 16 * kWarpsPerSlab) {
          const uint32_t x = tokens + first * 128;
          const uint32_t address[4] = {x + low, x + high, x + 1024 + low, x + 1024 + high};
          uint4 matrices[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) matrices[i] = ptx::load_matrices_transposed(address[i]);
#pragma unroll
          for (int i = 0; i < 4; ++i) ptx::store_matrices(address[i], matrices[i]);
        }
        ptx::async_proxy_fence();
        arrive(block.x_ready + 8 * ring.index);
      }
    }
  }

  // What a lane needs for one step: of rows g and g + 8 the codes and the scales.
  struct Packed {
    uint4 codes[kSlabs][2][2];   // kTransposed: x and y of the first
    uint32_t scales[kSlabs][2];  // bytes; kTransposed: one, otherwise both blocks
  };

  // Bytes of two words -> the pairs (low nibble, high nibble) as bf16x2 of code * 2^-126; see
  // decode8 for the multiplication.
  __device__ static void spread(uint32_t first, uint32_t second, uint32_t selector,
                                uint32_t& first_pair, uint32_t& second_pair) {
    const uint32_t bytes = __byte_perm(first, second, selector);    // second, first, twice
    const uint32_t codes = __byte_perm(bytes * 16, bytes, 0x7610);  // on top of each byte
    first_pair = (codes & 0x80008000u) | ((codes >> 6) & 0x01c001c0u);
    second_pair = ((codes & 0x00f000f0u) * 0x0104u) & 0x81c081c0u;
  }

  __device__ static uint32_t half_of(uint32_t pair, int half) {
    const __nv_bfloat162 v = reinterpret_cast<const __nv_bfloat162&>(pair);
    const __nv_bfloat162 both = half ? __high2bfloat162(v) : __low2bfloat162(v);
    return reinterpret_cast<const uint32_t&>(both);
  }

  // Operand A of the k16 steps: registers are rows g, g + 8, then the same 8 of K later.
  using Operand = uint32_t[kStep / 16][4];
  using Sums = float[kTileM / 2];

  // kWide: for any scale; otherwise for those up to kLargestNarrow.
  template <bool kWide>
  __device__ static void decode(const Packed& packed, uint32_t selector, Operand& a) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t scale = packed.scales[slab][half];
        const auto to = [&](int i) -> uint32_t& { return a[4 * slab + i / 2][2 * (i % 2) + half]; };
        if constexpr (kTransposed) {
          const ScaleFactor factor =
              kWide ? scale_factor(scale) : ScaleFactor{narrow_factor(scale), 0};
          const uint4& w = packed.codes[slab][half][0];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            uint32_t pairs[4];
            decode8<kWide, true>(__byte_perm(w.x, w.y, j ? 0x7632 : 0x5410), factor, pairs);
#pragma unroll
            for (int i = 0; i < 4; ++i) to(4 * j + i) = pairs[i];
          }
        } else {
          const uint32_t narrow = __byte_perm(scale, 0, 0x4140) * 128u + 126u * 0x00800080u;
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const ScaleFactor factor =
                kWide ? scale_factor(scale >> (8 * b) & 0xff) : ScaleFactor{half_of(narrow, b), 0};
            const uint4& w = packed.codes[slab][half][b];
            uint32_t pairs[4];
            spread(w.x, w.y, selector, pairs[0], pairs[1]);
            spread(w.z, w.w, selector, pairs[2], pairs[3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              to(4 * b + i) = mul_bf16x2(pairs[i], factor.first);
              if (kWide) to(4 * b + i) = mul_bf16x2(to(4 * b + i), factor.second);
            }
          }
        }
      }
  }

  // Scales of two bytes are compared two at a time: adding carries into the bits above them.
  __device__ static bool is_wide(const Packed& packed) {
    constexpr uint32_t kOffset = (0xff - kLargestNarrow) * 0x00010001u;
    uint32_t carries = 0;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const uint32_t both = packed.scales[slab][0] | packed.scales[slab][1] << 16;
      if constexpr (kTransposed)
        carries |= both + kOffset;
      else
        carries |= ((both & 0x00ff00ffu) + kOffset) | ((both >> 8 & 0x00ff00ffu) + kOffset);
    }
    return (carries & 0x01000100u) != 0;
  }

  // A computing warpgroup's place in the rings, which goes on from tile to tile.
  struct Cursor {
    Ring<kXStages> x;
    Ring<kCodeStages> codes;
    Ring<kScaleStages> scales;
    uint32_t code_offset[2], scale_offset[2];  // of a lane's rows
    int scale_row[2];
    uint32_t scale[2];  // addresses, of the first step of a stage
    uint32_t selector;

    __device__ Cursor(const WgmmaArgs& args) {
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = args.scale_rows;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane / 4 * kFirstRow + half * kSecondRow;
        // The copy engine swaps the four blocks of a row by bits 1 and 2 of the row's number.
        code_offset[half] = row * 64 + (row / 2 % 4) * kBlockBytes;
        scale_offset[half] = (row % group * (kTileN / group) + row / group) * kScaleRowBytes;
        scale_row[half] = row % group * (args.k / kBlockSize);
        if (kTransposed) {
          code_offset[half] = (code_offset[half] ^ (lane % 4 / 2 * kBlockBytes)) + lane % 2 * 8;
          scale_offset[half] += lane % 4 / 2;
        }
      }
      selector = 0x0404u + lane % 4 * 0x1111u;
    }
  };

  // Step i of the tile, the last one perhaps. Frees what is not needed any more.
  __device__ static void fetch(const Block& block, Cursor& cursor, int i, bool last,
                               Packed& packed) {
    if (i % kStepsPerScales == 0) {
      ptx::barrier_wait(block.scale_full + 8 * cursor.scales.index, cursor.scales.parity);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        cursor.scale[half] = block.scales(cursor.scales.index) + cursor.scale_offset[half] +
                             first_scale(cursor.scale_row[half], block.begin + i) % 16;
    }
    const int second = i % kStepsPerCodes;
    if (!second) ptx::barrier_wait(block.code_full + 8 * cursor.codes.index, cursor.codes.parity);
    const uint32_t codes = block.codes(cursor.codes.index);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        const uint32_t from = codes + (cursor.code_offset[half] ^ ((second + slab) * 32));
        const uint32_t scale = cursor.scale[half] + 2 * (i % kStepsPerScales * kSlabs + slab);
        if constexpr (kTransposed) {
          const uint2 words = ptx::load_shared8(from);
          packed.codes[slab][half][0].x = words.x;
          packed.codes[slab][half][0].y = words.y;
          packed.scales[slab][half] = ptx::load_shared_byte(scale);
        } else {
          packed.codes[slab][half][0] = ptx::load_shared16(from);
          packed.codes[slab][half][1] = ptx::load_shared16(from ^ kBlockBytes);
          packed.scales[slab][half] = ptx::load_shared2(scale);
        }
      }
    }
    // Past the end of K codes are zero, but the scales are those of another row.
    if (last && block.ragged) packed.scales[kSlabs - 1][0] = packed.scales[kSlabs - 1][1] = 0;
    if (second == kStepsPerCodes - 1 || last) {
      arrive(block.code_empty + 8 * cursor.codes.index);
      cursor.codes.advance();
    }
    if (i % kStepsPerScales == kStepsPerScales - 1 || last) {
      arrive(block.scale_empty + 8 * cursor.scales.index);
      cursor.scales.advance();
    }
  }

  // Descriptor of operand B: rows of 128 bytes, swizzled, eight rows 1024 bytes apart.
  __device__ static uint64_t descriptor(uint32_t shared) {
    return (uint64_t(1) << 62) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 16) | (shared >> 4);
  }

  // One step: the products of the first kWidth tokens.
  template <int kWidth>
  __device__ static void multiply_step(const Operand& a, uint64_t x, Sums& sums) {
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k)
      ptx::Wgmma<kWidth>::multiply(reinterpret_cast<float (&)[kWidth / 2]>(sums), a[k],
                                   x + (k / 4 * kSlabBytes + k % 4 * 32) / 16);
  }

  __device__ static void multiply_tile(const Block& block, const Tile& tile, Cursor& cursor,
                                       Sums& sums) {
    const int steps = block.end - block.begin, width = tile.width();
    Packed packed[2];
    Operand operands[2];
    uint32_t x_empty[2];  // of the steps whose products may be running
    fetch(block, cursor, 0, steps == 1, packed[0]);
    for (int first = 0; first < steps; first += 2) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int i = first + s;
        if (s && i == steps) break;
        if (i + 1 < steps) fetch(block, cursor, i + 1, i + 2 == steps, packed[s ^ 1]);
        if (i > 1) {
          ptx::wgmma_wait<1>();  // the product before the last one has read its operands
          arrive(x_empty[s]);
        }
        Operand& a = operands[s];
        if (__builtin_expect(__any_sync(0xffffffffu, is_wide(packed[s])), false))
          decode<true>(packed[s], cursor.selector, a);
        else
          decode<false>(packed[s], cursor.selector, a);
        ptx::barrier_wait(block.x_ready + 8 * cursor.x.index, cursor.x.parity);
        ptx::wgmma_fence();
        const uint64_t x = descriptor(block.x(cursor.x.index));
        // One copy of this loop: with one for each width, registers are spilled.
        if (kNarrowest < kNarrower && width == kNarrowest)
          multiply_step<kNarrowest>(a, x, sums);
        else if (kNarrower < kTileM && width == kNarrower)
          multiply_step<kNarrower>(a, x, sums);
        else
          multiply_step<kTileM>(a, x, sums);
        ptx::wgmma_commit();
        x_empty[s] = block.x_empty + 8 * cursor.x.index;
        cursor.x.advance();
      }
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTileM / 2; ++i) ptx::keep_register(sums[i]);
    arrive(x_empty[0]);
    if (steps > 1) arrive(x_empty[1]);
  }

  __device__ static void compute(const WgmmaArgs& args, const WgmmaMaps& maps, const Block& block) {
    Cursor cursor(args);
    for (int t = block.first_tile; t < block.tiles; t += block.tile_stride) {
      const Tile tile(args, t);
      Sums sums = {};
      multiply_tile(block, tile, cursor, sums);
      if constexpr (kEpilogue == Epilogue::kGateUp)
        write_hidden(args, block, tile, sums);
      else if constexpr (kEpilogue == Epilogue::kDown)
        write_partial(args, tile, sums);
      else if (args.split == 1)
        write_tile(args, maps, block, tile, sums);
      else
        exchange(args, maps, block, tile, sums);
    }
    if (threadIdx.x % 128 == 0) ptx::bulk_store_wait_read();
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
    constexpr int kSlotBytes = kWarpgroups * 128 * 16;
    ptx::cluster_sync();  // nobody reads its rings any more
    const uint32_t mine = block.shared + threadIdx.x * 16;
    int owner = 0, turn = 0;
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = sums[4 * j + i];
      ptx::store_cluster16(
          ptx::shared_of_rank(mine + (turn * args.split + block.rank) * kSlotBytes, owner), v);
      if (++owner == args.split) {
        owner = 0;
        ++turn;
      }
    }
    ptx::cluster_sync();
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
      init_ring(block.x_full, kXStages);
      init_ring(block.code_full, kCodeStages);
      init_ring(block.scale_full, kScaleStages);
      if (kTransposed)
        for (int s = 0; s < kXStages; ++s) ptx::barrier_init(block.x_ready + 8 * s, 2);
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
      return;
    }
    ptx::release_registers<kCopyRegisters>();
    const int thread = threadIdx.x - 128 * kWarpgroups;
    if (thread == 0)
      copy_weights(args, maps, block);
    else if (thread == 32)
      copy_activations(args, maps, block);
    else if (kTransposed && thread >= 64)
      transpose_activations(args, block, thread / 32 - 2);
    if (args.split > 1) {  // the barriers of a cluster count every thread
      __syncwarp();
      ptx::cluster_sync();
      ptx::cluster_sync();
    }
  }

  // The copy engine fills, the computing warps empty. The empty barriers lie behind the full ones.
  __device__ static void init_ring(uint32_t full, int stages) {
    for (int s = 0; s < stages; ++s) {
      ptx::barrier_init(full + 8 * s, 1);
      ptx::barrier_init(full + 8 * (stages + s), 4 * kWarpgroups);
    }
  }
};

// y = x * w^T + bias, or a grouped product (split 1), with a wgmma configuration; see
// gemm_wgmma.cu and moe_wgmma.cu.
cudaError_t launch_wgmma(int config, int split, const GemmArgs& args, int multiprocessors,
                         cudaStream_t stream);
cudaError_t launch_grouped_wgmma(Epilogue epilogue, int config, const GemmArgs& args,
                                 int multiprocessors, cudaStream_t stream);

}  // namespace jax_mxfp4
