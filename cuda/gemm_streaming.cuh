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
  static constexpr int kProducers = kWarps == 12 ? 2 : 3;
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
  static constexpr int kBarrierOffset = kSumOffset + 2 * kSumBytes;
  static constexpr int kSharedBytes = kBarrierOffset + (kPieces + 2) * 8;
  static_assert(kStride % 128 == 64 && kStageBytes % 16 == 0 && kSharedBytes <= 227 * 1024);

  struct Barriers {
    uint32_t full, free;  // arrays of kPieces and 2
    __device__ explicit Barriers(uint32_t base) : full(base), free(full + 8 * kPieces) {}
  };

  // Sums and empty stages are handed over by named barriers: every lane that wrote or read takes
  // part, which an mbarrier would have to count one by one.
  static constexpr int kReady = 1, kReadyThreads = 32 * (kWarps + 1);
  static constexpr int kEmpty = 3, kEmptyThreads = 32 * (kWarps + kProducers);
  static_assert(kEmpty + kStages <= 16);

  __device__ static int slices(const GemmArgs& args) {
    return (args.k + 2 * kRowBytes - 1) / (2 * kRowBytes);
  }

  __device__ static void produce(const GemmArgs& args, uint32_t shared, const Barriers& barriers,
                                 int producer) {
    const int lane = threadIdx.x % 32;
    const int row = producer + kProducers * lane;
    const bool copies = row < kTileN;
    const int rows = (kTileN - producer + kProducers - 1) / kProducers;
    const int blocks_per_row = args.k / kBlockSize;
    const int num_slices = slices(args);
    Ring<kStages> ring;
    int fill = 0;
    for (int tile = blockIdx.x; tile < args.n / kTileN; tile += gridDim.x) {
      const int64_t first_block = int64_t(tile) * kTileN * blocks_per_row;
      for (int slice = 0; slice < num_slices; ++slice, ring.advance()) {
        __syncwarp();
        if (fill++ >= kStages) ptx::named_barrier_sync(kEmpty + ring.index, kEmptyThreads);
        const uint32_t stage = shared + ring.index * kStageBytes;
        const int scales = min(kRowScales, blocks_per_row - slice * kRowScales);
        const int64_t block = first_block + int64_t(row) * blocks_per_row + slice * kRowScales;
#pragma unroll
        for (int q = 0; q < kChunks; ++q) {
          const int offset = q * kPieceBytes;
          // A piece past the end of K is announced too, empty: phases of all barriers keep step.
          const int bytes = max(0, min(kPieceBytes, args.k / 2 - slice * kRowBytes - offset));
          const uint32_t full = barriers.full + 8 * (ring.index * kChunks + q);
          const int scale_bytes = q > 0            ? 0
                                  : num_slices > 1 ? rows * scales
                                  : producer == 0  ? kTileN * scales
                                                   : 0;
          if (lane == 0) ptx::barrier_arrive_expect(full, rows * bytes + scale_bytes);
          __syncwarp();
          if (q == 0) {
            if (num_slices > 1) {
              if (copies)
                ptx::bulk_copy(stage + kScaleOffset + row * kRowScales, args.weights.scales + block,
                               scales, full);
            } else if (lane == 0 && producer == 0) {
              ptx::bulk_copy(stage + kScaleOffset, args.weights.scales + first_block,
                             kTileN * scales, full);
            }
          }
          if (copies && bytes > 0)
            ptx::bulk_copy(stage + row * kStride + offset,
                           args.weights.blocks + block * kBlockBytes + offset, bytes, full);
        }
      }
    }
  }
  static_assert(kTileN <= 32 * kProducers, "one lane copies one row");

  // One chunk of the activations of lane (g, t): block t of tokens g, g + 8, ...
  struct Tokens {
    uint4 raw[kGroups][4];

    __device__ void load(const GemmArgs& args, int chunk) {
      const int lane = threadIdx.x % 32;
      // Past the end of K both sides are zero: zero weights alone would turn Inf into NaN. Past the
      // last token the results are dropped, so any row will do.
      const int block = 4 * chunk + lane % 4;
      const int blocks_per_row = args.k / kBlockSize;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const int64_t token = min(8 * j + lane / 4, int(args.m) - 1);
        const uint4* x = reinterpret_cast<const uint4*>(
            static_cast<const __nv_bfloat16*>(args.x) + token * args.k +
            min(block, blocks_per_row - 1) * kBlockSize);
#pragma unroll
        for (int i = 0; i < 4; ++i) raw[j][i] = __ldg(x + i);
      }
      if (4 * chunk + 4 > blocks_per_row && block >= blocks_per_row)  // the last chunk only
#pragma unroll
        for (int j = 0; j < kGroups; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) raw[j][i] = make_uint4(0, 0, 0, 0);
    }
  };

  struct Operand {  // the same, in the order of decode8
    uint32_t pairs[4][kGroups][1][4];

    __device__ explicit Operand(const Tokens& tokens) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          const uint4 raw[1] = {tokens.raw[j][i]};
          Activation<__nv_bfloat16>::terms(raw, pairs[i][j]);
        }
    }
    Operand() = default;
  };

  using Sums = float[kRows][kGroups][4];

  template <bool kWide, bool kCached>
  __device__ static void multiply(const uint4 (&codes)[kRows][2],
                                  const ScaleFactor (&scale)[kRows][2], const Operand& x,
                                  Sums& acc) {
#pragma unroll
    for (int i = 0; i < 4; ++i)  // words of a block
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        uint32_t a[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4& c = codes[r][half];
          decode8<kWide, kCached>(i == 0   ? c.x
                                  : i == 1 ? c.y
                                  : i == 2 ? c.z
                                           : c.w,
                                  scale[r][half], a[half]);
        }
#pragma unroll
        for (int j = 0; j < kGroups; ++j)
#pragma unroll
          for (int s = 0; s < 4; s += 2)
            ptx::mma_m16n8k16(acc[r][j], a[0][s], a[1][s], a[0][s + 1], a[1][s + 1],
                              x.pairs[i][j][0][s], x.pairs[i][j][0][s + 1]);
      }
  }

  // `local` is the chunk's place in the stage, `chunk` its place in K.
  template <bool kCached>
  __device__ static void multiply_chunk(const GemmArgs& args, uint32_t stage, int scale_stride,
                                        int local, int chunk, const Operand& x, Sums& acc) {
    const int lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    const bool past_end = 4 * chunk + t >= args.k / kBlockSize;
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
      multiply<true, kCached>(codes, scale, x, acc);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) scale[r][half] = {narrow_factor(bytes[r][half]), 0};
      multiply<false, kCached>(codes, scale, x, acc);
    }
  }

  // kCached: K fits one slice, so a warp sees the same activations in every tile and keeps them.
  template <bool kCached>
  __device__ static void compute(const GemmArgs& args, uint32_t shared, float* sums,
                                 const Barriers& barriers) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4;
    const int blocks_per_row = args.k / kBlockSize;
    const int num_chunks = (args.k + 127) / 128;
    const int num_slices = kCached ? 1 : slices(args);
    const int scale_stride = num_slices == 1 ? blocks_per_row : kRowScales;

    Tokens tokens;
    Operand cached[kCached ? kChunks : 1];
    if constexpr (kCached) {
#pragma unroll
      for (int q = 0; q < kChunks; ++q) {
        tokens.load(args, warp + kWarps * q);
        cached[q] = Operand(tokens);
      }
    } else {
      tokens.load(args, warp);
    }
    Ring<kStages> ring;
    Ring<2> sum_ring;
    for (int tile = blockIdx.x; tile < args.n / kTileN; tile += gridDim.x) {
      Sums acc = {};
      for (int slice = 0; slice < num_slices; ++slice, ring.advance()) {
        const int first_chunk = slice * kStageChunks;
        const uint32_t stage = shared + ring.index * kStageBytes;
#pragma unroll
        for (int q = 0; q < kChunks; ++q) {
          const int local = warp + kWarps * q, chunk = first_chunk + local;
          Operand x;
          if constexpr (!kCached) {
            x = Operand(tokens);
            const int next = q + 1 < kChunks          ? chunk + kWarps
                             : slice + 1 < num_slices ? first_chunk + kStageChunks + warp
                                                      : warp;
            tokens.load(args, next);
          }
          ptx::barrier_wait(barriers.full + 8 * (ring.index * kChunks + q), ring.parity);
          if (chunk >= num_chunks) continue;
          if constexpr (kCached)
            multiply_chunk<kCached>(args, stage, scale_stride, local, chunk, cached[q], acc);
          else
            multiply_chunk<kCached>(args, stage, scale_stride, local, chunk, x, acc);
        }
        ptx::named_barrier_arrive(kEmpty + ring.index, kEmptyThreads);
      }
      ptx::barrier_wait(barriers.free + 8 * sum_ring.index, sum_ring.parity ^ 1);
      float* mine = sums + (sum_ring.index * kWarps + warp) * kTileM * kSumStride;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < kGroups; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            mine[(8 * j + 2 * t + c % 2) * kSumStride + 16 * r + 8 * (c / 2) + g] = acc[r][j][c];
      ptx::named_barrier_arrive(kReady + sum_ring.index, kReadyThreads);
      sum_ring.advance();
    }
  }

  __device__ static void write_out(const GemmArgs& args, const float* sums,
                                   const Barriers& barriers) {
    const int lane = threadIdx.x % 32;
    Ring<2> ring;
    for (int tile = blockIdx.x; tile < args.n / kTileN; tile += gridDim.x, ring.advance()) {
      ptx::named_barrier_sync(kReady + ring.index, kReadyThreads);
      const float* tile_sums = sums + ring.index * kWarps * kTileM * kSumStride;
      // Four rows a lane: this warp must keep up with all others.
      for (int i = lane; i < int(args.m) * (kTileN / 4); i += 32) {
        const int token = i / (kTileN / 4), row = i % (kTileN / 4) * 4;
        float v[4] = {};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float4 part =
              *reinterpret_cast<const float4*>(tile_sums + (w * kTileM + token) * kSumStride + row);
          v[0] += part.x;
          v[1] += part.y;
          v[2] += part.z;
          v[3] += part.w;
        }
        const int n = tile * kTileN + row;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (args.bias.data) v[c] += load_float(args.bias.data, args.bias.type, n + c);
          store_float(args.out, args.out_type, int64_t(token) * args.n + n + c, v[c]);
        }
      }
      ptx::barrier_arrive(barriers.free + 8 * ring.index);
    }
  }

  template <bool kCached>
  __device__ static void run(const GemmArgs& args, char* memory) {
    const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    const Barriers barriers(shared + kBarrierOffset);
    if (threadIdx.x == 0) {
      for (int p = 0; p < kPieces; ++p) ptx::barrier_init(barriers.full + 8 * p, kProducers);
      for (int b = 0; b < 2; ++b) ptx::barrier_init(barriers.free + 8 * b, 32);
      ptx::barrier_init_fence();
    }
    __syncthreads();
    float* sums = reinterpret_cast<float*>(memory + kSumOffset);
    const int warp = threadIdx.x / 32;
    if (warp > kEpilogue)
      produce(args, shared, barriers, warp - kEpilogue - 1);
    else if (warp == kEpilogue)
      write_out(args, sums, barriers);
    else
      compute<kCached>(args, shared, sums, barriers);
  }
};

// y = x * w^T + bias with a streaming configuration; see gemm_streaming.cu.
cudaError_t launch_streaming(int config, const GemmArgs& args, int multiprocessors,
                             cudaStream_t stream);

}  // namespace jax_mxfp4
