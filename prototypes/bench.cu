#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>
#include <algorithm>
#include <functional>
#include "decode.cuh"
#include "wg.cuh"
#include "ldg.cuh"
#include "ld3.cuh"
#include "str.cuh"
using namespace jax_mxfp4;
#define CK(x) do { cudaError_t e = (x); if (e) { printf("%s: %s\n", #x, cudaGetErrorString(e)); exit(1);} } while (0)
__global__ void fill(uint32_t* p, size_t n, uint32_t seed, int kind) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    uint32_t h = uint32_t(i) * 2654435761u ^ seed; h ^= h >> 16; h *= 0x85ebca6b; h ^= h >> 13; h *= 0xc2b2ae35; h ^= h >> 16;
    if (kind == 1) h = 0x78787878u + (h & 0x03030303u);       // scales 120..123
    if (kind == 2) h = (h & 0x807f807fu) | 0x3f003f00u;      // bf16 in +-[.5,1)
    p[i] = h;
  }
}
__global__ void ref_kernel(GemmArgs a, float* out) {  // exact-ish reference
  int n = blockIdx.x * blockDim.x + threadIdx.x; int m = blockIdx.y; if (n >= a.n || n >= 1024) return;
  double s = 0; int G = a.k / 32;
  for (int b = 0; b < G; ++b) { float sc = e8m0_to_float(a.weights.scales[int64_t(n) * G + b]);
    for (int j = 0; j < 32; ++j) { uint8_t by = a.weights.blocks[(int64_t(n) * G + b) * 16 + j / 2]; uint32_t c = j % 2 ? by >> 4 : by & 15;
      s += double(e2m1_to_float(c, sc)) * __bfloat162float(((const __nv_bfloat16*)a.x)[int64_t(m) * a.k + b * 32 + j]); } }
  out[int64_t(m) * a.n + n] = s;
}
__global__ void cmp_kernel(const __nv_bfloat16* y, const float* r, size_t n, float* res, int N) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    if (i % N >= 1024) { float z = __bfloat162float(y[i]); if (!(fabsf(z) < 1e6f)) atomicMax((int*)res, __float_as_int(1e9f)); continue; }
    float d = fabsf(__bfloat162float(y[i]) - r[i]) ; float e = d / (fabsf(r[i]) + 1.f); if (!(e >= 0)) e = 1e9; atomicMax((int*)res, __float_as_int(e)); }
}
__global__ void stream_kernel(const uint4* p, size_t n, uint32_t* out) {
  uint4 a = {0,0,0,0};
  size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x, st = size_t(gridDim.x) * blockDim.x;
  for (; i + 3 * st < n; i += 4 * st) { uint4 v[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) v[u] = ptx::load_streaming16(p + i + u * st);
#pragma unroll
    for (int u = 0; u < 4; ++u) { a.x ^= v[u].x; a.y ^= v[u].y; a.z ^= v[u].z; a.w ^= v[u].w; } }
  for (; i < n; i += st) { uint4 v = ptx::load_streaming16(p + i); a.x ^= v.x ^ v.y ^ v.z ^ v.w; }
  if ((a.x ^ a.y ^ a.z ^ a.w) == 0x12345678) out[0] = 1;
}
struct Shape { const char* name; int n, k; };
using Fn = std::function<cudaError_t(const GemmArgs&, cudaStream_t)>;
static cudaStream_t st;
float time_graph(const std::function<void(int)>& launch, int calls, int reps = 7) {
  cudaGraph_t g; cudaGraphExec_t ge;
  CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < calls; ++i) launch(i);
  CK(cudaStreamEndCapture(st, &g)); CK(cudaGraphInstantiate(&ge, g, 0));
  cudaEvent_t a, b; cudaEventCreate(&a); cudaEventCreate(&b);
  std::vector<float> v; CK(cudaGraphLaunch(ge, st)); CK(cudaStreamSynchronize(st));
  for (int r = 0; r < reps; ++r) { cudaEventRecord(a, st); CK(cudaGraphLaunch(ge, st)); cudaEventRecord(b, st); CK(cudaEventSynchronize(b)); float ms; cudaEventElapsedTime(&ms, a, b); v.push_back(ms * 1000 / calls); }
  std::sort(v.begin(), v.end()); cudaGraphExecDestroy(ge); cudaGraphDestroy(g); cudaEventDestroy(a); cudaEventDestroy(b); return v[v.size() / 2];
}
int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  CK(cudaStreamCreate(&st));
  Shape shapes[] = {{"qkv", 5120, 2880}, {"o", 2880, 4096}, {"gate_up", 5760, 2880}, {"down", 2880, 2880}, {"lm_head", 201088, 2880}, {"up70", 28672, 8192}, {"down70", 8192, 28672}};
  size_t pool = size_t(640) << 20; char* w; CK(cudaMalloc(&w, pool)); fill<<<2048, 256, 0, st>>>((uint32_t*)w, pool / 4, 1, 0);
  size_t spool = size_t(64) << 20; char* sc; CK(cudaMalloc(&sc, spool)); fill<<<2048, 256, 0, st>>>((uint32_t*)sc, spool / 4, 2, 1);
  char *x, *y, *ref, *res; CK(cudaMalloc(&x, 256 << 20)); fill<<<2048, 256, 0, st>>>((uint32_t*)x, (256 << 20) / 4, 3, 2);
  CK(cudaMalloc(&y, size_t(4096) * 201088 * 2 + 1024)); CK(cudaMalloc(&ref, size_t(64) * 201088 * 4)); CK(cudaMalloc(&res, 4));
  struct V { std::string name; int max_m; Fn fn; };
  std::vector<V> vs;
#define DEC(R, WK, J, D) vs.push_back({"dec R" #R " WK" #WK " J" #J " D" #D, 8 * J, dec_launch<R, WK, J, D>});
  DEC(2, 8, 1, 2) DEC(1, 8, 1, 3)
#define LDG(R, WK, J, D, MODE, B) vs.push_back({"ldg R" #R " WK" #WK " J" #J " D" #D " mode" #MODE " B" #B, 8 * J, ldg_launch<R, WK, J, D, MODE, B>});
  LDG(2,12,1,2,0,1) LDG(3,12,1,2,0,1) LDG(2,12,1,2,1,1) LDG(3,8,1,3,1,1)
#define LD3(R, WK, J, D, B) vs.push_back({"ld3 R" #R " WK" #WK " J" #J " D" #D " B" #B, 8 * J, ld3_launch<R, WK, J, D, B>});
  LD3(1,12,1,2,2) LD3(2,8,1,2,2) LD3(2,12,1,2,1) LD3(3,8,1,3,1) LD3(2,12,2,1,1) LD3(3,8,2,2,1) LD3(4,8,2,1,1) LD3(4,4,2,2,2)
#define STR(R, J, S, Q, WK) vs.push_back({"str R" #R " J" #J " S" #S " Q" #Q " WK" #WK, 8 * J, str_launch<R, J, S, Q, WK>});
  STR(1,1,6,2,12) STR(2,1,3,2,12) STR(1,1,6,1,12) STR(2,1,4,1,12) STR(1,1,4,2,16) STR(2,1,2,2,16) STR(1,1,6,3,8) STR(2,1,3,3,8) STR(2,1,4,1,16) STR(4,1,2,1,12) STR(4,1,3,1,8) STR(1,1,3,1,24) STR(1,2,5,2,12) STR(2,2,2,2,12) STR(2,2,4,1,12) STR(4,2,2,1,12) STR(2,2,3,3,8) STR(4,2,3,1,8) STR(1,2,5,3,8)
#define DECS(R, WK, J, D, S) vs.push_back({"dec R" #R " WK" #WK " J" #J " D" #D " S" #S, 8 * J, dec_launch<R, WK, J, D, S>});
  DECS(2, 8, 1, 2, 2)
#define WGK(TM, WGS, R64, ST, SP) vs.push_back({"wg TM" #TM " WGS" #WGS " R" #R64 " ST" #ST " SP" #SP, 100000, wg_launch<TM, WGS, R64, ST, SP>});
  WGK(64, 1, 1, 4, 2) WGK(64, 2, 1, 4, 2) WGK(64, 2, 1, 4, 4) WGK(32, 1, 1, 4, 2) WGK(32, 2, 1, 4, 2) WGK(32, 2, 1, 4, 4) WGK(128, 1, 1, 4, 2) WGK(128, 2, 1, 4, 2) WGK(128, 2, 1, 4, 4) WGK(64, 2, 2, 4, 4)
#define WG(TM, WGS, R64, ST) vs.push_back({"wg TM" #TM " WGS" #WGS " R" #R64 " ST" #ST, 100000, wg_launch<TM, WGS, R64, ST>});
  WG(64, 1, 1, 4) WG(64, 2, 1, 4) WG(128, 1, 1, 4) WG(128, 2, 1, 4) WG(128, 2, 2, 4) WG(256, 2, 1, 3) WG(32, 1, 1, 4) WG(192, 2, 1, 4)
  for (int c = 0; c < kNumGemmConfigs; ++c)
    vs.push_back({"portable cfg" + std::to_string(c), 4096, [c](const GemmArgs& a, cudaStream_t s) { int tm = kGemmConfigs[c].tile_m; return launch_gemm<__nv_bfloat16>(Epilogue::kDense, c, a, (a.m + tm - 1) / tm, s); }});
  for (auto& s : shapes) {
    size_t wb = size_t(s.n) * s.k / 2, sb = size_t(s.n) * s.k / 32; int copies = std::max<int>(1, std::min<size_t>(pool / wb, std::max<size_t>(2, (size_t(320) << 20) / wb)));
    if (wb * copies > pool) copies = 1;
    int calls = s.n > 100000 ? 20 : s.n * (double)s.k > 1e8 ? 60 : 200;
    float ts = time_graph([&](int i) { stream_kernel<<<264, 512, 0, st>>>((const uint4*)(w + (i % copies) * wb), wb / 16, (uint32_t*)y); }, calls);
    printf("%s N=%d K=%d copies %d stream(codes) %.2f us\n", s.name, s.n, s.k, copies, ts);
    for (int m : {1, 8, 16, 32, 64, 128, 256, 1024, 4096}) {
      if ((argc > 1 && m > atoi(argv[1])) || (argc > 2 && m < atoi(argv[2]))) continue;
      if (m > 256 && s.n > 100000) continue;
      GemmArgs a = {}; a.x = x; a.out = y; a.out_type = DType::kBF16; a.m = m; a.n = s.n; a.k = s.k;
      a.weights = {(uint8_t*)w, (uint8_t*)sc};
      const int mr = m <= 64 ? m : 64;
      ref_kernel<<<dim3(8, mr), 128, 0, st>>>(a, (float*)ref);
      std::vector<std::pair<float, std::string>> out;
      for (auto& v : vs) {
        if (m > v.max_m || (v.max_m < 4096 && v.max_m > 8 && m <= v.max_m / 2)) continue;
        if (v.name == "portable cfg2" && m < 64) continue;
        if (v.name == "portable cfg1" && m < 16) continue; if (m < 16 && v.name[0] == 'w' && m != 8) continue;
        if ((v.name == "portable cfg0" && m > 32) || (v.name == "portable cfg1" && m > 256)) continue;
        if (v.name[0] == 'w' && m < 8) continue;
        if (v.name[0] == 'w') { int tm = atoi(v.name.c_str() + 5); if (m >= 64 && tm < 64) continue; if (m < 64 && tm >= 64 && m <= tm / 2) continue; if (m > 256 && v.name.find(" SP") != std::string::npos) continue; }
        CK(cudaMemsetAsync(y, 0xff, size_t(m) * s.n * 2, st)); CK(cudaMemsetAsync(res, 0, 4, st));
        { cudaError_t e0 = v.fn(a, st); if (e0) { if (e0 != cudaErrorInvalidValue) printf("  %s: %s\n", v.name.c_str(), cudaGetErrorString(e0)); cudaGetLastError(); continue; } } cmp_kernel<<<256, 256, 0, st>>>((__nv_bfloat16*)y, (float*)ref, size_t(mr) * s.n, (float*)res, s.n);
        float e; CK(cudaMemcpyAsync(&e, res, 4, cudaMemcpyDeviceToHost, st)); CK(cudaStreamSynchronize(st));
        float us = time_graph([&](int i) { GemmArgs b = a; b.weights = {(uint8_t*)w + (i % copies) * wb, (uint8_t*)sc + (i % copies) * sb}; CK(v.fn(b, st)); }, m > 512 ? 12 : m > 128 && s.n * (double)s.k > 1e8 ? 20 : calls, 5);
        char buf[200]; snprintf(buf, 200, "%-27s %8.2f us err %.4f %s", v.name.c_str(), us, e, e < 0.02 || v.name.find("mode1") != std::string::npos || v.name.find("mode2") != std::string::npos ? "" : "WRONG"); out.push_back({us, buf});
      }
      std::sort(out.begin(), out.end());
      printf(" M=%d\n", m); for (size_t i = 0; i < out.size(); ++i) if (i < 7 || out[i].second.find("mode1") != std::string::npos || out[i].second.find("mode2") != std::string::npos || out[i].second.find("WRONG") != std::string::npos || out[i].second.find("portable") != std::string::npos) printf("   %s\n", out[i].second.c_str());
    }
  }
}
