// What becomes of a tile's sums in the wgmma kernels: bias and rounding, the exchange of partial
// sums, the activation of the expert layer.
//
// All of it runs once a tile, so that its instructions come from far away, which takes as long as
// what they do: what is unrolled, because sums lie in registers, is kept short.
#pragma once

#include "gemm_wgmma_tiles.cuh"

namespace jax_mxfp4 {

// Where all thread blocks share all tiles: of each at most one part of a tile, for the thread block
// that has the tile's beginning, and whether its warpgroups have written it; who reads a part
// resets that. Kernels that use this are cooperative launches that fill the GPU: one runs at a
// time.
constexpr int kMaxPart = 128 * 128;
static __device__ float4 g_parts[kMaxSharers][kMaxPart / 4];
static __device__ unsigned g_part_written[kMaxSharers][4];

template <int kConfig, Epilogue kEpilogue, bool kShared>
struct WgmmaEpilogue : WgmmaTiles<kConfig, kEpilogue, kShared> {
  using Tiles = WgmmaTiles<kConfig, kEpilogue, kShared>;
  using Tiles::kGrouped;
  using Tiles::kStagedGroups;
  using Tiles::kStagingOffset;
  using Tiles::kTileM;
  using Tiles::kTileN;
  using Tiles::kTokenGroups;
  using Tiles::kWarpgroups;
  using typename Tiles::Block;
  using typename Tiles::Tile;
  using typename Tiles::Walk;

  // Of 64 rows and kTileM tokens: of every eight tokens a lane has tokens 2c and 2c + 1 of row g,
  // then of row g + 8 (gate_up: rows 2g and 2g + 1).
  using Sums = float[kTileM / 2];

  // Named barriers; a warpgroup has 1 and its number.
  static constexpr int kStarted = 5, kHandedOver = 6, kRingsMade = 7;

  static constexpr int kSlotBytes = kWarpgroups * 128 * 16;  // of the exchange of sums, one group

  // Whether the exchange has room before the staging slots, which it goes on to fill.
  static constexpr bool can_split(int most) {
    for (int split = 2; split <= most; ++split) {
      const int turns = (kTokenGroups + split - 1) / split;
      if (turns * split * kSlotBytes > kStagingOffset || turns > kStagedGroups) return false;
    }
    return true;
  }
  static_assert(kGrouped || can_split(max_split(Tiles::config)));

  // Of a lane's two rows. Those past the last one have none, and nobody stores them.
  struct RowBias {
    float v[2] = {};

    __device__ RowBias(const WgmmaArgs& args, uint32_t bias) {
      if (!args.bias.data) return;
      const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 * Tiles::kFirstRow;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        v[half] = load_shared_float(bias, args.bias.type, row + Tiles::kSecondRow * half);
    }
  };

  // Where a lane stages two of eight tokens of rows g and g + 8; groups of tokens are a kilobyte
  // apart.
  __device__ static uint32_t staging_of_lane(const Block& block) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int token = lane % 8, unit = 2 * warp + lane / 8 % 2;
    return block.staging(threadIdx.x / 128) + token * 128 + (unit ^ token) * 16;
  }

  __device__ static void stage(uint32_t to, const float* v, const RowBias& bias) {
    ptx::store_matrix_transposed(to, pack_pair(v[0] + bias.v[0], v[1] + bias.v[0], DType::kBF16),
                                 pack_pair(v[2] + bias.v[1], v[3] + bias.v[1], DType::kBF16));
  }

  // Staged tokens of a warpgroup, `first` of the tile and the next ones, to `out`: 128 bytes of
  // each by eight lanes.
  __device__ static void store_staged(const WgmmaArgs& args, const Block& block, const Tile& tile,
                                      int first, int tokens) {
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, unit = thread % 8;
    const int row = tile.row + warpgroup * 64 + unit * 8;
    if (row >= args.n) return;
    const int end = min(tokens, args.m - tile.token - first);
    int token = thread / 8;
    __nv_bfloat16* out =
        static_cast<__nv_bfloat16*>(args.out) + int64_t(tile.token + first + token) * args.n + row;
    uint32_t from = block.staging(warpgroup) + token * 128 + (unit ^ token % 8) * 16;
#pragma unroll 2
    for (; token < end; token += 16) {
      *reinterpret_cast<uint4*>(out) = ptx::load_shared16(from);
      out += int64_t(16) * args.n;
      from += 16 * 128;
    }
  }

  // Group j of a tile that cannot be stored in units of 16 bytes.
  __device__ static void scatter(const WgmmaArgs& args, const Tile& tile, int j, const float* sums,
                                 const RowBias& bias) {
    const int lane = threadIdx.x % 32, row = tile.row + threadIdx.x / 32 * 16 + lane / 4;
    const int token = tile.token + j * 8 + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = token + i % 2, n = row + 8 * (i / 2);
      if (m < args.m && n < args.n)
        store_float(args.out, args.out_type, int64_t(m) * args.n + n, sums[i] + bias.v[i / 2]);
    }
  }

  // `bias_at`: where the bias of the tile begins in shared memory.
  __device__ static void write_tile(const WgmmaArgs& args, const WgmmaMaps& maps,
                                    const Block& block, const Tile& tile, uint32_t bias_at,
                                    const Sums& sums) {
    const int warpgroup = threadIdx.x / 128;
    const RowBias bias(args, bias_at);
    if (args.scatter) {
      // Through slots of its own a thread gets at its sums by number.
      constexpr int kSlots = kStagedGroups / 2;
      const uint32_t slots = block.staging(warpgroup) + threadIdx.x % 128 * 16;
#pragma unroll
      for (int first = 0; first < kTokenGroups; first += kSlots) {
#pragma unroll
        for (int j = 0; j < kSlots && first + j < kTokenGroups; ++j)
          ptx::store_shared16(slots + j * 2048, sums + 4 * (first + j));
#pragma unroll 1
        for (int j = 0; j < kSlots && first + j < kTokenGroups; ++j) {
          const uint4 v = ptx::load_shared16(slots + j * 2048);
          const float group[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                                  __uint_as_float(v.w)};
          scatter(args, tile, first + j, group, bias);
        }
      }
      return;
    }
    // What fits is left to the copy engine. In its queue it comes behind the loads of the tiles to
    // come, so the first half of large tiles, whose place the other one needs, does not go there.
    const uint32_t to = staging_of_lane(block);
    const bool leader = threadIdx.x % 128 == 0;
    if (leader) ptx::bulk_store_wait_read();  // of the tile before
    ptx::named_barrier_sync(1 + warpgroup, 128);
    constexpr int kLast = kTokenGroups - kStagedGroups;
    static_assert(kLast == 0 || kLast == kStagedGroups);
    if constexpr (kLast > 0) {
#pragma unroll
      for (int j = 0; j < kLast; ++j) stage(to + j * 1024, sums + 4 * j, bias);
      ptx::named_barrier_sync(1 + warpgroup, 128);
      store_staged(args, block, tile, 0, kLast * 8);
      ptx::named_barrier_sync(1 + warpgroup, 128);
    }
#pragma unroll
    for (int j = 0; j < kStagedGroups; ++j) stage(to + j * 1024, sums + 4 * (kLast + j), bias);
    ptx::async_proxy_fence();
    ptx::named_barrier_sync(1 + warpgroup, 128);
    const int row = tile.row + warpgroup * 64, token = tile.token + kLast * 8;
    if (leader && row < args.n && token < args.m) {
      ptx::tensor_store(&maps.out, row, token, block.staging(warpgroup));
      ptx::bulk_store_commit();
    }
  }

  // Groups of tokens that the thread block of this rank adds up.
  __device__ static int exchanged_groups(const WgmmaArgs& args, int rank) {
    return max(min(args.turns, kTokenGroups - rank * args.turns), 0);
  }

  // K split within the cluster: each thread block adds the parts of its groups, in their order.
  __device__ static void exchange(const WgmmaArgs& args, const Block& block, const Tile& tile,
                                  uint32_t bias_at, const Sums& sums) {
    const int split = args.split, rank = block.rank, turns = args.turns;
    const uint32_t mine = block.shared + threadIdx.x * 16;
    const RowBias bias(args, bias_at);
    ptx::cluster_sync_relaxed();  // nobody reads its rings any more
    int owner = -1, turn = turns;
    uint32_t to = 0, barrier = 0;
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      if (turn == turns) {
        turn = 0;
        to = ptx::shared_of_rank(mine + rank * kSlotBytes, ++owner);
        barrier = ptx::shared_of_rank(block.exchanged, owner);
      }
      if (owner == rank)
        ptx::store_shared16(mine + (turn * split + rank) * kSlotBytes, sums + 4 * j);
      else
        ptx::store_async16(to, sums + 4 * j, barrier);
      to += split * kSlotBytes;
      barrier += 8;
      ++turn;
    }
    const int first = rank * turns, groups = exchanged_groups(args, rank);
    if (split == 2)
      add_parts<2>(args, block, tile, first, groups, bias);
    else if (split == 3)
      add_parts<3>(args, block, tile, first, groups, bias);
    else if (split == 4)
      add_parts<4>(args, block, tile, first, groups, bias);
    else
      add_parts<0>(args, block, tile, first, groups, bias);
    if (args.scatter) return;
    ptx::named_barrier_sync(1 + threadIdx.x / 128, 128);
    store_staged(args, block, tile, first * 8, groups * 8);
  }

  // Adds the parts of each group as they come and stages it. kParts: so many, read together for two
  // groups; 0: any number.
  template <int kParts>
  __device__ static void add_parts(const WgmmaArgs& args, const Block& block, const Tile& tile,
                                   int first, int groups, const RowBias& bias) {
    constexpr int kAtOnce = kParts ? 2 : 1;
    uint32_t from = block.shared + threadIdx.x * 16, staged = staging_of_lane(block);
#pragma unroll 1
    for (int i = 0; i < groups; i += kAtOnce) {
      float v[kAtOnce][4] = {};
      const auto add = [&](int group, const uint4& part) {
        v[group][0] += __uint_as_float(part.x);
        v[group][1] += __uint_as_float(part.y);
        v[group][2] += __uint_as_float(part.z);
        v[group][3] += __uint_as_float(part.w);
      };
      if constexpr (kParts) {
        uint4 parts[kAtOnce][kParts];
#pragma unroll
        for (int group = 0; group < kAtOnce; ++group) {
          if (i + group == groups) break;
          ptx::barrier_wait(block.exchanged + 8 * (i + group), 0);
#pragma unroll
          for (int part = 0; part < kParts; ++part, from += kSlotBytes)
            parts[group][part] = ptx::load_shared16(from);
        }
#pragma unroll
        for (int group = 0; group < kAtOnce; ++group)
#pragma unroll
          for (int part = 0; part < kParts; ++part) add(group, parts[group][part]);
      } else {
        ptx::barrier_wait(block.exchanged + 8 * i, 0);
        for (int part = 0; part < args.split; ++part, from += kSlotBytes)
          add(0, ptx::load_shared16(from));
      }
#pragma unroll
      for (int group = 0; group < kAtOnce; ++group, staged += 1024) {
        if (i + group == groups) break;
        if (args.scatter)
          scatter(args, tile, first + i + group, v[group], bias);
        else
          stage(staged, v[group], bias);
      }
    }
  }

  // The thread block that has a tile's first slab adds what the others, which follow it, bring.
  __device__ static void finish_shared(const WgmmaArgs& args, const WgmmaMaps& maps,
                                       const Block& block, const Tile& tile, const Walk& walk,
                                       uint32_t bias_at, Sums& sums) {
    if (walk.begin > 0) {
      hand_over(sums);
      return;
    }
    const int end = (walk.tile + 1) * block.slabs;
    for (int rank = blockIdx.x + 1; rank < int(gridDim.x); ++rank) {
      const int first = Walk::first_slab(args, block, rank);
      if (first >= end) break;
      if (first < Walk::first_slab(args, block, rank + 1)) collect(rank, sums);
    }
    write_tile(args, maps, block, tile, bias_at, sums);
  }

  __device__ static float4* part_of(int rank) {
    static_assert(kTileM * kTileN <= kMaxPart);
    return g_parts[rank] + threadIdx.x / 128 * kTokenGroups * 128 + threadIdx.x % 128;
  }

  __device__ static void hand_over(const Sums& sums) {
    float4* to = part_of(blockIdx.x);
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      const float* v = sums + 4 * j;
      __stcg(to + j * 128, make_float4(v[0], v[1], v[2], v[3]));
    }
    __syncwarp();
    ptx::named_barrier_arrive(kHandedOver, 128 * kWarpgroups + 32);
  }

  // For a warp that does not compute: waits for the part that its thread block hands over, which
  // the others need not do, and says that it is there.
  __device__ static void publish_part(const Walk& walk) {
    if (walk.done() || walk.begin == 0) return;
    ptx::named_barrier_sync(kHandedOver, 128 * kWarpgroups + 32);
    const int warpgroup = threadIdx.x % 32;
    if (warpgroup < kWarpgroups) {
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

  // Bias and clamped SwiGLU; through shared memory, so that a token's 32 columns leave together.
  // The copy engine would also write what lies past the last token, which belongs to another tile.
  __device__ static void write_hidden(const WgmmaArgs& args, const Block& block, const Tile& tile,
                                      uint32_t bias_at, const Sums& sums) {
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    const int warp = thread / 32, lane = thread % 32;
    const RowBias bias(args, bias_at);
    const uint32_t staging = block.staging(warpgroup);
    ptx::named_barrier_sync(1 + warpgroup, 128);  // the tile before has left it
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      if (8 * j >= tile.rows) break;
      float h[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        h[i] = clamped_swiglu(sums[4 * j + i] + bias.v[0], sums[4 * j + 2 + i] + bias.v[1],
                              args.alpha, args.limit);
      const int token = lane % 8;
      ptx::store_matrix_transposed(staging + (8 * j + token) * 64 + (warp ^ (token / 2)) * 16,
                                   pack_pair(h[0], h[1], DType::kBF16));
    }
    ptx::named_barrier_sync(1 + warpgroup, 128);
    const int columns = args.n / 2, first_column = tile.row / 2 + warpgroup * 32;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out);
    for (int i = thread; i < 4 * tile.rows; i += 128) {
      const int token = i / 4, unit = i % 4, column = first_column + unit * 8;
      if (column < columns)
        *reinterpret_cast<uint4*>(out + int64_t(tile.token + token) * columns + column) =
            ptx::load_shared16(staging + token * 64 + (unit ^ (token / 2 % 4)) * 16);
    }
  }

  // With the bias: eight rows of a token fill a sector, so every lane writes for itself.
  __device__ static void write_partial(const WgmmaArgs& args, const Tile& tile, uint32_t bias_at,
                                       const Sums& sums) {
    const int row = tile.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    const int token = 2 * (threadIdx.x % 4);
    const RowBias bias(args, bias_at);
    float* out = static_cast<float*>(args.out) + int64_t(tile.token + token) * args.n + row;
    int left = tile.rows - token;
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j, left -= 8, out += 8 * int64_t(args.n)) {
      if (8 * j >= tile.rows) break;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (i < left && row + 8 * half < args.n)
            out[i * int64_t(args.n) + 8 * half] = sums[4 * j + 2 * half + i] + bias.v[half];
    }
  }
};

}  // namespace jax_mxfp4
