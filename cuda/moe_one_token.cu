// The expert layer for one token, which is what decoding a single sequence calls: sm_90 and later,
// bf16. One cooperative launch, limited by reading the weights of the token's experts.
//
//   copy warps  | gate_up 0 | gate_up 1 | ... | down 0 | down 1 |
//   compute     |      gate_up 0 | gate_up 1 | ... | hidden | down 0 | down 1 |
//   epilogue    |           gate_up 0 | gate_up 1 | ...       | down 0 | down 1 |
//
// Every multiprocessor gets the same number of rows of gate_up, give or take 16, so that all are
// done with them at the same time; what it needs of down is on its way by then.
//
// Down needs the activations of all thread blocks. A fence and a counter take 3 us while the memory
// is busy, so the activations themselves tell that they are there: they are written to memory that
// was zero, as complements, which are never zero, and read until none is.
//
// A unit of down is eight rows of each of the token's experts: the thread block that has them adds
// them up, and nobody waits for the grid at the end.
#include "gemm_streaming.cuh"
#include "moe_one_token.h"

namespace jax_mxfp4 {
namespace {

constexpr int kPairs = kOneTokenPairs;
constexpr int kMaxWords = kPairs * kOneTokenMaxInner / 2;

// Activations of the experts, complements of bf16 pairs: 0xffff is a NaN that no conversion gives.
// Launches take turns with two buffers, and each clears the one of the next.
__device__ uint4 g_hidden[2][kMaxWords / 4];

// A launch adds 2^31 in all whatever the grid's size, so the top bit flips when its last thread
// block is done.
__device__ unsigned g_launches;

template <int kConfig>
struct OneTokenMoe {
  using Gemm = StreamingGemm<kConfig>;
  using Barriers = typename Gemm::Barriers;
  static constexpr int kTileN = Gemm::kTileN;
  static constexpr int kHalf = kTileN / 2;
  static constexpr int kDownRows = kTileN / kPairs;
  static_assert(Gemm::kTileM == 8 && kTileN == 32 && kDownRows == 8);

  // This thread block's rows of gate_up of all pairs, one stage after the other.
  struct GateUp {
    int position, end, halves_per_pair;

    __device__ explicit GateUp(const MoeArgs& args) : halves_per_pair(2 * args.inner / kHalf) {
      const unsigned halves = unsigned(args.top_k) * halves_per_pair;
      position = int(halves * blockIdx.x / gridDim.x);
      end = int(halves * (blockIdx.x + 1) / gridDim.x);
    }
    __device__ bool done() const { return position >= end; }
    __device__ int rows() const {
      return position % 2 == 0 && position + 2 <= end ? kTileN : kHalf;
    }
    __device__ int pair() const { return position / halves_per_pair; }
    __device__ int row() const { return position % halves_per_pair * kHalf; }  // of the expert
    __device__ void next() { position += rows() / kHalf; }
  };

  // And of down: eight rows of every pair.
  struct Down {
    int unit, end;
    __device__ explicit Down(const MoeArgs& args) {
      const unsigned units = unsigned(args.d / kDownRows);
      unit = int(units * blockIdx.x / gridDim.x);
      end = int(units * (blockIdx.x + 1) / gridDim.x);
    }
  };

  __device__ static bool has_expert(const MoeArgs& args, int pair) {
    return pair < int(args.top_k) &&
           unsigned(__ldg(args.expert_ids + pair)) < unsigned(args.experts);
  }
  // A pair without an expert takes the first one, and is left out of the sum.
  __device__ static int64_t expert_of(const MoeArgs& args, int pair) {
    return has_expert(args, pair) ? __ldg(args.expert_ids + pair) : 0;
  }

  __device__ static void produce(const MoeArgs& args, uint32_t shared, const Barriers& barriers,
                                 int producer) {
    Ring<Gemm::kStages> ring;
    Ring<Gemm::kBiases> bias_ring;
    int fill = 0;
    for (GateUp g(args); !g.done(); g.next(), ring.advance(), bias_ring.advance()) {
      const int64_t row = expert_of(args, g.pair()) * (2 * args.inner) + g.row();
      Gemm::wait_empty(ring, fill);
      Gemm::template copy_stage<false>(args.gate_up, args.gate_up_bias, int(args.d), row, g.rows(),
                                       0, 1, shared + ring.index * Gemm::kStageBytes,
                                       Gemm::bias_slot(shared, bias_ring),
                                       barriers.full + 8 * Gemm::kChunks * ring.index, producer);
    }
    for (Down d(args); d.unit < d.end; ++d.unit, ring.advance(), bias_ring.advance()) {
      Gemm::wait_empty(ring, fill);
      copy_down(args, d.unit, shared + ring.index * Gemm::kStageBytes,
                Gemm::bias_slot(shared, bias_ring), barriers.full + 8 * Gemm::kChunks * ring.index,
                producer);
    }
  }

  // As Gemm::copy_stage, of all pairs' experts.
  __device__ static void copy_down(const MoeArgs& args, int unit, uint32_t stage,
                                   uint32_t bias_slot, uint32_t full, int producer) {
    const int lane = threadIdx.x % 32, row = producer + Gemm::kProducers * lane;
    const int top_k = int(args.top_k), tile_rows = top_k * kDownRows;
    const int rows = (tile_rows - producer + Gemm::kProducers - 1) / Gemm::kProducers;
    const int blocks_per_row = int(args.inner) / kBlockSize, scales = kDownRows * blocks_per_row;
    const Bias& bias = args.down_bias;
    const int bias_bytes = bias.data ? kDownRows * size_of(bias.type) : 0;
    const bool copies = row < tile_rows, copies_scales = producer == 0 && lane < top_k;
    const int64_t first = unit * kDownRows;
    const int64_t code_row =
        copies ? expert_of(args, row / kDownRows) * args.d + first + row % kDownRows : 0;
    const int64_t scale_row = copies_scales ? expert_of(args, lane) * args.d + first : 0;
#pragma unroll
    for (int q = 0; q < Gemm::kChunks; ++q, full += 8) {
      const int offset = q * Gemm::kPieceBytes;
      const int bytes = max(0, min(Gemm::kPieceBytes, int(args.inner) / 2 - offset));
      const int others = q == 0 && producer == 0 ? top_k * (scales + bias_bytes) : 0;
      if (lane == 0) ptx::barrier_arrive_expect(full, rows * bytes + others);
      __syncwarp();
      if (q == 0 && copies_scales) {
        ptx::bulk_copy(stage + Gemm::kScaleOffset + lane * scales,
                       args.down.scales + scale_row * blocks_per_row, scales, full);
        if (bias_bytes)
          ptx::bulk_copy(bias_slot + lane * bias_bytes,
                         static_cast<const char*>(bias.data) + scale_row * size_of(bias.type),
                         bias_bytes, full);
      }
      if (copies && bytes > 0)
        ptx::bulk_copy(stage + row * Gemm::kStride + offset,
                       args.down.blocks + code_row * blocks_per_row * kBlockBytes + offset, bytes,
                       full);
    }
  }

  using Tokens = typename Gemm::Tokens[Gemm::kChunks];

  // Column c has the activations of pair c; columns past the last pair repeat others. Until a
  // sample of what a warp needs is there it asks for no more: all warps' reads in a loop would hold
  // back everything else.
  __device__ static void load_hidden(const MoeArgs& args, const uint4* hidden, Tokens& x) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int blocks = int(args.inner) / kBlockSize;
    const uint4* row = hidden + lane / 4 % int(args.top_k) * (args.inner / 8);
    const auto block_of = [&](int q) { return 4 * (warp + Gemm::kWarps * q) + lane % 4; };
    const uint32_t* sample = reinterpret_cast<const uint32_t*>(
        row + 4 * min(block_of(lane / 4 / kPairs % Gemm::kChunks), blocks - 1));
    while (!__all_sync(0xffffffffu, ptx::load_relaxed(sample))) __nanosleep(100);
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int q = 0; q < Gemm::kChunks; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 v = ptx::load_relaxed16(row + 4 * min(block_of(q), blocks - 1) + i);
          complete = complete && v.x && v.y && v.z && v.w;
          x[q].raw[0][i] = make_uint4(~v.x, ~v.y, ~v.z, ~v.w);
        }
    } while (!__all_sync(0xffffffffu, complete));
    // Past the end of K both sides are zero: zero weights alone would turn Inf into NaN.
#pragma unroll
    for (int q = 0; q < Gemm::kChunks; ++q)
      if (block_of(q) >= blocks)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[q].raw[0][i] = make_uint4(0, 0, 0, 0);
  }

  // Of 32 rows and a token in every column, or eight rows of a pair for each of four columns, this
  // warp's sums: row r comes from column r / 8.
  __device__ static void put_sums(const typename Gemm::Sums& acc, float* sums) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (t == r) {
        sums[16 * r + g] = acc[r][0][0];
        sums[16 * r + 8 + g] = acc[r][0][3];
      }
  }

  __device__ static float* sums_of(float* sums, int buffer, int warp) {
    return sums + (buffer * Gemm::kWarps + warp) * kTileN;
  }

  __device__ static void compute(const MoeArgs& args, const uint4* hidden, uint32_t shared,
                                 float* sums, const Barriers& barriers) {
    const int warp = threadIdx.x / 32;
    Ring<Gemm::kStages> ring;
    Ring<2> sum_ring;
    Tokens x;
    const auto multiply = [&](int k) {
      const int blocks_per_row = k / kBlockSize, num_chunks = (k + 127) / 128;
      const uint32_t stage = shared + ring.index * Gemm::kStageBytes;
      typename Gemm::Sums acc = {};
#pragma unroll
      for (int q = 0; q < Gemm::kChunks; ++q) {
        const int chunk = warp + Gemm::kWarps * q;
        ptx::barrier_wait(barriers.full + 8 * (ring.index * Gemm::kChunks + q), ring.parity);
        if (chunk < num_chunks)
          Gemm::multiply_chunk(blocks_per_row, stage, blocks_per_row, chunk, chunk, x[q], acc);
      }
      ptx::named_barrier_arrive(Gemm::kEmpty + ring.index, Gemm::kEmptyThreads);
      ring.advance();
      ptx::barrier_wait(barriers.free + 8 * sum_ring.index, sum_ring.parity ^ 1);
      put_sums(acc, sums_of(sums, sum_ring.index, warp));
      __syncwarp();
      ptx::named_barrier_arrive(Gemm::kReady + sum_ring.index, Gemm::kReadyThreads);
      sum_ring.advance();
    };

    const typename Gemm::Rows rows = {0};
#pragma unroll
    for (int q = 0; q < Gemm::kChunks; ++q)
      x[q].template load<true>(static_cast<const __nv_bfloat16*>(args.x), rows,
                               int(args.d) / kBlockSize, warp + Gemm::kWarps * q);
    for (GateUp g(args); !g.done(); g.next()) multiply(int(args.d));
    load_hidden(args, hidden, x);
    for (Down d(args); d.unit < d.end; ++d.unit) multiply(int(args.inner));
  }

  __device__ static void write_out(const MoeArgs& args, uint32_t* hidden, uint32_t shared,
                                   float* sums, const Barriers& barriers) {
    const int lane = threadIdx.x % 32, pair = lane / kDownRows;
    Ring<2> ring;
    Ring<Gemm::kBiases> bias_ring;
    // Row `lane` of a stage.
    const auto add_up = [&](const Bias& bias) {
      __syncwarp();
      ptx::named_barrier_sync(Gemm::kReady + ring.index, Gemm::kReadyThreads);
      float v =
          bias.data ? load_shared_float(Gemm::bias_slot(shared, bias_ring), bias.type, lane) : 0.0f;
#pragma unroll
      for (int w = 0; w < Gemm::kWarps; ++w) v += sums_of(sums, ring.index, w)[lane];
      ptx::barrier_arrive(barriers.free + 8 * ring.index);
      ring.advance();
      bias_ring.advance();
      return v;
    };

    for (GateUp g(args); !g.done(); g.next()) {
      const float gate = add_up(args.gate_up_bias);
      const float up = __shfl_down_sync(0xffffffffu, gate, 1);
      const float h = clamped_swiglu(gate, up, args.alpha, args.limit);
      const float next = __shfl_down_sync(0xffffffffu, h, 2);
      if (lane % 4 == 0 && lane < g.rows())
        ptx::store_relaxed(hidden + (g.pair() * args.inner + (g.row() + lane) / 2) / 2,
                           ~pack_pair(h, next, DType::kBF16));
    }

    const bool counts = has_expert(args, pair);
    const float weight = counts ? __ldg(args.expert_weights + pair) : 0.0f;
    for (Down d(args); d.unit < d.end; ++d.unit) {
      const float v = add_up(args.down_bias), part = counts ? weight * v : 0.0f;
      float sum = 0.0f;
#pragma unroll
      for (int p = 0; p < kPairs; ++p)
        sum += __shfl_sync(0xffffffffu, part, p * kDownRows + lane % kDownRows);
      if (lane < kDownRows) store_float(args.out, args.out_type, d.unit * kDownRows + lane, sum);
    }
  }

  __device__ static void run(const MoeArgs& args, char* memory) {
    const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    const Barriers barriers(shared + Gemm::kBarrierOffset);
    if (threadIdx.x == 0) barriers.init();
    __syncthreads();
    float* sums = reinterpret_cast<float*>(memory + Gemm::kSumOffset);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp > Gemm::kEpilogue) {
      produce(args, shared, barriers, warp - Gemm::kEpilogue - 1);
    } else {
      const int turn = ptx::load_relaxed(&g_launches) >> 31;
      if (warp == Gemm::kEpilogue) {
        for (int i = lane * gridDim.x + blockIdx.x; i < kMaxWords / 4; i += 32 * gridDim.x)
          g_hidden[turn ^ 1][i] = make_uint4(0, 0, 0, 0);
        write_out(args, reinterpret_cast<uint32_t*>(g_hidden[turn]), shared, sums, barriers);
      } else {
        compute(args, g_hidden[turn], shared, sums, barriers);
      }
    }
    __syncthreads();  // all have read whose turn it is
    if (threadIdx.x == 0)
      atomicAdd(&g_launches, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
  }
};

template <int kConfig>
__global__ void __launch_bounds__(StreamingGemm<kConfig>::kThreads, 1)
    one_token_moe_kernel(const __grid_constant__ MoeArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  OneTokenMoe<kConfig>::run(args, shared);
#endif
}

}  // namespace

cudaError_t launch_one_token_moe(int config, const MoeArgs& args, int multiprocessors,
                                 cudaStream_t stream) {
  return launch_with<is_kind<GemmKind::kOneToken>>(config, [&](auto c) {
    using Kernel = StreamingGemm<decltype(c)::value>;
    return launch_cooperative<one_token_moe_kernel<decltype(c)::value>>(
        args, Kernel::kThreads, Kernel::kSharedBytes, multiprocessors, stream);
  });
}

}  // namespace jax_mxfp4
