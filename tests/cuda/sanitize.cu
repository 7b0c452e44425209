// Every launcher on small ragged shapes, with buffers of exactly the promised size and poisoned
// outputs: the program to run under compute-sanitizer, where a JAX process would be slow and noisy.
//
//   nvcc -std=c++17 -lineinfo -arch=native -Icuda tests/cuda/sanitize.cu cuda/*.cu
//   cuda/gemm_config.cc -o sanitize compute-sanitizer --tool memcheck ./sanitize &&
//   compute-sanitizer --tool racecheck ./sanitize
//
// Values are the business of the Python suite; here every output must have been written and finite.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels.h"

using namespace jax_mxfp4;

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
struct Buffer {
  T* data = nullptr;
  size_t count;
  explicit Buffer(size_t n, int byte = 0xff) : count(n) {
    check(cudaMalloc(&data, n * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data, byte, n * sizeof(T)), "cudaMemset");
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    check(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
};

std::vector<uint8_t> random_bytes(size_t n, int low, int high) {
  std::vector<uint8_t> bytes(n);
  for (uint8_t& b : bytes) b = uint8_t(low + std::rand() % (high - low + 1));
  return bytes;
}

struct Packed {
  Buffer<uint8_t> blocks, scales;
  Packed(size_t rows, size_t k)
      : blocks(random_bytes(rows * k / 2, 0, 255)), scales(random_bytes(rows * k / 32, 120, 124)) {}
  PackedWeights view() const { return {blocks.data, scales.data}; }
};

size_t size_of(DType type) { return type == DType::kF32 ? 4 : 2; }

// Bytes that read as small finite numbers in all three types.
Buffer<uint8_t>* activations(size_t elements, DType type) {
  std::vector<uint8_t> bytes = random_bytes(elements * size_of(type), 0, 255);
  const size_t step = size_of(type);
  for (size_t i = step - 1; i < bytes.size(); i += step) bytes[i] = (bytes[i] & 0x80) | 0x3d;
  return new Buffer<uint8_t>(bytes);
}

// Buffers begin as NaN of every type.
void expect_written(const Buffer<uint8_t>& out, DType type, const char* what) {
  check(cudaDeviceSynchronize(), what);
  std::vector<uint8_t> host(out.count);
  check(cudaMemcpy(host.data(), out.data, host.size(), cudaMemcpyDeviceToHost), "download");
  const size_t step = size_of(type);
  for (size_t i = 0; i < host.size(); i += step) {
    // The two highest bytes of a number: an exponent of all ones.
    const unsigned high = host[i + step - 1] << 8 | host[i + step - 2];
    const unsigned exponent = type == DType::kF16 ? 0x7c00 : 0x7f80;
    if ((high & exponent) == exponent) {
      std::printf("%s: an output was not written\n", what);
      std::exit(1);
    }
  }
}

int run_matmul(DType type, int m, int n, int k, DType out_type = DType::kF32) {
  Packed w(n, k);
  Buffer<uint8_t>* bias = activations(n, DType::kBF16);
  Buffer<uint8_t>* x = activations(size_t(m) * k, type);
  Buffer<uint8_t> out(size_t(m) * n * size_of(out_type));
  MatmulArgs args = {};
  args.x = x->data;
  args.x_type = type;
  args.weights = w.view();
  args.bias = {m % 2 ? bias->data : nullptr, DType::kBF16};
  args.out = out.data;
  args.out_type = out_type;
  args.m = m;
  args.n = n;
  args.k = k;
  check(matmul(args, 0), "matmul");
  expect_written(out, out_type, "matmul");
  delete x;
  delete bias;
  return 1;
}

int run_moe(DType type, int tokens, int experts, int d, int inner) {
  const int top_k = experts == 1 ? 1 : 3, pairs = tokens * top_k;
  Packed gate_up(size_t(experts) * 2 * inner, d), down(size_t(experts) * d, inner);
  Buffer<uint8_t>* x = activations(size_t(tokens) * d, type);
  Buffer<uint8_t>* gate_up_bias = activations(size_t(experts) * 2 * inner, DType::kF32);
  Buffer<uint8_t>* down_bias = activations(size_t(experts) * d, DType::kBF16);
  std::vector<int32_t> ids(pairs);
  for (int32_t& id : ids) id = std::rand() % (experts + 2) - 1;  // some have no expert
  Buffer<int32_t> expert_ids(ids);
  Buffer<float> weights(std::vector<float>(pairs, 0.25f));
  Buffer<uint8_t> out(size_t(tokens) * d * 4);
  Buffer<float> partial(size_t(pairs) * d);
  Buffer<uint8_t> hidden(size_t(pairs) * inner * size_of(type));
  Buffer<int32_t> schedule(moe_schedule_size(pairs, experts));
  MoeArgs args = {};
  args.x = x->data;
  args.x_type = type;
  args.expert_ids = expert_ids.data;
  args.expert_weights = weights.data;
  args.gate_up = gate_up.view();
  args.gate_up_bias = {tokens % 2 ? gate_up_bias->data : nullptr, DType::kF32};
  args.down = down.view();
  args.down_bias = {down_bias->data, DType::kBF16};
  args.out = out.data;
  args.out_type = DType::kF32;
  args.hidden = hidden.data;
  args.partial = partial.data;
  args.schedule = schedule.data;
  args.tokens = tokens;
  args.top_k = top_k;
  args.experts = experts;
  args.d = d;
  args.inner = inner;
  args.alpha = 1.702f;
  args.limit = 7.0f;
  check(moe(args, 0), "moe");
  expect_written(out, DType::kF32, "moe");
  delete x;
  delete gate_up_bias;
  delete down_bias;
  return 1;
}

}  // namespace

int main() {
  const DType types[] = {DType::kBF16, DType::kF16, DType::kF32};
  int calls = 0;
  // Rows of 32, 33 blocks and more than one pass of a thread block; a tensor that ends within one.
  for (bool prepared : {false, true})
    for (int k : {32, 96, 1056, 8224}) {
      Packed w(33, k);
      Buffer<uint8_t> out(33 * k * 4);
      check(dequantize(w.view(), 33, k, out.data, DType::kF32, prepared, 0), "dequantize");
      expect_written(out, DType::kF32, "dequantize");
      Buffer<int32_t> ids(std::vector<int32_t>{0, 32, -1, -33, 7});
      Buffer<uint8_t> rows(5 * k * 4);
      check(take(w.view(), ids.data, 5, 33, k, rows.data, DType::kF32, prepared, 0), "take");
      expect_written(rows, DType::kF32, "take");
      Buffer<int32_t> bad(std::vector<int32_t>{33, -34, 1 << 30});
      Buffer<uint16_t> nans(3 * k);
      check(take(w.view(), bad.data, 3, 33, k, nans.data, DType::kBF16, prepared, 0), "take");
      check(take(w.view(), bad.data, 0, 33, k, nullptr, DType::kBF16, prepared, 0), "take");
      check(cudaDeviceSynchronize(), "take");
      calls += 4;
    }
  for (DType type : types)
    for (int k : {32, 96, 288, 1184})
      for (int n : {1, 8, 100, 130, 160})
        for (int m : {1, 3, 9, 17, 65, 130}) calls += run_matmul(type, m, n, k);
  // Several stages per row and one, with few warps and many, more tiles than multiprocessors.
  for (int k : {2880, 3584, 8192})
    for (int n : {16, 4800})
      for (int m : {1, 8, 16}) calls += run_matmul(DType::kBF16, m, n, k);
  calls += run_matmul(DType::kBF16, 3, 8960, 4608);
  for (int k : {2880, 4096, 4608})
    for (int m : {1, 16}) calls += run_matmul(DType::kBF16, m, 2144, k, DType::kBF16);
  // Warpgroups: one tile and many, K split between thread blocks and not, ragged edges.
  for (int k : {64, 320, 2880})
    for (int n : {104, 1000, 9000})
      for (int m : {17, 65, 130, 300})
        calls += run_matmul(DType::kBF16, m, n, k, k == 320 ? DType::kF32 : DType::kBF16);
  // Every tile, of one block after the other and of clusters, with scales in one copy and in boxes.
  const auto matmul_bf16 = [](int m, int n, int k) {
    return run_matmul(DType::kBF16, m, n, k, DType::kBF16);
  };
  for (int m : {17, 33, 65, 100}) calls += matmul_bf16(m, 25000, 1152);
  for (int m : {32, 64, 128, 192, 256}) calls += matmul_bf16(m, 33792, 192);
  for (int m : {64, 192}) calls += matmul_bf16(m, 16896, 3200);
  for (int m : {96, 256}) calls += matmul_bf16(m, 5120, 3200);
  calls += matmul_bf16(33, 4800, 1152) + matmul_bf16(129, 8256, 1152);
  calls += matmul_bf16(100, 8416, 64) + matmul_bf16(170, 25776, 64);
  for (int n : {304, 1968}) calls += matmul_bf16(700, n, 2880);
  calls += matmul_bf16(1000, 408, 2880);
  calls += matmul_bf16(700, 200, 4096) + matmul_bf16(500, 928, 4096);
  calls += matmul_bf16(9, 16576, 3200) + matmul_bf16(1000, 9000, 192);
  calls += matmul_bf16(500, 9000, 64) + matmul_bf16(700, 9000, 128) + matmul_bf16(1100, 12000, 64) +
           matmul_bf16(2000, 6000, 64);
  // Tiles shared by all thread blocks.
  calls += matmul_bf16(125, 17400, 2112) + matmul_bf16(125, 26000, 4096) +
           matmul_bf16(16, 25600, 4160) + run_matmul(DType::kBF16, 250, 8600, 2880);
  for (DType type : types)
    for (int tokens : {1, 5, 70, 300})
      for (int experts : {1, 4, 33}) {
        calls += run_moe(type, tokens, experts, 96, 64);
        calls += run_moe(type, tokens, experts, 192, 256);
      }
  // Every tile of a grouped product.
  const int grouped[][4] = {{45, 33, 64, 3200},  {29, 2, 64, 3200},    {157, 33, 448, 512},
                            {673, 33, 192, 256}, {1062, 33, 192, 256}, {394, 8, 64, 3200},
                            {1012, 8, 64, 3200}, {781, 2, 64, 3200}};
  for (const auto& [tokens, experts, d, inner] : grouped)
    calls += run_moe(DType::kBF16, tokens, experts, d, inner);
  std::printf("%d calls\n", calls);
}
