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
// activations. Slab i is decoded while the product of slab i - 1 runs; once its own is issued, the
// codes of slab i + 1 are fetched.
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

#include "gemm_wgmma_epilogue.cuh"
#include "ptx_wgmma.cuh"

namespace jax_mxfp4 {

template <int kConfig, Epilogue kEpilogue, bool kShared = false>
struct WgmmaGemm : WgmmaEpilogue<kConfig, kEpilogue, kShared> {
  using Base = WgmmaEpilogue<kConfig, kEpilogue, kShared>;
  using Base::kBoxTokens;
  using Base::kCodeBytes;
  using Base::kCodeStages;
  using Base::kFirstRow;
  using Base::kGrouped;
  using Base::kNarrower;
  using Base::kNarrowest;
  using Base::kOneRing;
  using Base::kScaleBoxBytes;
  using Base::kScaleStages;
  using Base::kSecondRow;
  using Base::kSlabBytes;
  using Base::kSlabsOfCodes;
  using Base::kSlabsOfScales;
  using Base::kSlabsOfX;
  using Base::kTileM;
  using Base::kTileN;
  using Base::kWarpgroups;
  using Base::kXStages;
  using typename Base::Block;
  using typename Base::Sums;
  using typename Base::Tile;
  using typename Base::Walk;

  static constexpr int kThreads = 128 * (kWarpgroups + 1);

  // A second loop without the checks for the ends of a tile and of a stage of scales. Wider tiles
  // are limited by the tensor cores, and at 64 x 256 there are not enough registers: ptxas would
  // let products wait for each other.
  static constexpr bool kHasSteadyLoop = kTileM <= 128 && !(kTileM == 64 && kTileN == 256);

  // The register file holds 64 K; what the copy warpgroup gives up goes to the others.
  static constexpr int kComputeRegisters = kWarpgroups == 2   ? 232
                                           : kWarpgroups == 4 ? 112
                                           : kTileM > 96      ? 160
                                                              : 152;
  static constexpr int kCopyRegisters = kWarpgroups == 2                  ? 40
                                        : kWarpgroups == 4 || kTileM > 96 ? 32
                                                                          : 56;

  // Three warps copy. Each makes the barriers of its own ring and, dense, asks for a first stage
  // before it waits for the others (activations that share the ring of the codes wait for that
  // first): all of this is code that comes from far away, and takes as long as memory does. Grouped
  // products have many tiles, and no registers to remember it in (4 %).
  static constexpr bool kAsksFirst = !kGrouped;

  // From here on one lane of a copy warp goes on alone.
  __device__ static bool started() {
    __syncwarp();
    ptx::named_barrier_sync(Base::kRingsMade, 128);
    ptx::named_barrier_arrive(Base::kStarted, kThreads);
    return threadIdx.x % 32 == 0;
  }

  __device__ static void copy_codes(const WgmmaArgs& args, const WgmmaMaps& maps,
                                    const Block& block) {
    Ring<kCodeStages> ring;
    const uint64_t leaves = ptx::cache_policy(ptx::Evict::kFirst);
    const uint64_t stays = ptx::cache_policy(ptx::Evict::kLast);
    const bool copies = threadIdx.x % 32 == 0;
    make_ring(block.code_full, kCodeStages, kOneRing ? 2 : 1, 4 * kWarpgroups);
    bool starts = kAsksFirst, first = true;
    if (!starts && !started()) return;
    for (Walk walk(args, block); !walk.done(); walk.next()) {
      const Tile tile(args, walk.tile);
      const int row = int(tile.expert_row) + tile.row;
#pragma unroll 1
      for (int slab = walk.begin; slab < walk.end; slab += kSlabsOfCodes, ring.advance()) {
        ptx::barrier_wait(block.code_empty + 8 * ring.index, ring.parity ^ 1);
        const uint32_t full = block.code_full + 8 * ring.index;
        if (copies) {
          ptx::barrier_arrive_expect(full, kCodeBytes);
          // What L2 fetches with the beginnings of rows are also the ends of those before, which
          // are asked for at the end of the tile.
          const bool begins = slab == walk.begin, ends = slab + kSlabsOfCodes >= walk.end;
          if (args.shares_pieces && begins)
            ptx::tensor_load(block.codes(ring.index), &maps.w, slab * 32, row, full, stays);
          else if (args.reads_once || (!kGrouped && args.shares_pieces && ends))
            ptx::tensor_load(block.codes(ring.index), &maps.w, slab * 32, row, full, leaves);
          else
            ptx::tensor_load(block.codes(ring.index), &maps.w, slab * 32, row, full);
        }
        if (starts && !started()) return;
        starts = false;
        // The scales and activations of the first slab would wait in memory's queues behind whole
        // rings of codes of all thread blocks. Neither barrier can be a phase further: that takes
        // codes of this tile that have not been asked for.
        const int next = slab + kSlabsOfCodes;
        if (first && next == walk.begin + 2 * kSlabsOfCodes && next < walk.end) {
          ptx::barrier_wait(block.code_full, 0);
          ptx::barrier_wait(block.scale_full, 0);
        }
      }
      first = false;
    }
    if (starts) started();
  }

  __device__ static void copy_scales(const WgmmaArgs& args, const WgmmaMaps& maps,
                                     const Block& block) {
    Ring<kScaleStages> ring;
    const int scale_bytes = args.k / kBlockSize, group = args.scale_rows;
    // Every lane frees scales: racecheck does not see that a lane may do it for its warp, and looks
    // at plain bulk copies.
    const bool copies = threadIdx.x % 32 == 0;
    make_ring(block.scale_full, kScaleStages, 1, 128 * kWarpgroups);
    bool starts = kAsksFirst;
    if (!starts && !started()) return;
    for (Walk walk(args, block); !walk.done(); walk.next()) {
      const Tile tile(args, walk.tile);
      const int row = int(tile.expert_row) + tile.row;
#pragma unroll 1
      for (int slab = walk.begin; slab < walk.end; slab += args.scale_slabs, ring.advance()) {
        ptx::barrier_wait(block.scale_empty + 8 * ring.index, ring.parity ^ 1);
        const uint32_t full = block.scale_full + 8 * ring.index;
        if (copies) {
          const uint32_t to = block.scales(ring.index);
          const int rows = min(kTileN, args.n - tile.row);
          const bool last = slab + args.scale_slabs >= walk.end;
          const int bias = args.bias.data && last ? rows * size_of(args.bias.type) : 0;
          if (group) {
            ptx::barrier_arrive_expect(full, kTileN * kScaleBoxBytes + bias);
            const int first_row = row >> (__ffs(group) - 1);
#pragma unroll 1
            for (int i = 0; i < group; ++i)
              ptx::tensor_load(to + i * (kTileN / group * kScaleBoxBytes), &maps.scales,
                               first_scale(i * scale_bytes, slab) / 16 * 16, first_row, full);
          } else {
            // Rows that are not there have the scales of others: those that lay there before would
            // mostly be some that take longer to decode.
            ptx::barrier_arrive_expect(full, kTileN * scale_bytes + bias);
#pragma unroll 1
            for (int to_row = 0; to_row < kTileN; to_row += rows)
              ptx::bulk_copy(to + to_row * scale_bytes, args.scales + int64_t(row) * scale_bytes,
                             min(rows, kTileN - to_row) * scale_bytes, full);
          }
          if (bias)
            ptx::bulk_copy(
                block.bias(ring.index),
                static_cast<const char*>(args.bias.data) + int64_t(row) * size_of(args.bias.type),
                bias, full);
        }
        if (starts && !started()) return;
        starts = false;
      }
    }
    if (starts) started();
  }

  // Where the scales of a row from `slab` on begin, in a row of the tensor map.
  __device__ static int first_scale(int row_offset, int slab) { return row_offset + 2 * slab; }

  __device__ static void copy_activations(const WgmmaArgs& args, const WgmmaMaps& maps,
                                          const Block& block) {
    Ring<kXStages> ring;
    const uint64_t policy = ptx::cache_policy(ptx::Evict::kLast);
    const bool copies = threadIdx.x % 32 == 0;
    if (!kOneRing) make_ring(block.x_full, kXStages, 1, 4 * kWarpgroups);
    bool starts = kAsksFirst;
    if (!starts && !started()) return;
    for (Walk walk(args, block); !walk.done(); walk.next()) {
      const Tile tile(args, walk.tile);
      // Asking for tokens that are not there takes longer than reading others (measured: up to 1.7
      // times the product's time). What stays in their place makes sums that nobody stores.
      const bool is_last = !kGrouped && tile.token + kTileM > args.m;
      const CUtensorMap* x = is_last ? &maps.last_x : &maps.x;
      const int width = is_last ? args.last_tokens : tile.width();
#pragma unroll 1
      for (int slab = walk.begin; slab < walk.end; slab += kSlabsOfX, ring.advance()) {
        if (kOneRing && starts && !started()) return;
        ptx::barrier_wait(block.x_empty + 8 * ring.index, ring.parity ^ 1);
        const uint32_t full = block.x_full + 8 * ring.index;
        if (copies) {
          ptx::barrier_arrive_expect(full, width * kSlabsOfX * 128);
#pragma unroll
          for (int i = 0; i < kSlabsOfX; ++i) {
            const uint32_t to = block.x(ring.index) + i * kSlabBytes;
            const int k = (slab + i) * 64;
            for (int token = 0; token < (kGrouped ? width : kTileM); token += kBoxTokens) {
              if (args.reads_once)
                ptx::tensor_load(to + token * 128, x, k, tile.token + token, full, policy);
              else
                ptx::tensor_load(to + token * 128, x, k, tile.token + token, full);
            }
          }
        }
        if (!kOneRing && starts && !started()) return;
        starts = false;
      }
    }
    if (starts) started();
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
    Ring<kCodeStages> codes;  // without one ring for both
    Ring<kScaleStages> scales;
    uint32_t code_offset;  // of the row and the block whose address a lane gives to ldmatrix
    uint32_t scale[2];     // of rows g and g + 8: addresses, of the pair of slabs that is next
    int next_scales;       // slab that needs another stage
    int begin;             // of the tile

    __device__ Cursor(const WgmmaArgs& args) {
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      const int row = warp * 16 + lane % 8 * kFirstRow + lane / 8 % 2 * kSecondRow;
      // The copy engine swaps the four blocks of a row by bits 1 and 2 of the row's number.
      code_offset = row * 64 + (lane / 16 ^ row / 2 % 4) * kBlockBytes;
    }
  };

  // On to the stage of scales that begins with slab i of the tile.
  __device__ static void next_scales(const WgmmaArgs& args, const Block& block, Cursor& cursor,
                                     int i) {
    if (i > 0) {
      ptx::barrier_arrive(block.scale_empty + 8 * cursor.scales.index);
      cursor.scales.advance();
    }
    ptx::barrier_wait(block.scale_full + 8 * cursor.scales.index, cursor.scales.parity);
    const int scale_bytes = args.k / kBlockSize, group = args.scale_rows;
    const int thread = ptx::thread_in_block();  // else the main loop would lack registers
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = thread / 32 * 16 + thread % 32 / 4 * kFirstRow + half * kSecondRow;
      const int in_group = group ? row & (group - 1) : 0;  // a power of two
      const int first = first_scale(in_group * scale_bytes, cursor.begin + i);
      const int offset =
          group ? ((in_group * kTileN + row - in_group) >> (__ffs(group) - 1)) * kScaleBoxBytes +
                      (first & 15)
                : row * scale_bytes + first;
      cursor.scale[half] = block.scales(cursor.scales.index) + offset;
    }
    cursor.next_scales += args.scale_slabs;
  }

  __device__ static auto& code_ring(Cursor& cursor) {
    if constexpr (kOneRing)
      return cursor.x;
    else
      return cursor.codes;
  }

  // The next slab, which is an even or an odd one of its tile.
  template <int kOdd>
  __device__ static void fetch(const Block& block, Cursor& cursor, Packed& packed) {
    const auto& ring = code_ring(cursor);
    if (!kOdd) ptx::barrier_wait(block.code_full + 8 * ring.index, ring.parity);
    packed.codes = ptx::load_matrices(block.codes(ring.index) + (cursor.code_offset ^ (kOdd * 32)));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      packed.scales[half] = ptx::load_shared2(cursor.scale[half] + 2 * kOdd);
      if (kOdd) cursor.scale[half] += 4;
    }
  }

  // Past the slabs that were copied together; all of them have been decoded. Codes must not be
  // freed sooner: an arrival overtakes loads that have been issued, but wait behind running
  // products.
  __device__ static void finish_stage(const Block& block, Cursor& cursor) {
    if (!kOneRing) {
      arrive(block.code_empty + 8 * cursor.codes.index);
      cursor.codes.advance();
    }
    if (kSlabsOfX == kSlabsOfCodes) cursor.x.advance();
  }
  static_assert(kSlabsOfCodes == 2 && kSlabsOfScales % 2 == 0);

  // Descriptor of operand B: rows of 128 bytes, swizzled, eight rows 1024 bytes apart. Its lower
  // half begins with the address, in units of 16 bytes.
  static constexpr uint64_t kDescriptor = (uint64_t(1) << 62) | (uint64_t(1024 >> 4) << 32);
  __device__ static uint32_t descriptor(const Block& block) { return (1u << 16) | block.x(0) >> 4; }

  // One slab: the products of the first kWidth tokens.
  template <int kWidth>
  __device__ static void multiply_slab(const Operand& a, uint64_t x, Sums& sums) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      ptx::Wgmma<kWidth>::multiply(reinterpret_cast<float (&)[kWidth / 2]>(sums), a[k],
                                   x + k * 32 / 16);
  }

  struct Pipeline {
    Packed packed;        // of the next slab
    Operand operands[2];  // of the even and the odd slabs, whose products may be running
    uint32_t x_empty[2];  // where they free their activations; a tile's first ones have none
  };

  // Decodes a slab and issues its product. The loop around it asks for nothing that can be known
  // outside: every instruction of a slab counts up to 128 tokens.
  template <int kOdd>
  __device__ static void do_slab(const Block& block, int width, Cursor& cursor, Pipeline& pipeline,
                                 Sums& sums) {
    Operand& a = pipeline.operands[kOdd];
    ptx::wgmma_wait<1>();  // the product before the last one has read its operands
    if (kOdd || kSlabsOfX == 1) arrive(pipeline.x_empty[kOdd]);
    if (__builtin_expect(__any_sync(0xffffffffu, may_be_wide(pipeline.packed)), false))
      decode<true>(pipeline.packed, a);
    else
      decode<false>(pipeline.packed, a);
    if (!kOneRing && (kSlabsOfX == 1 || !kOdd))
      ptx::barrier_wait(block.x_full + 8 * cursor.x.index, cursor.x.parity);
    ptx::wgmma_fence();
    const uint64_t x = kDescriptor | (descriptor(block) + cursor.x.index * (Base::kXBytes / 16) +
                                      (kSlabsOfX == 2 ? kOdd * kSlabBytes / 16 : 0));
    // One copy of this loop: with one for each width, registers are spilled.
    if (kNarrowest < kNarrower && width == kNarrowest)
      multiply_slab<kNarrowest>(a, x, sums);
    else if (kNarrower < kTileM && width == kNarrower)
      multiply_slab<kNarrower>(a, x, sums);
    else
      multiply_slab<kTileM>(a, x, sums);
    ptx::wgmma_commit();
    pipeline.x_empty[kOdd] = block.x_empty + 8 * cursor.x.index;
    if (kSlabsOfX == 1) cursor.x.advance();
  }

  __device__ static void multiply_tile(const WgmmaArgs& args, const Block& block, const Tile& tile,
                                       const Walk& walk, Cursor& cursor, Sums& sums) {
    const int slabs = walk.end - walk.begin, width = tile.width();
    Pipeline pipeline = {{}, {}, {block.nothing, block.nothing}};
    cursor.next_scales = 0;
    cursor.begin = walk.begin;
    next_scales(args, block, cursor, 0);
    fetch<0>(block, cursor, pipeline.packed);
    for (int i = 0;;) {
      do_slab<0>(block, width, cursor, pipeline, sums);
      if (++i == slabs) break;
      fetch<1>(block, cursor, pipeline.packed);
      do_slab<1>(block, width, cursor, pipeline, sums);
      if (++i == slabs) break;
      finish_stage(block, cursor);
      if (i == cursor.next_scales) next_scales(args, block, cursor, i);
      fetch<0>(block, cursor, pipeline.packed);
      if constexpr (kHasSteadyLoop) {
        const int pairs = (min(slabs, cursor.next_scales) - i - 1) / 2;
        i += 2 * pairs;
#pragma unroll 1
        for (int left = pairs; left > 0; --left) {
          do_slab<0>(block, width, cursor, pipeline, sums);
          fetch<1>(block, cursor, pipeline.packed);
          do_slab<1>(block, width, cursor, pipeline, sums);
          finish_stage(block, cursor);
          fetch<0>(block, cursor, pipeline.packed);
        }
      }
    }
    finish_stage(block, cursor);
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTileM / 2; ++i) ptx::keep_register(sums[i]);
    // Of the last two slabs, which may be those of one stage.
    arrive(pipeline.x_empty[0]);
    if (kSlabsOfX == 1 || slabs % 2 == 1) arrive(pipeline.x_empty[1]);
  }

  __device__ static void compute(const WgmmaArgs& args, const WgmmaMaps& maps, const Block& block) {
    Cursor cursor(args);
    Walk walk(args, block);
    Sums sums;
    for (; !walk.done(); walk.next()) {
      const Tile tile(args, walk.tile);
#pragma unroll
      for (int i = 0; i < kTileM / 2; ++i) sums[i] = 0.0f;
      multiply_tile(args, block, tile, walk, cursor, sums);
      const uint32_t bias = block.bias(cursor.scales.index);
      if constexpr (kEpilogue == Epilogue::kGateUp) {
        Base::write_hidden(args, block, tile, bias, sums);
      } else if constexpr (kEpilogue == Epilogue::kDown) {
        Base::write_partial(args, tile, bias, sums);
      } else if constexpr (kShared) {
        Base::finish_shared(args, maps, block, tile, walk, bias, sums);
      } else {
        if (args.split > 1) break;  // the only tile
        Base::write_tile(args, maps, block, tile, bias, sums);
      }
      // The tile's last scales, and its bias.
      ptx::barrier_arrive(block.scale_empty + 8 * cursor.scales.index);
      cursor.scales.advance();
    }
    if constexpr (kEpilogue == Epilogue::kDense && !kShared)
      if (args.split > 1)
        Base::exchange(args, block, Tile(args, walk.tile), block.bias(cursor.scales.index), sums);
    if (threadIdx.x % 128 == 0) ptx::bulk_store_wait_read();
  }

  // The copying warps make the barriers and start; the others wait for that.
  __device__ static void run(const WgmmaArgs& args, const WgmmaMaps& maps, char* memory) {
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&maps.w);
    } else if (threadIdx.x == 32) {
      ptx::prefetch_tensor_map(!kGrouped && args.m < kTileM ? &maps.last_x : &maps.x);
    } else if (threadIdx.x == 64) {
      if (args.scale_rows) ptx::prefetch_tensor_map(&maps.scales);
    } else if (threadIdx.x == 96) {
      if (!args.scatter) ptx::prefetch_tensor_map(&maps.out);
    }
    const Block block(args, memory);
    const int thread = threadIdx.x - 128 * kWarpgroups, lane = threadIdx.x % 32;
    if (thread < 0) {
      ptx::named_barrier_sync(Base::kStarted, kThreads);
      ptx::claim_registers<kComputeRegisters>();
      compute(args, maps, block);
      return;
    }
    ptx::release_registers<kCopyRegisters>();
    const int warp = thread / 32;
    if (warp == 0) {
      copy_codes(args, maps, block);
    } else if (warp == 1) {
      copy_activations(args, maps, block);
    } else if (warp == 2) {
      copy_scales(args, maps, block);
    } else {
      if (lane == 0) {
        ptx::barrier_init(block.nothing, 4 * kWarpgroups);
        ptx::barrier_init_fence();
      }
      started();
      // Nobody needs these before the thread blocks of the cluster meet.
      if (lane == 0 && args.split > 1) {
#pragma unroll 1
        for (int i = 0; i < Base::exchanged_groups(args, block.rank); ++i) {
          ptx::barrier_init(block.exchanged + 8 * i, 1);
          ptx::barrier_arrive_expect(block.exchanged + 8 * i, (args.split - 1) * Base::kSlotBytes);
        }
        ptx::barrier_init_fence();
      }
      __syncwarp();
      if constexpr (kShared) Base::publish_part(Walk(args, block));
    }
    __syncwarp();
    if (args.split > 1) ptx::cluster_sync_relaxed();  // which counts every thread
  }

  // So many copy warps fill; so many arrivals of the computing warps empty. The empty barriers lie
  // behind the full ones.
  __device__ static void make_ring(uint32_t full, int stages, int copies, int arrivals) {
    if (threadIdx.x % 32 == 0) {
#pragma unroll 1
      for (int s = 0; s < stages; ++s) {
        ptx::barrier_init(full + 8 * s, copies);
        ptx::barrier_init(full + 8 * (stages + s), arrivals);
      }
      ptx::barrier_init_fence();
    }
    __syncwarp();
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
