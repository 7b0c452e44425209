#pragma once
#include "../cuda/gemm.cuh"
namespace jax_mxfp4 {
// MODE 0 full, 1 loads only, 2 loads + decode + mma but trivial epilogue
template <int R, int WK, int J, int D, int MODE, int B>
__global__ void __launch_bounds__(32 * WK, B) ldg_kernel(const __grid_constant__ GemmArgs args) {
  constexpr int TN = 16 * R, TM = 8 * J, T = 32 * WK, SS = TN + 4;
  __shared__ float sums[WK * TM * SS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int G = args.k / 32, chunks = (args.k + 127) / 128;
  const int first_n = blockIdx.x * TN;
  const int m = int(args.m);
  const bool interior = first_n + TN <= args.n;
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(args.x) + 32 * t;
  const uint8_t* wp = args.weights.blocks + (int64_t(first_n + g) * G + t) * 16;
  const uint8_t* sp = args.weights.scales + int64_t(first_n + g) * G + t;
  uint4 w[D][R][2];
  uint32_t sc[D][R][2];
  auto load = [&](int chunk, uint4 (&w)[R][2], uint32_t (&s)[R][2]) {
    bool ok = 4 * chunk + t < G;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        bool in = ok && (interior || first_n + 16 * r + 8 * h + g < args.n);
        int off = (16 * r + 8 * h) * G + chunk * 4;
        w[r][h] = in ? ptx::load_streaming16(wp + int64_t(off) * 16) : make_uint4(0, 0, 0, 0);
        s[r][h] = in ? __ldg(sp + off) : 0;
      }
  };
  uint4 xv[2][J][4];
  auto loadx = [&](int chunk, uint4 (&v)[J][4]) {
    bool ok = 4 * chunk + t < G;
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        v[j][q] = ok && 8 * j + g < m ? __ldg(reinterpret_cast<const uint4*>(x + (8 * j + g) * args.k + chunk * 128 + q * 8)) : make_uint4(0, 0, 0, 0);
  };
  const int steps = chunks > warp ? (chunks - warp + WK - 1) / WK : 0;
#pragma unroll
  for (int d = 0; d < D; ++d)
    if (d < steps) load(warp + d * WK, w[d], sc[d]);
  if (steps) loadx(warp, xv[0]);
  float acc[R][J][4] = {};
  uint32_t junk = 0;
  constexpr int U = D % 2 ? 2 * D : D;  // x ring of two needs an even unroll
  for (int step0 = 0; step0 < steps; step0 += U) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int step = step0 + u, d = u % D;
      if (step < steps) {
      if (step + 1 < steps) loadx(warp + (step + 1) * WK, xv[(u + 1) & 1]);
      if constexpr (MODE == 1) {
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) junk ^= w[d][r][h].x ^ w[d][r][h].y ^ w[d][r][h].z ^ w[d][r][h].w ^ sc[d][r][h];
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
          for (int q = 0; q < 4; ++q) { uint4 v = xv[u & 1][j][q]; junk ^= v.x ^ v.y ^ v.z ^ v.w; }
      } else {
        ScaleFactor f[R][2];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) f[r][h] = scale_factor(sc[d][r][h]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t b[J][1][4];
#pragma unroll
          for (int j = 0; j < J; ++j) {
            uint4 raw[1] = {xv[u & 1][j][i]};
            Activation<__nv_bfloat16>::terms(raw, b[j]);
          }
#pragma unroll
          for (int r = 0; r < R; ++r) {
            uint32_t a[2][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint4& q = w[d][r][h];
              decode8<false>(i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w, f[r][h], a[h]);
            }
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
              for (int s = 0; s < 4; s += 2)
                ptx::mma_m16n8k16(acc[r][j], a[0][s], a[1][s], a[0][s + 1], a[1][s + 1], b[j][0][s], b[j][0][s + 1]);
          }
        }
      }
      if (step + D < steps) load(warp + (step + D) * WK, w[d], sc[d]);
      }
    }
  }
  if constexpr (MODE == 1) { if (junk == 0x1234567) static_cast<uint32_t*>(args.out)[0] = junk; return; }
  if constexpr (MODE == 2) { if (acc[0][0][0] == 1.2345f && acc[R-1][J-1][2] == 3.3f) static_cast<uint32_t*>(args.out)[0] = 1; return; }
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (8 * j + 2 * t + c % 2 < m)
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
template <int R, int WK, int J, int D, int MODE, int B = 1>
cudaError_t ldg_launch(const GemmArgs& a, cudaStream_t s) {
  ldg_kernel<R, WK, J, D, MODE, B><<<(a.n + 16 * R - 1) / (16 * R), 32 * WK, 0, s>>>(a);
  return cudaGetLastError();
}
}
