#pragma once
#include "../cuda/gemm.cuh"
#include <cooperative_groups.h>
namespace jax_mxfp4 {
template <int R, int WK, int J, int D, int S = 1>
struct Dec {
  static constexpr int TN = 16 * R, TM = 8 * J, T = 32 * WK;
  static constexpr int kW = 2 * R * 512, kX = 4 * J * 512, kStage = kW + kX;
  static constexpr int kWarp = D * kStage;
  static constexpr int kSumStride = TN + 4;
  static constexpr int kSum = WK * TM * kSumStride * 4;
  static constexpr int kShared = WK * kWarp > kSum ? WK * kWarp : kSum;
};
template <int R, int WK, int J, int D, int S>
__global__ void __launch_bounds__(32 * WK) dec_kernel(const __grid_constant__ GemmArgs args) {
  using C = Dec<R, WK, J, D, S>;
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int G = args.k / 32, all_chunks = (args.k + 127) / 128;
  const int rank = S > 1 ? blockIdx.x % S : 0;
  const int c0 = all_chunks * rank / S, chunks = all_chunks * (rank + 1) / S - c0;
  const int first_n = blockIdx.x / S * C::TN;
  const int m = int(args.m);
  const uint32_t base = uint32_t(__cvta_generic_to_shared(shared)) + warp * C::kWarp + lane * 16;
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(args.x);
  // zero token slots that are never loaded
#pragma unroll
  for (int d = 0; d < D; ++d)
#pragma unroll
    for (int j = 0; j < J; ++j)
      if (8 * j + g >= m)
        for (int q = 0; q < 4; ++q)
          asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(base + d * C::kStage + C::kW + (j * 4 + q) * 512), "r"(0));
  const uint8_t* wrow[R][2];
  const uint8_t* srow[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int n = min(first_n + 16 * r + 8 * h + g, args.n - 1);
      wrow[r][h] = args.weights.blocks + (int64_t(n) * G + t) * 16;
      srow[r][h] = args.weights.scales + int64_t(n) * G + t;
    }
  const __nv_bfloat16* xrow[J];
#pragma unroll
  for (int j = 0; j < J; ++j) xrow[j] = x + int64_t(min(8 * j + g, m - 1)) * args.k + 32 * t;
  uint32_t sc[D][R][2];
  auto issue = [&](int d, int chunk, uint32_t (&s)[R][2]) {
    chunk += c0;
    bool valid = 4 * chunk + t < G;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ptx::cp_async16(base + d * C::kStage + (r * 2 + h) * 512, valid ? wrow[r][h] + chunk * 64 : wrow[r][h], valid);
        s[r][h] = valid ? __ldg(srow[r][h] + 4 * chunk) : 0;
      }
#pragma unroll
    for (int j = 0; j < J; ++j)
      if (8 * j + g < m)
#pragma unroll
        for (int q = 0; q < 4; ++q)
          ptx::cp_async16(base + d * C::kStage + C::kW + (j * 4 + q) * 512, valid ? xrow[j] + chunk * 128 + q * 8 : xrow[j], valid);
    ptx::cp_async_commit();
  };
  float acc[R][J][4] = {};
  const int steps = chunks > warp ? (chunks - warp + WK - 1) / WK : 0;
#pragma unroll
  for (int d = 0; d < D; ++d) {
    if (d < steps) issue(d, warp + d * WK, sc[d]); else ptx::cp_async_commit();
  }
  for (int step0 = 0; step0 < steps; step0 += D) {
#pragma unroll
    for (int d = 0; d < D; ++d) {
      if (step0 + d >= steps) break;
      ptx::cp_async_wait<D - 1>();
      uint4 w[R][2];
      ScaleFactor f[R][2];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          w[r][h] = ptx::load_shared16(base + d * C::kStage + (r * 2 + h) * 512);
          f[r][h] = scale_factor(sc[d][r][h]);
        }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a[R][2][4];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            decode8<false>(i == 0 ? w[r][h].x : i == 1 ? w[r][h].y : i == 2 ? w[r][h].z : w[r][h].w, f[r][h], a[r][h]);
#pragma unroll
        for (int j = 0; j < J; ++j) {
          uint4 raw[1] = {ptx::load_shared16(base + d * C::kStage + C::kW + (j * 4 + i) * 512)};
          uint32_t b[1][4];
          Activation<__nv_bfloat16>::terms(raw, b);
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int s = 0; s < 4; s += 2)
              ptx::mma_m16n8k16(acc[r][j], a[r][0][s], a[r][1][s], a[r][0][s + 1], a[r][1][s + 1], b[0][s], b[0][s + 1]);
        }
      }
      if (step0 + d + D < steps) issue(d, warp + (step0 + d + D) * WK, sc[d]); else ptx::cp_async_commit();
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sums[(warp * C::TM + 8 * j + 2 * t + c % 2) * C::kSumStride + 16 * r + 8 * (c / 2) + g] = acc[r][j][c];
  __syncthreads();
  float local[(C::TN * C::TM + C::T - 1) / C::T];
  int it = 0;
#pragma unroll
  for (int i = threadIdx.x; i < C::TN * C::TM; i += C::T, ++it) {
    int token = i / C::TN, row = i % C::TN;
    float v = 0;
#pragma unroll
    for (int wk = 0; wk < WK; ++wk) v += sums[(wk * C::TM + token) * C::kSumStride + row];
    local[it] = v;
  }
  if constexpr (S > 1) {
    namespace cg = cooperative_groups;
    cg::cluster_group cluster = cg::this_cluster();
    // every thread owns its (token,row) in sums plane 0
    it = 0;
#pragma unroll
    for (int i = threadIdx.x; i < C::TN * C::TM; i += C::T, ++it) sums[(i / C::TN) * C::kSumStride + i % C::TN] = local[it];
    cluster.sync();
    if (rank == 0) {
      it = 0;
#pragma unroll
      for (int i = threadIdx.x; i < C::TN * C::TM; i += C::T, ++it) {
        float v = 0;
#pragma unroll
        for (int p = 0; p < S; ++p) v += cluster.map_shared_rank(sums, p)[(i / C::TN) * C::kSumStride + i % C::TN];
        local[it] = v;
      }
    }
    cluster.sync();
    if (rank) return;
  }
  it = 0;
#pragma unroll
  for (int i = threadIdx.x; i < C::TN * C::TM; i += C::T, ++it) {
    int token = i / C::TN, row = i % C::TN;
    if (first_n + row >= args.n || token >= m) continue;
    float v = local[it];
    if (args.bias.data) v += load_float(args.bias.data, args.bias.type, first_n + row);
    store_float(args.out, args.out_type, int64_t(token) * args.n + first_n + row, v);
  }
}
template <int R, int WK, int J, int D, int S = 1>
cudaError_t dec_launch(const GemmArgs& a, cudaStream_t s) {
  using C = Dec<R, WK, J, D, S>;
  cudaFuncSetAttribute(dec_kernel<R, WK, J, D, S>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kShared);
  cudaLaunchConfig_t cfg = {};
  cfg.gridDim = (a.n + C::TN - 1) / C::TN * S; cfg.blockDim = C::T; cfg.dynamicSmemBytes = C::kShared; cfg.stream = s;
  cudaLaunchAttribute at[1]; at[0].id = cudaLaunchAttributeClusterDimension; at[0].val.clusterDim.x = S; at[0].val.clusterDim.y = 1; at[0].val.clusterDim.z = 1;
  cfg.attrs = at; cfg.numAttrs = S > 1 ? 1 : 0;
  if (cudaError_t e = cudaLaunchKernelEx(&cfg, dec_kernel<R, WK, J, D, S>, a)) return e;
  return cudaGetLastError();
}
}
