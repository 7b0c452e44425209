// Fused dequantize-GEMM for few tokens, limited by reading the weights: sm_90 and later, bf16,
// dense.
//
// One thread block per multiprocessor walks over its row tiles. Producer warps keep a ring of
// stages of packed weights full with bulk copies, ahead of and independent of the arithmetic, so
// that memory never waits for it; that is what a block per tile cannot do, whose loads stop while
// it decodes and whose successor starts cold. Compute warps split a stage's K between them, and an
// epilogue warp adds their sums and writes the previous tile while they work on the next.
//
//   producer      | stage 0 | stage 1 | stage 2 | ...            bulk copies -> full[s]
//   compute warps           | decode, MMA | decode, MMA | ...    -> empty s, sums[b] -> ready b
//   epilogue                              | add, bias, store |   -> free[b]
//
// A stage holds tile_n rows of 64 * stage_chunks bytes. The row stride is 64 modulo 128, so that
// the eight lanes of one 128-bit shared access (two rows, four blocks) touch all 32 banks.
#pragma once

#include "gemm.cuh"

namespace jax_mxfp4 {

template <int kConfig>
struct StreamingGemm {
  static constexpr GemmConfig config = kGemmConfigs[kConfig];
  static constexpr int kRows = config.rows;
  static constexpr int kWarps = config.warps_k;
  static constexpr int kChunks = config.chunks;
  static constexpr int kStageChunks = config.stage_chunks();
  static constexpr int kStages = config.stages;
  static constexpr int kTileM = config.tile_m;
  static constexpr int kTileN = config.tile_n();
  static constexpr int kGroups = kTileM / 8;
  // One copy instruction serves one row and takes its warp some 80 cycles: one warp of them would
  // hold back the memory.
  static constexpr int kProducers = kStageChunks == 24 ? 2 : 3;
  static constexpr int kThreads = 32 * (kWarps + 1 + kProducers);
  static constexpr int kEpilogue = kWarps;

  // A stage is announced in kChunks pieces, so that work starts when the first has arrived: where a
  // multiprocessor has one tile only, nothing else would overlap arithmetic with memory.
  static constexpr int kPieces = kStages * kChunks;
  static constexpr int kPieceBytes = kWarps * 64;  // of one row
  static constexpr int kRowBytes = kStageChunks * 64;
  static constexpr int kStride = kRowBytes + (192 - kRowBytes % 128) % 128;
  static constexpr int kRowScales = kStageChunks * 4;
  static constexpr int kScaleOffset = kTileN * kStride;
  static constexpr int kStageBytes = kScaleOffset + kTileN * kRowScales;
  static constexpr int kSumStride = kTileN + 4;  // conflict-free scatter of the fragments
  static constexpr int kSumBytes = kWarps * kTileM * kSumStride * 4;
  static constexpr int kSumOffset = kStages * kStageBytes;
  // The bias comes along with the codes, since an ordinary load would queue behind all the copies
  // in flight; it stays until the epilogue warp, a few tiles later, has used it.
  static constexpr int kBiases = 16, kBiasBytes = kTileN * 4;
  static_assert(kBiases >= kStages + 6);
  static constexpr int kBiasOffset = kSumOffset + 2 * kSumBytes;
  static constexpr int kBarrierOffset = kBiasOffset + kBiases * kBiasBytes;
  static constexpr int kSharedBytes = kBarrierOffset + (kPieces + 2) * 8;
  static_assert(kStride % 128 == 64 && kStageBytes % 16 == 0 && kSharedBytes <= 227 * 1024);
  static_assert(kRowScales % 16 == 0);  // the least that a bulk copy moves

  struct Barriers {
    uint32_t full, free;  // arrays of kPieces and 2
    __device__ explicit Barriers(uint32_t base) : full(base), free(full + 8 * kPieces) {}
    __device__ void init() const {
      for (int p = 0; p < kPieces; ++p) ptx::barrier_init(full + 8 * p, kProducers);
      for (int b = 0; b < 2; ++b) ptx::barrier_init(free + 8 * b, 32);
      ptx::barrier_init_fence();
    }
  };

  // Sums and empty stages are handed over by named barriers: every lane that wrote or read takes
  // part, which an mbarrier would have to count one by one.
  static constexpr int kReady = 1, kReadyThreads = 32 * (kWarps + 1);
  static constexpr int kEmpty = 3, kEmptyThreads = 32 * (kWarps + kProducers);
  static_assert(kEmpty + kStages <= 16);

  __device__ static int slices(const GemmArgs& args) {
    return (args.k + 2 * kRowBytes - 1) / (2 * kRowBytes);
  }

  // One copy warp's share of a stage: rows producer, producer + kProducers, ... of the `tile_rows`
  // from `first_row` on, announced piece by piece to the barriers at `full`; with the first slice
  // also their bias. kReadsOnce: nobody will read them again soon.
  template <bool kReadsOnce>
  __device__ static void copy_stage(const PackedWeights& weights, const Bias& bias, int k,
                                    int64_t first_row, int tile_rows, int slice, int num_slices,
                                    uint32_t stage, uint32_t bias_slot, uint32_t full,
                                    int producer) {
    const int lane = threadIdx.x % 32;
    const int row = producer + kProducers * lane;
    const bool copies = row < tile_rows;
    const int rows = (tile_rows - producer + kProducers - 1) / kProducers;
    const int blocks_per_row = k / kBlockSize;
    const int scales = min(kRowScales, blocks_per_row - slice * kRowScales);
    const int64_t first_block = first_row * blocks_per_row;
    const int64_t block = first_block + int64_t(row) * blocks_per_row + slice * kRowScales;
    const bool copies_bias = bias.data && slice == 0 && producer == 0;
    const int bias_bytes = tile_rows * size_of(bias.type);
    const uint64_t policy = kReadsOnce ? ptx::cache_policy(ptx::Evict::kFirst) : 0;
    const auto copy = [&](uint32_t to, const uint8_t* from, int bytes) {
      if constexpr (kReadsOnce)
        ptx::bulk_copy(to, from, bytes, full, policy);
      else
        ptx::bulk_copy(to, from, bytes, full);
    };
#pragma unroll
    for (int q = 0; q < kChunks; ++q, full += 8) {
      const int offset = q * kPieceBytes;
      // A piece past the end of K is announced too, empty: phases of all barriers keep step.
      const int bytes = max(0, min(kPieceBytes, k / 2 - slice * kRowBytes - offset));
      const int scale_bytes = q > 0            ? 0
                              : num_slices > 1 ? rows * scales
                              : producer == 0  ? tile_rows * scales
                                               : 0;
      const int announced = rows * bytes + scale_bytes + (q == 0 && copies_bias ? bias_bytes : 0);
      if (lane == 0) ptx::barrier_arrive_expect(full, announced);
      __syncwarp();
      if (q == 0) {
        if (num_slices > 1) {
          if (copies) copy(stage + kScaleOffset + row * kRowScales, weights.scales + block, scales);
        } else if (lane == 0 && producer == 0) {
          copy(stage + kScaleOffset, weights.scales + first_block, tile_rows * scales);
        }
      }
      if (q == 0 && copies_bias && lane == 1)
        ptx::bulk_copy(bias_slot,
                       static_cast<const char*>(bias.data) + first_row * size_of(bias.type),
                       bias_bytes, full);
      if (copies && bytes > 0)
        copy(stage + row * kStride + offset, weights.blocks + block * kBlockBytes + offset, bytes);
    }
  }

  // The ring's next stage, once every compute warp has left it; `fill` counts the stages so far.
  __device__ static void wait_empty(const Ring<kStages>& ring, int& fill) {
    __syncwarp();
    if (fill++ >= kStages) ptx::named_barrier_sync(kEmpty + ring.index, kEmptyThreads);
  }

  // Tiles whose slices take turns: activations that do not stay in registers are read for two.
  template <bool kCached>
  static constexpr int kTogether = !kCached && reads_for_two_tiles(config) ? 2 : 1;

  template <bool kCached>
  __device__ static void produce(const GemmArgs& args, uint32_t shared, const Barriers& barriers,
                                 int producer) {
    // Read where it is always 1, too: as a constant it made lm_head 2 to 4 % slower.
    const int num_slices = slices(args), tiles = args.n / kTileN;
    Ring<kStages> ring;
    Ring<kBiases> bias_ring;
    int fill = 0;
    for (int first = blockIdx.x; first < tiles; first += kTogether<kCached> * gridDim.x) {
      for (int slice = 0; slice < num_slices; ++slice) {
        Ring<kBiases> bias = bias_ring;
        for (int i = 0; i < kTogether<kCached>; ++i, ring.advance(), bias.advance()) {
          const int tile = first + i * int(gridDim.x);
          if (tile >= tiles) break;
          wait_empty(ring, fill);
          copy_stage<true>(args.weights, args.bias, args.k, int64_t(tile) * kTileN, kTileN, slice,
                           num_slices, shared + ring.index * kStageBytes, bias_slot(shared, bias),
                           barriers.full + 8 * kChunks * ring.index, producer);
        }
      }
      for (int i = 0; i < kTogether<kCached>; ++i) bias_ring.advance();
    }
  }
  static_assert(kTileN <= 32 * kProducers, "one lane copies one row");

  // Where the rows of x lie whose products are a lane's columns, tokens g, g + 8, ...: elements.
  using Rows = uint32_t[kGroups];

  // One chunk of the activations of lane (g, t): block t of its rows.
  struct Tokens {
    uint4 raw[kGroups][4];

    // kReadOnly: nothing writes x while the kernel runs.
    template <bool kReadOnly>
    __device__ void load(const __nv_bfloat16* x, const Rows& rows, int blocks_per_row, int chunk) {
      // Past the end of K both sides are zero: zero weights alone would turn Inf into NaN.
      const int block = 4 * chunk + threadIdx.x % 4;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const uint4* row = reinterpret_cast<const uint4*>(
            x + (rows[j] + min(block, blocks_per_row - 1) * kBlockSize));
#pragma unroll
        for (int i = 0; i < 4; ++i) raw[j][i] = kReadOnly ? __ldg(row + i) : __ldcg(row + i);
      }
      if (4 * chunk + 4 > blocks_per_row && block >= blocks_per_row)  // the last chunk only
#pragma unroll
        for (int j = 0; j < kGroups; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) raw[j][i] = make_uint4(0, 0, 0, 0);
    }
  };

  using Sums = float[kRows][kGroups][4];

  // Products of group kGroup of every block, and of those that follow.
  template <bool kWide, int kGroup = 0>
  __device__ static void multiply(const uint4 (&codes)[kRows][2],
                                  const ScaleFactor (&scale)[kRows][2], const Tokens& x,
                                  Sums& acc) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        decode_group<kGroup, kWide>(codes[r][half], scale[r][half], a[half]);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const uint4& b = x.raw[j][kGroup];
        ptx::mma_m16n8k16(acc[r][j], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
        ptx::mma_m16n8k16(acc[r][j], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
      }
    }
    if constexpr (kGroup < 3) multiply<kWide, kGroup + 1>(codes, scale, x, acc);
  }

  // `local` is the chunk's place in the stage, `chunk` its place in K.
  __device__ static void multiply_chunk(int blocks_per_row, uint32_t stage, int scale_stride,
                                        int local, int chunk, const Tokens& x, Sums& acc) {
    const int lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    const bool past_end = 4 * chunk + t >= blocks_per_row;
    uint4 codes[kRows][2];
    uint32_t bytes[kRows][2], largest = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * r + 8 * half + g;
        codes[r][half] = ptx::load_shared16(stage + row * kStride + local * 64 + t * 16);
        // What lies past the end of a row was never copied.
        bytes[r][half] =
            past_end
                ? 0
                : ptx::load_shared_byte(stage + kScaleOffset + row * scale_stride + 4 * local + t);
        largest = max(largest, bytes[r][half]);
      }
    ScaleFactor scale[kRows][2];
    if (__any_sync(0xffffffffu, largest > kLargestNarrow)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) scale[r][half] = scale_factor(bytes[r][half]);
      multiply<true>(codes, scale, x, acc);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) scale[r][half] = {narrow_factor(bytes[r][half]), 0};
      multiply<false>(codes, scale, x, acc);
    }
  }

  // This warp's sums of a tile, for the epilogue warp.
  __device__ static void put_sums(const Sums& acc, float* sums, int buffer, int warp) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float* mine = sums + (buffer * kWarps + warp) * kTileM * kSumStride;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < kGroups; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          mine[(8 * j + 2 * t + c % 2) * kSumStride + 16 * r + 8 * (c / 2) + g] = acc[r][j][c];
  }

  __device__ static uint32_t bias_slot(uint32_t shared, const Ring<kBiases>& ring) {
    return shared + kBiasOffset + ring.index * kBiasBytes;
  }

  // The bias of four rows, zero if there is none.
  __device__ static void load_bias(const Bias& bias, uint32_t slot, int row, float (&v)[4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      v[c] = bias.data ? load_shared_float(slot, bias.type, row + c) : 0.0f;
  }

  // The sum of all warps and the bias for four rows of one token.
  __device__ static void add_sums(const float* sums, int buffer, int token, int row,
                                  const float (&bias)[4], float (&v)[4]) {
    const float* first = sums + (buffer * kWarps * kTileM + token) * kSumStride + row;
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] = bias[c];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = *reinterpret_cast<const float4*>(first + w * kTileM * kSumStride);
      v[0] += part.x;
      v[1] += part.y;
      v[2] += part.z;
      v[3] += part.w;
    }
  }

  // kCached: K fits one slice, so a warp sees the same activations in every tile and keeps them.
  template <bool kCached>
  __device__ static void compute(const GemmArgs& args, uint32_t shared, float* sums,
                                 const Barriers& barriers) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int blocks_per_row = args.k / kBlockSize;
    const int num_chunks = (args.k + 127) / 128;
    const int num_slices = kCached ? 1 : slices(args);
    const int scale_stride = num_slices == 1 ? blocks_per_row : kRowScales;

    Rows rows;  // past the last token the results are dropped, so any row will do
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
      rows[j] = uint32_t(min(8 * j + lane / 4, int(args.m) - 1) * args.k);
    const __nv_bfloat16* x_rows = static_cast<const __nv_bfloat16*>(args.x);
    // kCached: the same in every tile; otherwise the next one is asked for ahead.
    Tokens tokens[kCached ? kChunks : 1];
#pragma unroll
    for (int q = 0; q < (kCached ? kChunks : 1); ++q)
      tokens[q].template load<true>(x_rows, rows, blocks_per_row, warp + kWarps * q);
    Ring<kStages> ring;
    Ring<2> sum_ring;
    const int tiles = args.n / kTileN;
    for (int first = blockIdx.x; first < tiles; first += kTogether<kCached> * gridDim.x) {
      const bool all = first + (kTogether<kCached> - 1) * int(gridDim.x) < tiles;
      Sums acc[kTogether<kCached>] = {};
      for (int slice = 0; slice < num_slices; ++slice) {
        const int first_chunk = slice * kStageChunks;
#pragma unroll
        for (int q = 0; q < kChunks; ++q) {
          const int local = warp + kWarps * q, chunk = first_chunk + local;
          const Tokens x = tokens[kCached ? q : 0];
          if constexpr (!kCached) {
            const int next = q + 1 < kChunks          ? chunk + kWarps
                             : slice + 1 < num_slices ? first_chunk + kStageChunks + warp
                                                      : warp;
            tokens[0].template load<true>(x_rows, rows, blocks_per_row, next);
          }
#pragma unroll
          for (int i = 0; i < kTogether<kCached>; ++i) {
            if (i > 0 && !all) break;
            ptx::barrier_wait(barriers.full + 8 * (ring.index * kChunks + q), ring.parity);
            if (chunk < num_chunks)
              multiply_chunk(blocks_per_row, shared + ring.index * kStageBytes, scale_stride, local,
                             chunk, x, acc[i]);
            if (q + 1 < kChunks) continue;
            ptx::named_barrier_arrive(kEmpty + ring.index, kEmptyThreads);
            ring.advance();
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether<kCached>; ++i) {
        if (i > 0 && !all) break;
        ptx::barrier_wait(barriers.free + 8 * sum_ring.index, sum_ring.parity ^ 1);
        put_sums(acc[i], sums, sum_ring.index, warp);
        ptx::named_barrier_arrive(kReady + sum_ring.index, kReadyThreads);
        sum_ring.advance();
      }
    }
  }

  // Four rows a lane, the same of every tile: this warp must keep up with all others.
  static constexpr int kQuads = kTileN / 4;
  static_assert(32 % kQuads == 0);

  __device__ static void write_out(const GemmArgs& args, uint32_t shared, const float* sums,
                                   const Barriers& barriers) {
    const int lane = threadIdx.x % 32, row = lane % kQuads * 4;
    Ring<2> ring;
    Ring<kBiases> bias_ring;
    for (int tile = blockIdx.x; tile < args.n / kTileN;
         tile += gridDim.x, ring.advance(), bias_ring.advance()) {
      __syncwarp();
      ptx::named_barrier_sync(kReady + ring.index, kReadyThreads);
      float bias[4];
      load_bias(args.bias, bias_slot(shared, bias_ring), row, bias);
      for (int token = lane / kQuads; token < int(args.m); token += 32 / kQuads) {
        float v[4];
        add_sums(sums, ring.index, token, row, bias, v);
        store_four(args.out, args.out_type, int64_t(token) * args.n + tile * kTileN + row, v);
      }
      ptx::barrier_arrive(barriers.free + 8 * ring.index);
    }
  }

  template <bool kCached>
  __device__ static void run(const GemmArgs& args, char* memory) {
    const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    const Barriers barriers(shared + kBarrierOffset);
    if (threadIdx.x == 0) barriers.init();
    __syncthreads();
    float* sums = reinterpret_cast<float*>(memory + kSumOffset);
    const int warp = threadIdx.x / 32;
    if (warp > kEpilogue)
      produce<kCached>(args, shared, barriers, warp - kEpilogue - 1);
    else if (warp == kEpilogue)
      write_out(args, shared, sums, barriers);
    else
      compute<kCached>(args, shared, sums, barriers);
  }
};

// y = x * w^T + bias with a streaming configuration; see gemm_streaming.cu.
cudaError_t launch_streaming(int config, const GemmArgs& args, int multiprocessors,
                             cudaStream_t stream);

}  // namespace jax_mxfp4
