#pragma once
#include "../cuda/gemm.cuh"
#include "wgmma.cuh"
#include <cooperative_groups.h>
namespace cg = cooperative_groups;
namespace jax_mxfp4 {
namespace ptx {
__device__ __forceinline__ void mbar_init(uint32_t b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(n)); }
__device__ __forceinline__ void mbar_arrive(uint32_t b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
__device__ __forceinline__ void mbar_wait(uint32_t b, uint32_t parity) {
  asm volatile("{\n.reg .pred p;\nL: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D;\nbra L;\nD:\n}" ::"r"(b), "r"(parity) : "memory");
}
}
template <int TM, int WGS, int R64, int ST, int SPLIT>
struct Wg {
  static constexpr int TN = 64 * WGS * R64, T = 128 * (WGS + 1);
  static constexpr int kStage = TM * 256;
  static constexpr int kOutStride = TN + 8;
  static constexpr int kSumStride = TN + 4;
  static constexpr int kOut = SPLIT > 1 ? TM * kSumStride * 4 : TM * kOutStride * 2;
  static constexpr int kBody = ST * kStage > kOut ? ST * kStage : kOut;
  static constexpr int kShared = kBody + 2 * ST * 8;
};
// grid: (tiles_n * SPLIT?, tiles_m)
template <int TM, int WGS, int R64, int ST, int SPLIT>
__global__ void __launch_bounds__(128 * (WGS + 1), 1) wg_kernel(const __grid_constant__ GemmArgs args) {
  using C = Wg<TM, WGS, R64, ST, SPLIT>;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t sbase = uint32_t(__cvta_generic_to_shared(shared));
  const uint32_t full = sbase + C::kBody, empty = full + ST * 8;
  const int tid = threadIdx.x, lane = tid % 32, wg = tid / 128;
  const int G = args.k / 32, all_chunks = (args.k + 127) / 128;
  const int rank = SPLIT > 1 ? blockIdx.x % SPLIT : 0;
  const int c0 = all_chunks * rank / SPLIT, chunks = all_chunks * (rank + 1) / SPLIT - c0;
  const int first_n = blockIdx.x / SPLIT * C::TN;
  const int64_t first_m = int64_t(blockIdx.y) * TM;
  if (tid == 0) {
    for (int s = 0; s < ST; ++s) { ptx::mbar_init(full + s * 8, 128); ptx::mbar_init(empty + s * 8, WGS * 4); }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (wg == WGS) {  // producer
    if constexpr (R64 * TM >= 256 && WGS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 96;");
    const int warp = (tid % 128) / 32, tok8 = lane % 8, i = lane / 8;
    constexpr int ITS = TM > 128 ? TM / 64 : TM / 32, H = TM / 32 / ITS;
    const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(args.x);
    uint4 v[ITS][4];
    auto load = [&](int chunk, int h) {
      chunk += c0;
#pragma unroll
      for (int it = 0; it < ITS; ++it) {
        int64_t m = first_m + ((h * ITS + it) * 4 + warp) * 8 + tok8;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          bool ok = m < args.m && 4 * chunk + t < G;
          v[it][t] = ok ? __ldg(reinterpret_cast<const uint4*>(x + m * args.k + chunk * 128 + 32 * t + 8 * i)) : make_uint4(0, 0, 0, 0);
        }
      }
    };
    load(0, 0);
    for (int c = 0; c < chunks; ++c) {
      int s = c % ST;
      if (c >= ST) ptx::mbar_wait(empty + s * 8, (c / ST - 1) & 1);
#pragma unroll
      for (int h = 0; h < H; ++h) {
#pragma unroll
      for (int it = 0; it < ITS; ++it) {
        uint32_t dst = sbase + s * C::kStage + ((h * ITS + it) * 4 + warp) * 2048 + i * 512 + tok8 * 16;
        // core 4i+0: {x0,x4} of t=0..3; 4i+1: {x1,x5}; 4i+2: {x2,x6}; 4i+3: {x3,x7}
        uint32_t o[4][4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          o[0][t] = __byte_perm(v[it][t].x, v[it][t].z, 0x5410);
          o[1][t] = __byte_perm(v[it][t].x, v[it][t].z, 0x7632);
          o[2][t] = __byte_perm(v[it][t].y, v[it][t].w, 0x5410);
          o[3][t] = __byte_perm(v[it][t].y, v[it][t].w, 0x7632);
        }
#pragma unroll
        for (int q = 0; q < 4; ++q)
          asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(dst + q * 128), "r"(o[q][0]), "r"(o[q][1]), "r"(o[q][2]), "r"(o[q][3]) : "memory");
      }
      if (h + 1 < H) load(c, h + 1);
      else if (c + 1 < chunks) load(c + 1, 0);
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      ptx::mbar_arrive(full + s * 8);
    }
    __syncthreads();
    __syncthreads();
  } else {
    if constexpr (R64 * TM >= 256 && WGS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
    const int warp = (tid % 128) / 32, g = lane / 4, t = lane % 4;
    const int row0 = first_n + wg * 64 * R64 + warp * 16 + g;
    const uint8_t* wp = args.weights.blocks + (int64_t(row0) * G + t) * 16;
    const uint8_t* sp = args.weights.scales + int64_t(row0) * G + t;
    uint4 nw[R64][2]; uint32_t ns[R64][2];
    auto load = [&](int chunk) {
      chunk += c0;
      bool ok = 4 * chunk + t < G;
#pragma unroll
      for (int r = 0; r < R64; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          bool in = ok && row0 + 64 * r + 8 * h < args.n;
          int off = (64 * r + 8 * h) * G + chunk * 4;
          nw[r][h] = in ? ptx::load_streaming16(wp + off * 16) : make_uint4(0, 0, 0, 0);
          ns[r][h] = in ? __ldg(sp + off) : 0;
        }
    };
    float acc[R64][TM / 2] = {};
    uint32_t a[2][R64][2][4];
    load(0);
    for (int c = 0; c < chunks; ++c) {
      int s = c % ST;
      uint4 w[R64][2]; ScaleFactor f[R64][2];
#pragma unroll
      for (int r = 0; r < R64; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) { w[r][h] = nw[r][h]; f[r][h] = scale_factor(ns[r][h]); }
      if (c + 1 < chunks) load(c + 1);
      // lbo 128 B, sbo 2048 B, no swizzle
      uint64_t desc = (uint64_t((sbase + s * C::kStage) >> 4) & 0x3fff) | (uint64_t(128 >> 4) << 16) | (uint64_t(2048 >> 4) << 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int r = 0; r < R64; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            decode8<false>(i == 0 ? w[r][h].x : i == 1 ? w[r][h].y : i == 2 ? w[r][h].z : w[r][h].w, f[r][h], a[i & 1][r][h]);
        if (i == 0) ptx::mbar_wait(full + s * 8, (c / ST) & 1);
        ptx::wgmma_fence();
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int r = 0; r < R64; ++r)
            ptx::Wgmma<TM>::run(acc[r], a[i & 1][r][0][2 * h], a[i & 1][r][1][2 * h], a[i & 1][r][0][2 * h + 1], a[i & 1][r][1][2 * h + 1], desc + (2 * i + h) * 16);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (i == 0 && c > 0 && lane == 0) ptx::mbar_arrive(empty + ((c - 1) % ST) * 8);
      }
    }
    ptx::wgmma_wait<0>();
    __syncthreads();
    __nv_bfloat16* so = reinterpret_cast<__nv_bfloat16*>(shared);
    float* sf = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int r = 0; r < R64; ++r) {
      int rl = wg * 64 * R64 + 64 * r + warp * 16 + g;
#pragma unroll
      for (int j = 0; j < TM / 8; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          int n = rl + 8 * (q / 2), m = 8 * j + 2 * t + q % 2;
          float v = acc[r][j * 4 + q];
          if constexpr (SPLIT > 1) sf[m * C::kSumStride + n] = v; else so[m * C::kOutStride + n] = __float2bfloat16_rn(v);
        }
    }
    __syncthreads();
  }
  if constexpr (SPLIT > 1) {
    cg::cluster_group cluster = cg::this_cluster();
    cluster.sync();
    const float* peer[SPLIT];
#pragma unroll
    for (int p = 0; p < SPLIT; ++p) peer[p] = cluster.map_shared_rank(reinterpret_cast<float*>(shared), p);
    constexpr int kMine = TM / SPLIT;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out);
    for (int i = tid; i < kMine * C::TN / 4; i += C::T) {
      int m = rank * kMine + i / (C::TN / 4), n = i % (C::TN / 4) * 4;
      float4 v = {0, 0, 0, 0};
#pragma unroll
      for (int p = 0; p < SPLIT; ++p) { float4 u = *reinterpret_cast<const float4*>(peer[p] + m * C::kSumStride + n); v.x += u.x; v.y += u.y; v.z += u.z; v.w += u.w; }
      if (first_m + m < args.m && first_n + n < args.n) {
        __nv_bfloat162 o[2] = {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
        *reinterpret_cast<uint2*>(out + (first_m + m) * args.n + first_n + n) = *reinterpret_cast<uint2*>(o);
      }
    }
    cluster.sync();
    return;
  }
  const __nv_bfloat16* so = reinterpret_cast<const __nv_bfloat16*>(shared);
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out);
  for (int i = tid; i < TM * C::TN / 8; i += C::T) {
    int m = i / (C::TN / 8), n = i % (C::TN / 8) * 8;
    if (first_m + m < args.m && first_n + n < args.n)
      *reinterpret_cast<uint4*>(out + (first_m + m) * args.n + first_n + n) = *reinterpret_cast<const uint4*>(so + m * C::kOutStride + n);
  }
}
template <int TM, int WGS, int R64, int ST, int SPLIT = 1>
cudaError_t wg_launch(const GemmArgs& a, cudaStream_t s) {
  using C = Wg<TM, WGS, R64, ST, SPLIT>;
  static cudaError_t once = cudaFuncSetAttribute(wg_kernel<TM, WGS, R64, ST, SPLIT>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kShared);
  if (once) return once;
  cudaLaunchConfig_t cfg = {};
  cfg.gridDim = dim3((a.n + C::TN - 1) / C::TN * SPLIT, unsigned((a.m + TM - 1) / TM)); cfg.blockDim = C::T; cfg.dynamicSmemBytes = C::kShared; cfg.stream = s;
  cudaLaunchAttribute at[1]; at[0].id = cudaLaunchAttributeClusterDimension; at[0].val.clusterDim.x = SPLIT; at[0].val.clusterDim.y = 1; at[0].val.clusterDim.z = 1;
  cfg.attrs = at; cfg.numAttrs = SPLIT > 1 ? 1 : 0;
  if (cudaError_t e = cudaLaunchKernelEx(&cfg, wg_kernel<TM, WGS, R64, ST, SPLIT>, a)) return e;
  return cudaGetLastError();
}
}
