#include <cstdio>
#include <vector>
#include <algorithm>
#include <cuda_runtime.h>
#include "../cuda/kernels.h"
using namespace jax_mxfp4;
#define CK(x) do { cudaError_t e = (x); if (e) { printf("%s: %s\n", #x, cudaGetErrorString(e)); exit(1);} } while (0)
__global__ void fill(uint32_t* p, size_t n, uint32_t seed, int kind) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    uint32_t h = uint32_t(i) * 2654435761u ^ seed; h ^= h >> 16; h *= 0x85ebca6b; h ^= h >> 13; h *= 0xc2b2ae35; h ^= h >> 16;
    if (kind == 1) h = 0x78787878u + (h & 0x03030303u);
    if (kind == 2) h = (h & 0x807f807fu) | 0x3f003f00u;
    p[i] = h; } }
int main() {
  cudaStream_t st; CK(cudaStreamCreate(&st));
  struct { const char* name; int n, k; } shapes[] = {{"qkv", 5120, 2880}, {"o_proj", 2880, 4096}, {"gate_up", 5760, 2880}, {"down", 2880, 2880}, {"lm_head", 201088, 2880}, {"up70", 28672, 8192}, {"down70", 8192, 28672}};
  size_t pool = size_t(640) << 20; char *w, *sc, *x, *y; CK(cudaMalloc(&w, pool)); CK(cudaMalloc(&sc, 64 << 20)); CK(cudaMalloc(&x, 256 << 20)); CK(cudaMalloc(&y, size_t(256) * 201088 * 2));
  fill<<<2048, 256, 0, st>>>((uint32_t*)w, pool / 4, 1, 0); fill<<<2048, 256, 0, st>>>((uint32_t*)sc, (64 << 20) / 4, 2, 1); fill<<<2048, 256, 0, st>>>((uint32_t*)x, (256 << 20) / 4, 3, 2);
  for (auto& s : shapes) for (int m : {1, 2, 4, 8, 16, 32, 64, 128, 256}) {
    size_t wb = size_t(s.n) * s.k / 2, sb = size_t(s.n) * s.k / 32; int copies = std::max<size_t>(2, std::min<size_t>(pool / wb, (size_t(320) << 20) / wb)); if (copies * wb > pool) copies = 1;
    int calls = s.n * (double)s.k > 1e8 ? 40 : 200;
    cudaGraph_t g; cudaGraphExec_t ge; CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) { MatmulArgs a = {x, DType::kBF16, {(uint8_t*)w + (i % copies) * wb, (uint8_t*)sc + (i % copies) * sb}, {nullptr, DType::kF32}, y, DType::kBF16, m, s.n, s.k}; CK(matmul(a, st)); }
    CK(cudaStreamEndCapture(st, &g)); CK(cudaGraphInstantiate(&ge, g, 0));
    cudaEvent_t a, b; cudaEventCreate(&a); cudaEventCreate(&b); std::vector<float> v; CK(cudaGraphLaunch(ge, st)); CK(cudaStreamSynchronize(st));
    for (int r = 0; r < 9; ++r) { cudaEventRecord(a, st); CK(cudaGraphLaunch(ge, st)); cudaEventRecord(b, st); CK(cudaEventSynchronize(b)); float ms; cudaEventElapsedTime(&ms, a, b); v.push_back(ms * 1000 / calls); }
    std::sort(v.begin(), v.end()); printf("%s M=%d %.2f us\n", s.name, m, v[4]); cudaGraphExecDestroy(ge); cudaGraphDestroy(g); }
}
