#pragma once
#include "ld3.cuh"
#include "wg.cuh"
namespace jax_mxfp4 {
__device__ __forceinline__ void bulk_copy(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src), "r"(bytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void expect_tx(uint32_t bar, uint32_t bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory"); }
__device__ __forceinline__ uint32_t lds_u8(uint32_t a) { uint32_t v; asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
template <int R, int J, int S, int Q, int WK>
struct Str {
  static constexpr int TN = 16 * R, TM = 8 * J, CS = WK * Q, SLB = CS * 64;
  static constexpr int STRIDE = SLB % 128 == 64 ? SLB : SLB + (SLB % 128 == 0 ? 64 : (192 - SLB % 128) % 128);
  static constexpr int kCodes = TN * STRIDE, kScales = TN * CS * 4, kStage = kCodes + kScales;
  static constexpr int SS = TN + 4, kSum = WK * TM * SS * 4;
  static constexpr int kShared = S * kStage + 2 * kSum + (2 * S + 4) * 8;
  static constexpr int T = 32 * (WK + 2);
};
template <int R, int J, int S, int Q, int WK, bool CACHE>
__global__ void __launch_bounds__(32 * (WK + 2), 1) str_kernel(const __grid_constant__ GemmArgs args) {
  using C = Str<R, J, S, Q, WK>;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = uint32_t(__cvta_generic_to_shared(shared));
  const uint32_t sum_base = base + S * C::kStage, full = sum_base + 2 * C::kSum, empty = full + 8 * S, sfull = empty + 8 * S, sempty = sfull + 16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int G = args.k / 32, chunks = (args.k + 127) / 128, slices = (chunks + C::CS - 1) / C::CS;
  const int tiles = args.n / C::TN, m = int(args.m);
  if (threadIdx.x == 0) {
    for (int s = 0; s < S; ++s) { ptx::mbar_init(full + 8 * s, 1); ptx::mbar_init(empty + 8 * s, WK); }
    for (int b = 0; b < 2; ++b) { ptx::mbar_init(sfull + 8 * b, WK); ptx::mbar_init(sempty + 8 * b, 1); }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (warp == WK) {  // producer
    int it = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
      for (int sl = 0; sl < slices; ++sl, ++it) {
        const int s = it % S;
        if (it >= S) ptx::mbar_wait(empty + 8 * s, (it / S - 1) & 1);
        const int bytes = min(C::SLB, args.k / 2 - sl * C::SLB);
        const int sbytes = slices == 1 ? 0 : min(C::CS * 4, G - sl * C::CS * 4);
        if (lane == 0) expect_tx(full + 8 * s, C::TN * bytes + (slices == 1 ? C::TN * G : C::TN * sbytes));
        __syncwarp();
        for (int row = lane; row < C::TN; row += 32) {
          int64_t n = int64_t(tile) * C::TN + row;
          bulk_copy(base + s * C::kStage + row * C::STRIDE, args.weights.blocks + n * G * 16 + sl * C::SLB, bytes, full + 8 * s);
          if (slices > 1) bulk_copy(base + s * C::kStage + C::kCodes + row * C::CS * 4, args.weights.scales + n * G + sl * C::CS * 4, sbytes, full + 8 * s);
        }
        if (slices == 1 && lane == 0) bulk_copy(base + s * C::kStage + C::kCodes, args.weights.scales + int64_t(tile) * C::TN * G, C::TN * G, full + 8 * s);
      }
  } else if (warp == WK + 1) {  // epilogue
    int it = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++it) {
      const int b = it & 1;
      ptx::mbar_wait(sfull + 8 * b, (it >> 1) & 1);
      const float* sums = reinterpret_cast<const float*>(shared + S * C::kStage + b * C::kSum);
      for (int i = lane; i < C::TN * m; i += 32) {
        int token = i / C::TN, row = i % C::TN;
        float v = 0;
#pragma unroll
        for (int wk = 0; wk < WK; ++wk) v += sums[(wk * C::TM + token) * C::SS + row];
        int n = tile * C::TN + row;
        if (args.bias.data) v += load_float(args.bias.data, args.bias.type, n);
        store_float(args.out, args.out_type, int64_t(token) * args.n + n, v);
      }
      __syncwarp();
      if (lane == 0) ptx::mbar_arrive(sempty + 8 * b);
    }
  } else {
    const __nv_bfloat16* xp[J];
#pragma unroll
    for (int j = 0; j < J; ++j) xp[j] = static_cast<const __nv_bfloat16*>(args.x) + int64_t(min(8 * j + g, m - 1)) * args.k + 32 * t;
    auto loadx = [&](int chunk, uint4 (&v)[J][4]) {
      int block = min(4 * chunk + t, G - 1) - t;
#pragma unroll
      for (int j = 0; j < J; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) v[j][q] = ldg_x(xp[j] + block * 32 + q * 8);
    };
    uint32_t xb[CACHE ? Q : 1][4][J][1][4];
    auto permute = [&](uint4 (&v)[J][4], uint32_t (&o)[4][J][1][4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < J; ++j) { uint4 raw[1] = {v[j][i]}; Activation<__nv_bfloat16>::terms(raw, o[i][j]); }
    };
    if constexpr (CACHE) {
#pragma unroll
      for (int q = 0; q < Q; ++q) { uint4 v[J][4]; loadx(min(warp + WK * q, chunks - 1), v); permute(v, xb[q]); }
    }
    int it = 0, ti = 0;
    const uint32_t my = base + g * C::STRIDE + t * 16, mys = base + C::kCodes + t;
    const int ss = slices == 1 ? G : C::CS * 4;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++ti) {
      float acc[R][J][4] = {};
      for (int sl = 0; sl < slices; ++sl, ++it) {
        const int s = it % S;
        uint4 xv[J][4];
        if constexpr (!CACHE) loadx(min(sl * C::CS + warp, chunks - 1), xv);
        ptx::mbar_wait(full + 8 * s, (it / S) & 1);
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          const int local = warp + WK * q, chunk = sl * C::CS + local;
          if (chunk < chunks) {
            if constexpr (!CACHE) {
              permute(xv, xb[0]);
              if (q + 1 < Q) loadx(min(chunk + WK, chunks - 1), xv);
            }
            const bool dead = 4 * chunk + t >= G;
            uint4 w[R][2]; uint32_t f[R][2];
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                w[r][h] = ptx::load_shared16(my + s * C::kStage + (16 * r + 8 * h) * C::STRIDE + local * 64);
                f[r][h] = scale_factor(lds_u8(mys + s * C::kStage + (16 * r + 8 * h + g) * ss + 4 * local)).first;
                if (dead) f[r][h] = 0;
              }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int r = 0; r < R; ++r) {
                uint32_t a[2][4];
#pragma unroll
                for (int h = 0; h < 2; ++h) { const uint4& c = w[r][h]; dec8(i == 0 ? c.x : i == 1 ? c.y : i == 2 ? c.z : c.w, f[r][h], a[h]); }
#pragma unroll
                for (int j = 0; j < J; ++j)
#pragma unroll
                  for (int z = 0; z < 4; z += 2)
                    ptx::mma_m16n8k16(acc[r][j], a[0][z], a[1][z], a[0][z + 1], a[1][z + 1], xb[CACHE ? q : 0][i][j][0][z], xb[CACHE ? q : 0][i][j][0][z + 1]);
              }
          }
        }
        __syncwarp();
        if (lane == 0) ptx::mbar_arrive(empty + 8 * s);
      }
      const int b = ti & 1;
      if (ti >= 2) ptx::mbar_wait(sempty + 8 * b, ((ti >> 1) - 1) & 1);
      float* sums = reinterpret_cast<float*>(shared + S * C::kStage + b * C::kSum);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            sums[(warp * C::TM + 8 * j + 2 * t + c % 2) * C::SS + 16 * r + 8 * (c / 2) + g] = acc[r][j][c];
      __syncwarp();
      if (lane == 0) ptx::mbar_arrive(sfull + 8 * b);
    }
  }
}
template <int R, int J, int S, int Q, int WK>
cudaError_t str_launch(const GemmArgs& a, cudaStream_t st) {
  using C = Str<R, J, S, Q, WK>;
  if (a.n % C::TN) return cudaErrorInvalidValue;
  const int chunks = (a.k + 127) / 128;
  if (chunks > C::CS && a.k / 32 % 16) return cudaErrorInvalidValue;
  const int tiles = a.n / C::TN, grid = tiles < 132 ? tiles : 132;
  static cudaError_t e1 = cudaFuncSetAttribute(str_kernel<R, J, S, Q, WK, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kShared);
  static cudaError_t e2 = cudaFuncSetAttribute(str_kernel<R, J, S, Q, WK, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kShared);
  if (e1) return e1; if (e2) return e2;
  if (chunks <= C::CS) str_kernel<R, J, S, Q, WK, true><<<grid, C::T, C::kShared, st>>>(a);
  else str_kernel<R, J, S, Q, WK, false><<<grid, C::T, C::kShared, st>>>(a);
  return cudaGetLastError();
}
}
