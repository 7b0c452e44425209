// The GPT-OSS expert layer for few tokens, limited by reading the weights of the experts in use:
// sm_90 and later, bf16. One cooperative launch.
//
//   copy warps  | group  | gate_up 0 | gate_up 1 | down 0 | down 1 |            each wave a part
//   compute     | pairs  |  gate_up 0 | gate_up 1 | down 0 | down 1 | grid | sum  of the experts
//   epilogue    |        |   gate_up 0 | gate_up 1 | down 0 | down 1 |            in use
//   watcher     |                       | grid 0 | grid 1 |
//
// A unit is kTileN rows of one expert's weights and up to kTileM of its tokens; thread blocks take
// equal runs of neighbouring units, so that their warps seldom load other activations. The experts
// are walked through in two or four waves: down of the first needs only gate_up of the first, which
// all thread blocks have left behind them by then, and so nobody waits for the grid between the two
// products. A fence and an atomic operation take microseconds while the memory is busy: a warp of
// its own spends them.
//
// Every thread block groups the pairs for itself, which costs less than to launch a kernel for it;
// the order within a group is that of the pairs, the same everywhere.
#pragma once

#include "gemm_streaming.cuh"

namespace jax_mxfp4 {

// Arrivals of all launches on this device at the places where thread blocks wait for each other:
// the end of gate_up in each wave, and of everything. A launch adds 2^31 in all whatever the grid's
// size, so the top bit flips when the last thread block has arrived, and nothing has to be reset.
// All thread blocks must be running, which a cooperative launch grants.
constexpr int kMaxWaves = 4;
struct alignas(128) Arrivals {
  unsigned count;
};
static __device__ Arrivals g_arrivals[kMaxWaves + 1];

// `before`: any value since the launch and before this thread block's arrival.
__device__ __forceinline__ unsigned arrivals(int place) {
  return ptx::load_relaxed(&g_arrivals[place].count);
}

// What this thread has seen written is written for everybody who waits.
__device__ __forceinline__ void arrive_grid(int place) {
  __threadfence();
  atomicAdd(&g_arrivals[place].count, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
}

__device__ __forceinline__ bool grid_arrived(int place, unsigned before) {
  if (((before ^ arrivals(place)) & 0x80000000u) == 0) return false;
  __threadfence();
  return true;
}

template <int kConfig>
struct StreamingMoe {
  using Gemm = StreamingGemm<kConfig>;
  static constexpr int kTileM = Gemm::kTileM;
  static constexpr int kTileN = Gemm::kTileN;
  static constexpr int kThreads = Gemm::kThreads + 32;
  static constexpr int kWatcher = Gemm::kThreads / 32;  // the warp that waits for other blocks
  using Barriers = typename Gemm::Barriers;

  struct Segment {  // tokens of one expert that share a tile
    uint16_t expert, first, rows, unused;
  };

  struct Schedule {
    int count;                       // of segments
    int free[kStreamingMoeExperts];  // an expert's pairs, then its next free place
    Segment segments[kStreamingMoeExperts + kStreamingMoePairs / kTileM];
    uint16_t pairs[kStreamingMoePairs];  // by expert

    // By one warp.
    __device__ void build(const MoeArgs& args) {
      const int lane = threadIdx.x % 32;
      const int experts = int(args.experts), total = int(args.tokens * args.top_k);
      for (int e = lane; e < experts; e += 32) free[e] = 0;
      for (int first = 0; first < total; first += 32) place(args, first + lane, total);
      __syncwarp();
      make_segments(experts);
      for (int first = 0; first < total; first += 32) {
        const int p = first + lane, where = place(args, p, total);
        if (where >= 0) pairs[where] = uint16_t(p);
      }
    }

    // Takes the next free places of their experts for 32 pairs, in the order of lanes; -1 where
    // there is no expert.
    __device__ int place(const MoeArgs& args, int pair, int total) {
      __syncwarp();
      const unsigned e = pair < total ? unsigned(__ldg(args.expert_ids + pair)) : ~0u;
      const bool valid = e < unsigned(args.experts);  // negative ids became large
      const uint32_t same = __match_any_sync(0xffffffffu, valid ? e : ~0u);
      const int before = __popc(same & ((1u << threadIdx.x % 32) - 1));
      const int where = valid ? free[e] + before : -1;
      __syncwarp();
      if (valid && before == 0) free[e] += __popc(same);
      return where;
    }

    // One warp: an exclusive scan over the experts of {pairs, segments}, 16 bits each.
    __device__ void make_segments(int experts) {
      const int lane = threadIdx.x % 32;
      uint32_t base = 0;
      for (int first = 0; first < experts; first += 32) {
        const int e = first + lane;
        const int rows = e < experts ? free[e] : 0;
        const int tiles = (rows + kTileM - 1) / kTileM;
        const uint32_t mine = uint32_t(rows) | uint32_t(tiles) << 16;
        uint32_t sum = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const uint32_t below = __shfl_up_sync(0xffffffffu, sum, step);
          if (lane >= step) sum += below;
        }
        const uint32_t before = base + sum - mine;
        for (int i = 0; i < tiles; ++i)
          segments[(before >> 16) + i] = {uint16_t(e), uint16_t((before & 0xffff) + i * kTileM),
                                          uint16_t(min(kTileM, rows - i * kTileM)), 0};
        if (e < experts) free[e] = int(before & 0xffff);
        base += __shfl_sync(0xffffffffu, sum, 31);
      }
      if (lane == 0) count = int(base >> 16);
    }
  };

  static constexpr int kWaveOffset = Gemm::kSharedBytes;
  static constexpr int kScheduleOffset = (kWaveOffset + 2 * 8 * kMaxWaves + 15) / 16 * 16;
  static constexpr int kSharedBytes = kScheduleOffset + int(sizeof(Schedule));
  static_assert(kSharedBytes <= 227 * 1024);

  // Of each wave: gate_up of this thread block is written; that of all is.
  struct Waves {
    uint32_t written, complete;
    __device__ explicit Waves(uint32_t base) : written(base), complete(base + 8 * kMaxWaves) {}
    __device__ void init() const {
      for (int wave = 0; wave < kMaxWaves; ++wave) {
        ptx::barrier_init(written + 8 * wave, 32);
        ptx::barrier_init(complete + 8 * wave, 1);
      }
    }
    // More waves give the grid more time; with many segments they would only cost more changes of
    // activations.
    __device__ static int count(int segments) { return segments <= 8 ? 4 : 2; }
  };

  // Gate_up of all waves, then down of all: what this thread block has of one.
  struct Step {
    bool down;
    int wave;
    PackedWeights weights;
    Bias bias;
    const __nv_bfloat16* x;
    int n, k;
    int pairs_per_row;  // of x
    int tiles, begin, end;

    __device__ Step(const MoeArgs& args, int index, int segments)
        : down(index >= Waves::count(segments)),
          wave(index % Waves::count(segments)),
          weights(down ? args.down : args.gate_up),
          bias(down ? args.down_bias : args.gate_up_bias),
          x(static_cast<const __nv_bfloat16*>(down ? args.hidden : args.x)),
          n(int(down ? args.d : 2 * args.inner)),
          k(int(down ? args.inner : args.d)),
          pairs_per_row(down ? 1 : int(args.top_k)),
          tiles(n / kTileN) {
      const int waves = Waves::count(segments);
      const int first = segments * wave / waves;
      const int count = segments * (wave + 1) / waves - first;
      // Moving on by one block from step to step evens out who gets one unit more.
      const unsigned block = (blockIdx.x + index) % gridDim.x, units = unsigned(count * tiles);
      begin = first * tiles + int(units * block / gridDim.x);
      end = first * tiles + int(units * (block + 1) / gridDim.x);
    }
    // Row of the weights at which a unit starts.
    __device__ int64_t first_row(const Segment& segment, int unit) const {
      return int64_t(segment.expert) * n + unit % tiles * kTileN;
    }
  };

  __device__ static void produce(const MoeArgs& args, const Schedule& schedule, uint32_t shared,
                                 const Barriers& barriers, int producer) {
    Ring<Gemm::kStages> ring;
    Ring<Gemm::kBiases> bias_ring;
    int fill = 0;
    for (int index = 0; index < 2 * Waves::count(schedule.count); ++index) {
      const Step step(args, index, schedule.count);
      for (int unit = step.begin; unit < step.end; ++unit, ring.advance(), bias_ring.advance()) {
        const Segment& segment = schedule.segments[unit / step.tiles];
        Gemm::wait_empty(ring, fill);
        Gemm::template copy_stage<false>(
            step.weights, step.bias, step.k, step.first_row(segment, unit), kTileN, 0, 1,
            shared + ring.index * Gemm::kStageBytes, Gemm::bias_slot(shared, bias_ring),
            barriers.full + 8 * Gemm::kChunks * ring.index, producer);
      }
    }
  }

  // The rows of x of a segment's tokens that are this lane's columns.
  __device__ static void find_rows(const Schedule& schedule, const Step& step, int segment,
                                   typename Gemm::Rows& rows) {
    const Segment& s = schedule.segments[segment];
#pragma unroll
    for (int j = 0; j < Gemm::kGroups; ++j) {
      // Past the last token any: the results are dropped.
      const int place = s.first + min(8 * j + int(threadIdx.x % 32 / 4), s.rows - 1);
      rows[j] = uint32_t(schedule.pairs[place] / step.pairs_per_row * step.k);
    }
  }

  // The activations of a segment come from L2, which takes as long as half a unit does. Where
  // registers are left, the first chunk is asked for one unit ahead and the second while the first
  // is multiplied.
  static constexpr bool kAhead = Gemm::kGroups == 1;

  __device__ static void compute(const MoeArgs& args, const Schedule& schedule, uint32_t shared,
                                 float* sums, const Barriers& barriers, const Waves& waves) {
    const int warp = threadIdx.x / 32;
    Ring<Gemm::kStages> ring;
    Ring<2> sum_ring;
    typename Gemm::Tokens x[2];
    typename Gemm::Rows rows;
    for (int index = 0; index < 2 * Waves::count(schedule.count); ++index) {
      const Step step(args, index, schedule.count);
      const int blocks_per_row = step.k / kBlockSize;
      const int num_chunks = (step.k + 127) / 128;
      if (step.down) ptx::barrier_wait(waves.complete + 8 * step.wave, 0);

      typename Gemm::Tokens tokens;
      const auto load = [&](int segment, int q) {
        if (q == 0) find_rows(schedule, step, segment, rows);
        tokens.template load<false>(step.x, rows, blocks_per_row, warp + Gemm::kWarps * q);
      };
      if (kAhead && step.begin < step.end) load(step.begin / step.tiles, 0);
      int loaded = -1;  // segment
      for (int unit = step.begin; unit < step.end; ++unit, ring.advance()) {
        const int segment = unit / step.tiles, next = (unit + 1) / step.tiles;
        const bool fresh = segment != loaded;
        loaded = segment;
        if (fresh) {
          if (!kAhead) load(segment, 0);
          x[0] = tokens;
          load(segment, 1);
          if (!kAhead) x[1] = tokens;
        }
        const uint32_t stage = shared + ring.index * Gemm::kStageBytes;
        typename Gemm::Sums acc = {};
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          if (kAhead && q == 1) {
            if (fresh) x[1] = tokens;
            if (next != segment && unit + 1 < step.end) load(next, 0);
          }
          const int chunk = warp + Gemm::kWarps * q;
          ptx::barrier_wait(barriers.full + 8 * (ring.index * 2 + q), ring.parity);
          if (chunk < num_chunks)
            Gemm::multiply_chunk(blocks_per_row, stage, blocks_per_row, chunk, chunk, x[q], acc);
        }
        ptx::named_barrier_arrive(Gemm::kEmpty + ring.index, Gemm::kEmptyThreads);
        ptx::barrier_wait(barriers.free + 8 * sum_ring.index, sum_ring.parity ^ 1);
        Gemm::put_sums(acc, sums, sum_ring.index, warp);
        ptx::named_barrier_arrive(Gemm::kReady + sum_ring.index, Gemm::kReadyThreads);
        sum_ring.advance();
      }
    }
  }
  static_assert(Gemm::kChunks == 2);

  // gate_up: clamped SwiGLU to `hidden`; down: to `partial`.
  __device__ static void write_out(const MoeArgs& args, const Schedule& schedule, uint32_t shared,
                                   const float* sums, const Barriers& barriers,
                                   const Waves& waves) {
    const int lane = threadIdx.x % 32, row = lane % Gemm::kQuads * 4;
    Ring<2> ring;
    Ring<Gemm::kBiases> bias_ring;
    for (int index = 0; index < 2 * Waves::count(schedule.count); ++index) {
      const Step step(args, index, schedule.count);
      for (int unit = step.begin; unit < step.end; ++unit, ring.advance(), bias_ring.advance()) {
        const Segment segment = schedule.segments[unit / step.tiles];
        const int n = unit % step.tiles * kTileN + row;
        __syncwarp();
        ptx::named_barrier_sync(Gemm::kReady + ring.index, Gemm::kReadyThreads);
        float bias[4];
        Gemm::load_bias(step.bias, Gemm::bias_slot(shared, bias_ring), row, bias);
        for (int token = lane / Gemm::kQuads; token < segment.rows; token += 32 / Gemm::kQuads) {
          float v[4];
          Gemm::add_sums(sums, ring.index, token, row, bias, v);
          const int64_t pair = schedule.pairs[segment.first + token];
          if (!step.down) {
            *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(args.hidden) + pair * args.inner +
                                         n / 2) =
                pack_pair(clamped_swiglu(v[0], v[1], args.alpha, args.limit),
                          clamped_swiglu(v[2], v[3], args.alpha, args.limit), DType::kBF16);
          } else {
            store_four(args.partial, DType::kF32, pair * args.d + n, v);
          }
        }
        ptx::barrier_arrive(barriers.free + 8 * ring.index);
      }
      if (!step.down) ptx::barrier_arrive(waves.written + 8 * step.wave);
    }
  }

  // A lane for each wave: tells the grid when this thread block has written its part of `hidden`,
  // and the compute warps when all have. One loop for all lanes, since lanes that leave a loop wait
  // for those that stay.
  __device__ static void watch(const Schedule& schedule, const Waves& waves) {
    const int wave = threadIdx.x % 32;
    enum { kWriting, kWaiting, kComplete } state = kWriting;
    if (wave >= Waves::count(schedule.count)) state = kComplete;
    const unsigned before = state == kComplete ? 0 : arrivals(wave);
    while (__any_sync(0xffffffffu, state != kComplete)) {
      if (state == kWriting && ptx::barrier_passed(waves.written + 8 * wave, 0)) {
        arrive_grid(wave);
        state = kWaiting;
      } else if (state == kWaiting && grid_arrived(wave, before)) {
        ptx::barrier_arrive(waves.complete + 8 * wave);
        state = kComplete;
      }
      __nanosleep(32);
    }
  }

  // out[t] = the weighted sum of its pairs, in their order. Pairs without an expert were never
  // written.
  __device__ static void combine(const MoeArgs& args) {
    const int quads = int(args.d / 4), top_k = int(args.top_k);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    const int total = int(args.tokens) * quads, stride = gridDim.x * kThreads;
    for (int i = warp * 32 + lane; i < total; i += stride) {
      const int token = i / quads, column = i % quads * 4;
      float sum[4] = {};
      for (int j = 0; j < top_k; ++j) {
        const int64_t pair = int64_t(token) * top_k + j;
        if (unsigned(__ldg(args.expert_ids + pair)) >= unsigned(args.experts)) continue;
        const float4 part =
            __ldcg(reinterpret_cast<const float4*>(args.partial + pair * args.d + column));
        const float weight = __ldg(args.expert_weights + pair);
        sum[0] += weight * part.x;
        sum[1] += weight * part.y;
        sum[2] += weight * part.z;
        sum[3] += weight * part.w;
      }
      store_four(args.out, args.out_type, int64_t(token) * args.d + column, sum);
    }
  }

  __device__ static void run(const MoeArgs& args, char* memory) {
    const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    const Barriers barriers(shared + Gemm::kBarrierOffset);
    const Waves waves(shared + kWaveOffset);
    Schedule& schedule = *reinterpret_cast<Schedule*>(memory + kScheduleOffset);
    float* sums = reinterpret_cast<float*>(memory + Gemm::kSumOffset);
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      schedule.build(args);
    } else if (threadIdx.x == 32) {
      waves.init();
      barriers.init();
    }
    __syncthreads();
    if (warp == kWatcher)
      watch(schedule, waves);
    else if (warp > Gemm::kEpilogue)
      produce(args, schedule, shared, barriers, warp - Gemm::kEpilogue - 1);
    else if (warp == Gemm::kEpilogue)
      write_out(args, schedule, shared, sums, barriers, waves);
    else
      compute(args, schedule, shared, sums, barriers, waves);
    const unsigned before = arrivals(kMaxWaves);
    __syncwarp();
    __syncthreads();
    if (threadIdx.x == 0) {
      arrive_grid(kMaxWaves);
      while (!grid_arrived(kMaxWaves, before)) {
      }
    }
    __syncthreads();
    combine(args);
  }
};

// The layer with a streaming configuration; see moe_streaming.cu.
cudaError_t launch_streaming_moe(int config, const MoeArgs& args, int multiprocessors,
                                 cudaStream_t stream);

}  // namespace jax_mxfp4
