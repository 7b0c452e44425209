// Bits of `dequantize` and `take`: every code at every place of a block times every scale, in both
// layouts and all three types, and gathered rows of many lengths, against arithmetic on the host.
//
//   nvcc -std=c++17 -arch=native -Icuda tests/cuda/unpack.cu cuda/dequantize.cu -o unpack &&
//   ./unpack
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

using namespace jax_mxfp4;

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* upload(const std::vector<T>& host) {
  T* data = nullptr;
  check(cudaMalloc(&data, host.size() * sizeof(T)));
  check(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return data;
}

struct Weight {
  int rows, k;
  std::vector<uint8_t> codes, scales;  // one code per byte

  Weight(int rows, int k)
      : rows(rows), k(k), codes(size_t(rows) * k), scales(size_t(rows) * k / 32) {
    for (uint8_t& code : codes) code = std::rand() % 16;
    for (uint8_t& scale : scales) scale = std::rand() % 256;
  }

  std::vector<uint8_t> blocks(bool prepared) const {
    std::vector<uint8_t> bytes(codes.size() / 2);
    for (size_t i = 0; i < codes.size(); ++i) {
      const unsigned e = i % 32, code = codes[i];
      uint8_t* block = &bytes[i / 32 * 16];
      if (!prepared) {
        block[e / 2] |= code << 4 * (e % 2);
        continue;
      }
      // The half e % 2 of word e / 2 % 4: runs 0, 1, 2 three bits apart, run 3 where they leave
      // off.
      const unsigned s = code >> 3, e1 = code >> 2 & 1, e0 = code >> 1 & 1, m = code & 1;
      const unsigned run = e / 8, in_half = run < 3
                                                ? (s << 15 | e1 << 8 | e0 << 7 | m << 6) >> 3 * run
                                                : s << 14 | (e1 ^ m) << 13 | m << 11 | e0 << 10;
      uint8_t* half = block + 4 * (e / 2 % 4) + 2 * (e % 2);
      half[0] |= in_half & 255;
      half[1] |= in_half >> 8;
    }
    return bytes;
  }

  double value(size_t i) const {
    constexpr double kMagnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    const int scale = scales[i / 32];
    const double magnitude =
        scale == 255 ? NAN : std::ldexp(kMagnitudes[codes[i] & 7], scale - 127);
    return codes[i] & 8 ? -magnitude : magnitude;
  }
};

// Bits of `value` in the type; beyond the largest f32 it is Inf, which the conversions keep.
uint32_t bits(double value, DType type) {
  const float f = float(value);
  uint32_t out = 0;
  if (type == DType::kF32) {
    std::memcpy(&out, &f, 4);
  } else if (type == DType::kF16) {
    const __half h = __float2half_rn(f);
    std::memcpy(&out, &h, 2);
  } else {
    const __nv_bfloat16 b = __float2bfloat16_rn(f);
    std::memcpy(&out, &b, 2);
  }
  return out;
}

bool is_nan(uint32_t v, DType type) {
  if (type == DType::kF32) return (v & 0x7fffffff) > 0x7f800000;
  return (v & 0x7fff) > (type == DType::kF16 ? 0x7c00 : 0x7f80);
}

// ids == nullptr: the whole weight.
void run(const Weight& weight, const std::vector<int32_t>* ids, DType type, bool prepared) {
  const size_t size = type == DType::kF32 ? 4 : 2;
  const size_t rows = ids ? ids->size() : weight.rows, count = rows * weight.k;
  uint8_t *blocks = upload(weight.blocks(prepared)), *scales = upload(weight.scales);
  uint8_t* out = upload(std::vector<uint8_t>(count * size, 0x5a));
  if (ids) {
    int32_t* device_ids = upload(*ids);
    check(take({blocks, scales}, device_ids, rows, weight.rows, weight.k, out, type, prepared, 0));
    check(cudaFree(device_ids));
  } else {
    check(dequantize({blocks, scales}, rows, weight.k, out, type, prepared, 0));
  }
  std::vector<uint8_t> found(count * size);
  check(cudaMemcpy(found.data(), out, found.size(), cudaMemcpyDeviceToHost));
  for (uint8_t* data : {blocks, scales, out}) check(cudaFree(data));

  for (size_t i = 0; i < count; ++i) {
    int64_t row = i / weight.k;
    if (ids) row = (*ids)[row] < 0 ? int64_t((*ids)[row]) + weight.rows : (*ids)[row];
    const bool valid = row >= 0 && row < weight.rows;
    const double expected = valid ? weight.value(row * weight.k + i % weight.k) : NAN;
    uint32_t actual = 0;
    std::memcpy(&actual, &found[i * size], size);
    if (std::isnan(expected) ? is_nan(actual, type) : actual == bits(expected, type)) continue;
    std::printf("%s, %s, type %d, K = %d: element %zu is %x, not %g\n", ids ? "take" : "dequantize",
                prepared ? "prepared" : "canonical", int(type), weight.k, i, actual, expected);
    std::exit(1);
  }
}

}  // namespace

int main() {
  Weight every(256 * 16, 32 * 32);  // row: a scale and a code; block: the place of the code
  for (int row = 0; row < every.rows; ++row)
    for (int place = 0; place < 32; ++place) {
      every.scales[row * 32 + place] = row / 16;
      every.codes[(row * 32 + place) * 32 + place] = row % 16;
    }
  int calls = 0;
  for (bool prepared : {false, true})
    for (DType type : {DType::kF32, DType::kF16, DType::kBF16}) {
      run(every, nullptr, type, prepared);
      ++calls;
      for (int k : {32, 64, 96, 288, 1056, 2880, 4096, 8224, 20000}) {
        const Weight weight(37, k);
        std::vector<int32_t> ids = {0, 36, -1, -37, 37, -38, INT32_MAX, INT32_MIN};
        for (int i = 0; i < 93; ++i) ids.push_back(std::rand() % 37);
        run(weight, nullptr, type, prepared);
        run(weight, &ids, type, prepared);
        calls += 2;
      }
    }
  std::printf("%d calls are exact\n", calls);
}
