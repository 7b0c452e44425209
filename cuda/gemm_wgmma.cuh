// Fused dequantize-GEMM for more than a few tokens: sm_90a, bf16, dense.
//
// Weights are the register operand A of wgmma (64 rows a warpgroup), tokens its operand B in shared
// memory, so that a decoded weight never goes back to memory and serves up to 256 tokens.
//
//   copy warps    | codes -> ring of 128 of K, activations -> ring of 64 of K   (copy engine)
//   scale warps   | scale bytes -> bf16 factors beside the codes
//   warpgroup 0   | fetch, decode | wgmma        | fetch, decode | wgmma        ...
//   warpgroup 1   |       fetch, decode | wgmma        | fetch, decode | wgmma  ...
//
// A batch is what a warpgroup decodes before it multiplies; batch i is decoded while the product of
// batch i - 1 runs. Left alone, the warpgroups decode together and then queue together for the
// tensor cores, so they take turns in a fixed order.
//
// The canonical bytes are used as they lie. Lane (g, c) = (lane / 4, lane % 4) holds rows g and
// g + 8 of a warp's 16, and of every 8 elements of K the pair 2c, 2c + 1: byte c of a word. Its
// four bytes of a block come out of one 16-byte load, which the four lanes of a row share.
//
// Grouped products (the expert layer) read their token tiles from a schedule in device memory; each
// tile belongs to one expert. For gate_up a lane holds rows 2g and 2g + 1 instead, gate and up of
// one column, so that the activation needs no exchange.
//
// Where tiles are too few for the GPU, the thread blocks of a cluster split K and exchange their
// sums through distributed shared memory; each adds its part of the tile in the order of ranks.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "gemm.cuh"
#include "ptx_wgmma.cuh"

namespace jax_mxfp4 {

struct WgmmaArgs {
  const uint8_t* scales;
  Bias bias;
  void* out;
  DType out_type;
  int m, n, k;
  int tiles_m, tiles_n;  // dense; grouped: tiles_n only
  // Grouped epilogues only; see GemmArgs.
  const int4* tiles;
  const int32_t* tile_count;
  float alpha, limit;
  int split;     // thread blocks of a cluster, which share a tile and split K
  bool scatter;  // `out` cannot be written by the copy engine
};

struct WgmmaMaps {  // boxes are {inner, outer}
  CUtensorMap x;    // bf16 [m, k], {64, tile_m}
  CUtensorMap w;    // u8 [n, k / 2], {64, tile_n}
  CUtensorMap out;  // 16-bit [m, n], {64, tile_m}, or {64, 8} where K is split
};

template <int kConfig, Epilogue kEpilogue>
struct WgmmaGemm {
  static constexpr bool kGrouped = kEpilogue != Epilogue::kDense;
  // Rows of W in a lane: kFirstRow * g, and kSecondRow further on.
  static constexpr int kFirstRow = kEpilogue == Epilogue::kGateUp ? 2 : 1;
  static constexpr int kSecondRow = kEpilogue == Epilogue::kGateUp ? 1 : 8;
  static constexpr GemmConfig config = kGemmConfigs[kConfig];
  static constexpr int kTileM = config.tile_m;
  static constexpr int kWarpgroups = config.warps_n / 4;  // that compute
  static constexpr int kTiles = config.rows;              // of 64 rows, of one warpgroup
  static constexpr int kTileN = config.tile_n();
  static constexpr int kBatch = config.chunks;  // blocks of K decoded at a time
  static constexpr int kBatches = 4 / kBatch;   // in a stage of codes
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kScaleThreads = 64;

  static constexpr bool kAhead = config.wgmma.ahead, kTurns = config.wgmma.turns;

  // Of K. A stage costs its barriers, so that it should be long; 192 and more tokens leave no room.
  static constexpr int kXStage = kTileM > 128 ? 64 : 128, kWStage = 128;
  static constexpr int kXPerW = kWStage / kXStage;
  static constexpr int kBatchesPerX = kBatches / kXPerW;
  static constexpr int kXStages = config.stages;
  // Rows of 128 bytes, 64 elements of K, are what the tensor cores read: a slab.
  static constexpr int kSlabBytes = kTileM * 128;
  static constexpr int kXSlabs = kXStage / 64;
  static constexpr int kXBytes = kXSlabs * kSlabBytes;
  // A grouped tile with few tokens multiplies fewer columns; it copies boxes of so many tokens.
  static constexpr int kBoxTokens = !kGrouped ? kTileM : kTileM > 96 ? 64 : 32;
  static constexpr int kCodeBytes = kTileN * kWStage / 2;
  static constexpr int kWBytes = kCodeBytes + kTileN * 8;  // codes; two pairs of factors per row
  // Sums of a thread come in groups of four: rows g and g + 8, two of eight tokens.
  static constexpr int kGroups = kTiles * kTileM / 8;
  static constexpr int kStagedGroups = kTileM > 128 ? kGroups / 2 : kGroups;
  static constexpr int kStagingBytes = kWarpgroups * kStagedGroups * 1024;

  static constexpr int kAlignment = 1024;  // of a 128-byte swizzle
  static constexpr int kWOffset = kXStages * kXBytes;
  static constexpr int kFree = 227 * 1024 - kAlignment - 1024 - kWOffset - kStagingBytes;
  static constexpr int kWStages = kFree / kWBytes < 7 ? kFree / kWBytes : 7;
  static constexpr int kStagingOffset = (kWOffset + kWStages * kWBytes + 1023) / 1024 * 1024;
  static constexpr int kFlagOffset = kStagingOffset + kStagingBytes;  // two per stage of codes
  static constexpr int kBarrierOffset = kFlagOffset + 8 * kWStages;
  static constexpr int kSharedBytes = kBarrierOffset + 16 * (kWStages + kXStages) + kAlignment;
  static_assert(kWStages >= 3 && kSharedBytes <= 227 * 1024);

  // Named barriers: 1 + w for the lanes of warpgroup w, kTurn + w when it is its turn to multiply,
  // and one for each stage of codes whose factors have been read by every lane.
  static constexpr int kTurn = 1 + kWarpgroups, kRead = kTurn + kWarpgroups;
  static constexpr int kReadThreads = 128 * kWarpgroups + kScaleThreads;
  static_assert(kRead + kWStages <= 16);
  __device__ static int read_barrier(int stage) { return kRead + stage; }

  // The register file holds 64 K; what the copy warpgroup gives up goes to the others.
  static constexpr int kComputeRegisters = kWarpgroups == 2 ? 232 : kTileM > 96 ? 160 : 152;
  static constexpr int kCopyRegisters = kWarpgroups == 2 ? 40 : kTileM > 96 ? 32 : 56;

  // Whether the exchange of sums has room in the memory of the rings.
  static constexpr bool can_split(int split) {
    return (kGroups + split - 1) / split * split * kWarpgroups * 128 * 16 <=
           kXStages * kXBytes + kWStages * kWBytes;
  }
  static_assert(kGrouped || kTileM > kMaxSplitTileM ||
                (can_split(2) && can_split(3) && can_split(4) && can_split(5) && can_split(8)));

  struct Block {  // what a thread block works on
    uint32_t shared;
    uint32_t x_full, x_empty, w_full, w_empty;  // barriers
    int rank;                                   // in its cluster
    int begin, end;                             // steps of kXStage elements of K
    int first_tile, tile_stride, tiles;

    __device__ explicit Block(const WgmmaArgs& args, char* memory) {
      const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
      shared = (base + kAlignment - 1) / kAlignment * kAlignment;
      x_full = shared + kBarrierOffset;
      x_empty = x_full + 8 * kXStages;
      w_full = x_empty + 8 * kXStages;
      w_empty = w_full + 8 * kWStages;
      rank = args.split > 1 ? int(ptx::cluster_rank()) : 0;
      const int steps = (args.k + kXStage - 1) / kXStage;
      begin = steps * rank / args.split;
      end = steps * (rank + 1) / args.split;
      first_tile = blockIdx.x / args.split;
      tile_stride = gridDim.x / args.split;
      tiles = (kGrouped ? __ldg(args.tile_count) : args.tiles_m) * args.tiles_n;
    }
    __device__ uint32_t x(int stage) const { return shared + stage * kXBytes; }
    __device__ uint32_t codes(int stage) const { return shared + kWOffset + stage * kWBytes; }
    __device__ uint32_t factors(int stage) const { return codes(stage) + kCodeBytes; }
    __device__ uint32_t flags(int stage) const { return shared + kFlagOffset + 8 * stage; }
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

  __device__ static void copy_codes(const WgmmaArgs& args, const WgmmaMaps& maps,
                                    const Block& block) {
    Ring<kWStages> ring;
    for (int t = block.first_tile; t < block.tiles; t += block.tile_stride) {
      const Tile tile(args, t);
      for (int step = block.begin; step < block.end; step += kXPerW, ring.advance()) {
        ptx::barrier_wait(block.w_empty + 8 * ring.index, ring.parity ^ 1);
        const uint32_t full = block.w_full + 8 * ring.index;
        ptx::barrier_arrive_expect(full, kCodeBytes);
        ptx::tensor_load(block.codes(ring.index), &maps.w, step * kXStage / 2,
                         int(tile.expert_row) + tile.row, full);
      }
    }
  }

  __device__ static void copy_activations(const WgmmaArgs& args, const WgmmaMaps& maps,
                                          const Block& block) {
    Ring<kXStages> ring;
    for (int t = block.first_tile; t < block.tiles; t += block.tile_stride) {
      const Tile tile(args, t);
      for (int step = block.begin; step < block.end; ++step, ring.advance()) {
        ptx::barrier_wait(block.x_empty + 8 * ring.index, ring.parity ^ 1);
        const uint32_t full = block.x_full + 8 * ring.index;
        const int width = tile.width();
        ptx::barrier_arrive_expect(full, width * kXStage * 2);
#pragma unroll
        for (int slab = 0; slab < kXSlabs; ++slab)
          for (int token = 0; token < width; token += kBoxTokens)
            ptx::tensor_load(block.x(ring.index) + slab * kSlabBytes + token * 128, &maps.x,
                             step * kXStage + slab * 64, tile.token + token, full);
      }
    }
  }

  // A tile's scales lie together. Their loads are one stage ahead of their use, which hides the
  // latency of L2 but not that of memory, so L2 gets them one tile ahead; each thread block of a
  // cluster asks for a part.
  __device__ static void prefetch_scales(const WgmmaArgs& args, const Block& block, int t) {
    if (t >= block.tiles) return;
    const Tile tile(args, t);
    const int rows = min(kTileN, args.n - tile.row);
    const int units = rows * (args.k / kBlockSize) / 16;  // of 16 bytes
    const int first = units * block.rank / args.split;
    const int count = units * (block.rank + 1) / args.split - first;
    const uint8_t* scales =
        args.scales + (tile.expert_row + tile.row) * (args.k / kBlockSize) + first * 16;
    if (count > 0) ptx::bulk_prefetch(scales, count * 16);
  }

  // Scale bytes -> bf16 factors, the two blocks of a step as the halves of a register, so that the
  // computing warps spend one load on both. A flag says whether any scale of the stage is wide.
  __device__ static void convert_scales(const WgmmaArgs& args, const Block& block, int thread) {
    constexpr int kRows = kTileN / kScaleThreads;
    const int blocks_per_row = args.k / kBlockSize;
    Ring<kWStages> ring;
    int fill = 0;
    if (thread == 0) prefetch_scales(args, block, block.first_tile);
    for (int t = block.first_tile; t < block.tiles; t += block.tile_stride) {
      const Tile tile(args, t);
      if (thread == 0) prefetch_scales(args, block, t + block.tile_stride);
      const int first_row = tile.row + thread;
      const uint8_t* scales = args.scales + (tile.expert_row + first_row) * blocks_per_row;
      uint32_t bytes[kRows][2];
      const auto load = [&](int step) {
        const int first_pair = step * (kXStage / 64);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            // Past the end of K or N there are no codes; any finite factor will do.
            const bool valid =
                2 * (first_pair + p) < blocks_per_row && first_row + r * kScaleThreads < args.n;
            bytes[r][p] =
                valid ? __ldg(reinterpret_cast<const uint16_t*>(
                            scales + r * kScaleThreads * blocks_per_row + 2 * (first_pair + p)))
                      : 0;
          }
      };
      load(block.begin);
      for (int step = block.begin; step < block.end; step += kXPerW, ring.advance()) {
        // A warp whose lanes came here one after another would count more than once.
        __syncwarp();
        if (fill++ >= kWStages) ptx::named_barrier_sync(read_barrier(ring.index), kReadThreads);
        bool wide = false;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            const uint32_t halves = __byte_perm(bytes[r][p], 0, 0x4140);
            wide |= ((halves + (0xff - kLargestNarrow) * 0x00010001u) & 0x01000100u) != 0;
            ptx::store_shared4(
                block.factors(ring.index) + (p * kTileN + thread + r * kScaleThreads) * 4,
                halves * 128u + 126u * 0x00800080u);
          }
        wide = __any_sync(0xffffffffu, wide);
        if (thread % 32 == 0) ptx::store_shared4(block.flags(ring.index) + thread / 8, wide);
        ptx::barrier_arrive(block.w_full + 8 * ring.index);
        load(step + kXPerW);
      }
    }
  }

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

  // What a lane needs of one batch: codes of rows g, g + 8 of each of its tiles, and their factors.
  struct Batch {
    uint4 codes[kTiles][2][kBatch];
    uint32_t factors[kTiles][2];
    bool wide;

    __device__ void fetch(const Block& block, int stage, int index, int lane_row) {
      // The copy engine swaps the four blocks of a row by bits 1 and 2 of the row's number.
      const uint32_t swizzle = (lane_row / 2 % 4) * kBlockBytes;
      wide = ptx::load_shared8(block.flags(stage)) != 0;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = lane_row + 64 * t + kSecondRow * half;
#pragma unroll
          for (int b = 0; b < kBatch; ++b)
            codes[t][half][b] = ptx::load_shared16(
                block.codes(stage) + row * 64 + (((index * kBatch + b) * kBlockBytes) ^ swizzle));
          factors[t][half] =
              ptx::load_shared4(block.factors(stage) + (index / (kBatches / 2) * kTileN + row) * 4);
        }
    }
  };

  // Operand A of two k16 steps per block: registers are rows g, g + 8, then the same 8 of K later.
  using Operand = uint32_t[kTiles][2 * kBatch][4];

  __device__ static void decode(const Batch& batch, int index, uint32_t selector, Operand& a) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4& w = batch.codes[t][half][b];
          const uint32_t factor = half_of(batch.factors[t][half], (index * kBatch + b) % 2);
          uint32_t pairs[4];
          spread(w.x, w.y, selector, pairs[0], pairs[1]);
          spread(w.z, w.w, selector, pairs[2], pairs[3]);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[t][2 * b + i / 2][2 * (i % 2) + half] = mul_bf16x2(pairs[i], factor);
        }
  }

  // The same for any scale, read again from memory: rare.
  __device__ static void decode_wide(const WgmmaArgs& args, const Batch& batch, const Tile& tile,
                                     int lane_row, int first_block, uint32_t selector, Operand& a) {
    const int blocks_per_row = args.k / kBlockSize;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4& w = batch.codes[t][half][b];
          const int n = min(tile.row + lane_row + 64 * t + kSecondRow * half, args.n - 1);
          // Past the end of K codes are zero, but a scale of another row could be NaN.
          const int block = min(first_block + b, blocks_per_row - 1);
          const ScaleFactor factor =
              scale_factor(__ldg(args.scales + (tile.expert_row + n) * blocks_per_row + block));
          uint32_t pairs[4];
          spread(w.x, w.y, selector, pairs[0], pairs[1]);
          spread(w.z, w.w, selector, pairs[2], pairs[3]);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[t][2 * b + i / 2][2 * (i % 2) + half] =
                mul_bf16x2(mul_bf16x2(pairs[i], factor.first), factor.second);
        }
  }

  __device__ static void arrive(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(barrier);
  }

  // Of a stage of codes: for the copy engine and for the warps that write factors.
  __device__ static void release_codes(const Block& block, int stage) {
    arrive(block.w_empty + 8 * stage);
    __syncwarp();
    ptx::named_barrier_arrive(read_barrier(stage), kReadThreads);
  }

  using Sums = float[kTiles][kTileM / 2];

  // A computing warpgroup's place in the rings, which goes on from tile to tile.
  struct Cursor {
    Ring<kXStages> x;
    Ring<kWStages> w;
    int lane_row;
    uint32_t selector;
  };

  // One batch of K: the products of the first kWidth tokens.
  template <int kWidth>
  __device__ static void multiply_batch(const Operand& a, uint64_t x, int first_k16, Sums& sums) {
#pragma unroll
    for (int k = 0; k < 2 * kBatch; ++k) {
      const int k16 = first_k16 + k;
      const uint64_t b = x + (k16 / 4 * kSlabBytes + k16 % 4 * 32) / 16;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        ptx::Wgmma<kWidth>::multiply(reinterpret_cast<float (&)[kWidth / 2]>(sums[t]), a[t][k], b);
    }
  }

  __device__ static void multiply_tile(const WgmmaArgs& args, const Block& block, const Tile& tile,
                                       Cursor& cursor, Sums& sums) {
    const int warpgroup = threadIdx.x / 128, lane_row = cursor.lane_row, width = tile.width();
    Batch batches[kAhead ? 2 : 1];
    Operand operands[2];
    int busy = 0;  // stages of activations that products may still read, oldest first
    int oldest = cursor.x.index;
    const auto release_oldest = [&] {
      arrive(block.x_empty + 8 * oldest);
      oldest = oldest + 1 == kXStages ? 0 : oldest + 1;
      --busy;
    };
    if constexpr (kAhead) {
      ptx::barrier_wait(block.w_full + 8 * cursor.w.index, cursor.w.parity);
      batches[0].fetch(block, cursor.w.index, 0, lane_row);
    }

    for (int step = block.begin; step < block.end; step += kXPerW) {
#pragma unroll
      for (int i = 0; i < kBatches; ++i) {
        const int now = step + i / kBatchesPerX;
        const bool ends_x = i % kBatchesPerX == kBatchesPerX - 1;
        if (i > 0 && i % kBatchesPerX == 0 && now >= block.end) break;
        // Fetch ahead: the last batch of a stage frees it and turns to the next one.
        const bool last = i + 1 == kBatches || (ends_x && now + 1 >= block.end);
        if constexpr (!kAhead) {
          if (i == 0) ptx::barrier_wait(block.w_full + 8 * cursor.w.index, cursor.w.parity);
          batches[0].fetch(block, cursor.w.index, i, lane_row);
          if (last) {
            release_codes(block, cursor.w.index);
            cursor.w.advance();
          }
        } else if (last) {
          release_codes(block, cursor.w.index);
          cursor.w.advance();
          if (now + 1 < block.end) {
            ptx::barrier_wait(block.w_full + 8 * cursor.w.index, cursor.w.parity);
            batches[(i + 1) % 2].fetch(block, cursor.w.index, 0, lane_row);
          }
        } else {
          batches[(i + 1) % 2].fetch(block, cursor.w.index, i + 1, lane_row);
        }

        ptx::wgmma_wait<1>();  // the product before the last one has read its operands
        if (kBatchesPerX == 1 ? busy == 2 : i % kBatchesPerX == 1 && busy == 2) release_oldest();
        const Batch& batch = batches[kAhead ? i % 2 : 0];
        Operand& a = operands[i % 2];
        decode(batch, i, cursor.selector, a);
        if (batch.wide)
          decode_wide(args, batch, tile, lane_row, step * (kXStage / 32) + i * kBatch,
                      cursor.selector, a);
        if (i % kBatchesPerX == 0) {
          ptx::barrier_wait(block.x_full + 8 * cursor.x.index, cursor.x.parity);
          ++busy;
        }
        if (kTurns) ptx::named_barrier_sync(kTurn + warpgroup, 256);
        ptx::wgmma_fence();
        const uint64_t x = descriptor(block.x(cursor.x.index));
        const int first_k16 = i % kBatchesPerX * 2 * kBatch;
        // One copy of this loop: with one for each width, registers are spilled.
        if (kNarrowest < kNarrower && width == kNarrowest)
          multiply_batch<kNarrowest>(a, x, first_k16, sums);
        else if (kNarrower < kTileM && width == kNarrower)
          multiply_batch<kNarrower>(a, x, first_k16, sums);
        else
          multiply_batch<kTileM>(a, x, first_k16, sums);
        ptx::wgmma_commit();
        if (kTurns) ptx::named_barrier_arrive(kTurn + (warpgroup + 1) % kWarpgroups, 256);
        if (ends_x) cursor.x.advance();
      }
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < kTileM / 2; ++i) ptx::keep_register(sums[t][i]);
    while (busy > 0) release_oldest();
  }

  __device__ static void compute(const WgmmaArgs& args, const WgmmaMaps& maps, const Block& block) {
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Cursor cursor;
    cursor.lane_row = warpgroup * 64 * kTiles + warp * 16 + lane / 4 * kFirstRow;
    cursor.selector = 0x0404u + lane % 4 * 0x1111u;
    if (kTurns && warpgroup == kWarpgroups - 1) ptx::named_barrier_arrive(kTurn, 256);

    for (int t = block.first_tile; t < block.tiles; t += block.tile_stride) {
      const Tile tile(args, t);
      Sums sums = {};
      multiply_tile(args, block, tile, cursor, sums);
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

  // Shared-memory descriptor of operand B: rows of 128 bytes, swizzled, eight rows 1024 bytes
  // apart.
  __device__ static uint64_t descriptor(uint32_t shared) {
    return (uint64_t(1) << 62) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 16) | (shared >> 4);
  }

  // Sums of group j (eight tokens of one 64-row tile), with the bias, to the staging slot or, where
  // the copy engine cannot write them, to `out`.
  __device__ static void put(const WgmmaArgs& args, const Block& block, const Tile& tile, int j,
                             int slot, float (&v)[4]) {
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int row = tile.row + (warpgroup * kTiles + j / (kTileM / 8)) * 64 + warp * 16 + lane / 4;
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
      const int token = tile.token + j % (kTileM / 8) * 8 + 2 * (lane % 4);
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
    constexpr int kTokenGroups = kTileM / 8;
#pragma unroll
    for (int first = 0; first < kGroups; first += kStagedGroups) {
      if (leader) ptx::bulk_store_wait_read();
      ptx::named_barrier_sync(1 + warpgroup, 128);
#pragma unroll
      for (int j = first; j < first + kStagedGroups; ++j) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = sums[j / kTokenGroups][j % kTokenGroups * 4 + i];
        put(args, block, tile, j, j - first, v);
      }
      if (args.scatter) continue;
      ptx::async_proxy_fence();
      ptx::named_barrier_sync(1 + warpgroup, 128);
      if (leader) {
        // A box is kStoreTokens tokens of 64 rows.
        for (int j = first; j < first + kStagedGroups; j += kStoreTokens / 8) {
          const int row = tile.row + (warpgroup * kTiles + j / kTokenGroups) * 64;
          const int token = tile.token + j % kTokenGroups * 8;
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
    static_assert(!kGrouped || kTiles == 1);
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
    for (int j = 0; j < kTileM / 8; ++j) {
      if (8 * j >= tile.rows) break;
      float h[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        h[i] = clamped_swiglu(sums[0][4 * j + i] + bias[0], sums[0][4 * j + 2 + i] + bias[1],
                              args.alpha, args.limit);
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
      for (int j = 0; j < kTileM / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (8 * j + i + first_token < tile.rows)
            out[int64_t(8 * j + i) * args.n] = sums[0][4 * j + 2 * half + i] + bias;
        }
    }
  }

  static constexpr int kStoreTokens = kTileM > 128 ? kTileM / 2 : kTileM;

  __device__ static void exchange(const WgmmaArgs& args, const WgmmaMaps& maps, const Block& block,
                                  const Tile& tile, Sums& sums) {
    const int warpgroup = threadIdx.x / 128;
    constexpr int kTokenGroups = kTileM / 8;
    constexpr int kSlotBytes = kWarpgroups * 128 * 16;
    ptx::cluster_sync();  // nobody reads its rings any more
    const uint32_t mine = block.shared + threadIdx.x * 16;
    int owner = 0, turn = 0;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = sums[j / kTokenGroups][j % kTokenGroups * 4 + i];
      ptx::store_cluster16(
          ptx::shared_of_rank(mine + (turn * args.split + block.rank) * kSlotBytes, owner), v);
      if (++owner == args.split) {
        owner = 0;
        ++turn;
      }
    }
    ptx::cluster_sync();
    for (int j = block.rank, i = 0; j < kGroups; j += args.split, ++i) {
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
      for (int j = block.rank, i = 0; j < kGroups; j += args.split, ++i) {
        const int row = tile.row + (warpgroup * kTiles + j / kTokenGroups) * 64;
        const int token = tile.token + j % kTokenGroups * 8;
        if (row < args.n && token < args.m)
          ptx::tensor_store(&maps.out, row, token, block.staging(warpgroup, i));
      }
      ptx::bulk_store_commit();
    }
  }

  __device__ static void run(const WgmmaArgs& args, const WgmmaMaps& maps, char* memory) {
    const Block block(args, memory);
    if (threadIdx.x == 0) {
      for (int s = 0; s < kXStages; ++s) {
        ptx::barrier_init(block.x_full + 8 * s, 1);
        ptx::barrier_init(block.x_empty + 8 * s, 4 * kWarpgroups);
      }
      for (int s = 0; s < kWStages; ++s) {
        ptx::barrier_init(block.w_full + 8 * s, 1 + kScaleThreads);
        ptx::barrier_init(block.w_empty + 8 * s, 4 * kWarpgroups);
      }
      ptx::barrier_init_fence();
    } else if (threadIdx.x == 32) {
      ptx::prefetch_tensor_map(&maps.x);
      ptx::prefetch_tensor_map(&maps.w);
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
        copy_codes(args, maps, block);
      else if (thread == 32)
        copy_activations(args, maps, block);
      else if (thread >= 64)
        convert_scales(args, block, thread - 64);
      if (args.split > 1) {  // the barriers of a cluster count every thread
        __syncwarp();
        ptx::cluster_sync();
        ptx::cluster_sync();
      }
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
