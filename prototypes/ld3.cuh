#pragma once
#include "../cuda/gemm.cuh"
namespace jax_mxfp4 {
__device__ __forceinline__ uint32_t mulx(uint32_t a, uint32_t b) { return mul_bf16x2(a, b); }
__device__ __forceinline__ void dec8(uint32_t w, uint32_t f, uint32_t (&o)[4]) {
  constexpr uint32_t S = 0x80008000u, E = 0x01c001c0u;
  o[3] = mulx((w & S) | ((w >> 6) & E), f);
  o[2] = mulx(((w << 4) & S) | ((w >> 2) & E), f);
  o[1] = mulx(((w << 8) & S) | ((w << 2) & E), f);
  o[0] = mulx(((w << 12) & S) | ((w << 6) & E), f);
}
__device__ __forceinline__ uint32_t ldg_u8(const uint8_t* p) { uint32_t v; asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p)); return v; }
__device__ __forceinline__ uint4 ldg_x(const void* p) { uint4 v; asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v; }
template <int R, int WK, int J, int D, int B>
__global__ void __launch_bounds__(32 * WK, B) ld3_kernel(const __grid_constant__ GemmArgs args) {
  constexpr int TN = 16 * R, TM = 8 * J, T = 32 * WK, SS = TN + 4;
  __shared__ float sums[WK * TM * SS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int G = args.k / 32, chunks = (args.k + 127) / 128;
  const int first_n = blockIdx.x * TN;
  const int m = int(args.m);
  const int tail = chunks * 4 == G ? -1 : chunks - 1;  // chunk whose last blocks do not exist
  const uint8_t* wp[R][2]; const uint8_t* sp[R][2]; const __nv_bfloat16* xp[J];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int64_t n = min(first_n + 16 * r + 8 * h + g, args.n - 1);
      wp[r][h] = args.weights.blocks + (n * G + t + 4 * warp) * 16;
      sp[r][h] = args.weights.scales + n * G + t + 4 * warp;
    }
#pragma unroll
  for (int j = 0; j < J; ++j) xp[j] = static_cast<const __nv_bfloat16*>(args.x) + int64_t(min(8 * j + g, m - 1)) * args.k + 32 * (t + 4 * warp);
  uint4 w[D][R][2]; uint32_t sc[D][R][2];
  int chunk_l = warp;
  auto load = [&](uint4 (&w)[R][2], uint32_t (&s)[R][2]) {
    int back = 0;
    if (chunk_l == tail) back = max(0, 4 * chunk_l + t - (G - 1));
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        w[r][h] = ptx::load_streaming16(wp[r][h] - back * 16);
        s[r][h] = ldg_u8(sp[r][h] - back);
        wp[r][h] += WK * 64; sp[r][h] += WK * 4;
      }
    chunk_l += WK;
  };
  uint4 xv[2][J][4];
  int chunk_x = warp;
  auto loadx = [&](uint4 (&v)[J][4]) {
    int back = 0;
    if (chunk_x == tail) back = max(0, 4 * chunk_x + t - (G - 1));
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
      for (int q = 0; q < 4; ++q) v[j][q] = ldg_x(xp[j] - back * 32 + q * 8);
      xp[j] += WK * 128;
    }
    chunk_x += WK;
  };
  const int steps = chunks > warp ? (chunks - warp + WK - 1) / WK : 0;
#pragma unroll
  for (int d = 0; d < D; ++d)
    if (d < steps) load(w[d], sc[d]);
  if (steps) loadx(xv[0]);
  float acc[R][J][4] = {};
  constexpr int U = D % 2 ? 2 * D : D;
  int left = steps;
  while (left > 0) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int d = u % D;
      if (left > 0) {
        if (left > 1) loadx(xv[(u + 1) & 1]);
        uint32_t f[R][2];
        const bool dead = (steps - left) * WK + warp == tail && 4 * tail + t >= G;
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) { f[r][h] = scale_factor(sc[d][r][h]).first; if (dead) f[r][h] = 0; }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t b[J][1][4];
#pragma unroll
          for (int j = 0; j < J; ++j) { uint4 raw[1] = {xv[u & 1][j][i]}; Activation<__nv_bfloat16>::terms(raw, b[j]); }
#pragma unroll
          for (int r = 0; r < R; ++r) {
            uint32_t a[2][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) { const uint4& q = w[d][r][h]; dec8(i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w, f[r][h], a[h]); }
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
              for (int s = 0; s < 4; s += 2)
                ptx::mma_m16n8k16(acc[r][j], a[0][s], a[1][s], a[0][s + 1], a[1][s + 1], b[j][0][s], b[j][0][s + 1]);
          }
        }
        if (left > D) load(w[d], sc[d]);
        --left;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sums[(warp * TM + 8 * j + 2 * t + c % 2) * SS + 16 * r + 8 * (c / 2) + g] = acc[r][j][c];
  __syncthreads();
  for (int i = threadIdx.x; i < TN * m; i += T) {
    int token = i / TN, row = i % TN;
    if (first_n + row >= args.n) continue;
    float v = 0;
#pragma unroll
    for (int wk = 0; wk < WK; ++wk) v += sums[(wk * TM + token) * SS + row];
    if (args.bias.data) v += load_float(args.bias.data, args.bias.type, first_n + row);
    store_float(args.out, args.out_type, int64_t(token) * args.n + first_n + row, v);
  }
}
template <int R, int WK, int J, int D, int B>
cudaError_t ld3_launch(const GemmArgs& a, cudaStream_t s) {
  ld3_kernel<R, WK, J, D, B><<<(a.n + 16 * R - 1) / (16 * R), 32 * WK, 0, s>>>(a);
  return cudaGetLastError();
}
}
