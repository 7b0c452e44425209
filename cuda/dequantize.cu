// Unpacking to f32, bf16 or f16: a whole tensor, or rows gathered by id.
#include <algorithm>

#include "kernels.h"
#include "mxfp4.cuh"

namespace jax_mxfp4 {
namespace {

constexpr int kThreads = 256;
constexpr int kWordElements = 8;  // codes of one 32-bit load: 16 bytes out in bf16

template <typename Out>
__device__ Out convert(float v) {
  if constexpr (sizeof(Out) == 4)
    return v;
  else if constexpr (std::is_same_v<Out, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

template <typename Out>
struct alignas(16) Elements {
  Out v[kWordElements];
};

// ids == nullptr: output row r is weight row r.
template <typename Out>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(PackedWeights weights, const int32_t* ids, int64_t vocab, int64_t words,
                  int row_words, Elements<Out>* out) {
  constexpr int kBlockWords = kBlockSize / kWordElements;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < words;
       i += int64_t(gridDim.x) * kThreads) {
    int64_t source = i;
    bool valid = true;
    if (ids != nullptr) {
      int64_t row = i / row_words;
      int64_t id = ids[row];
      if (id < 0) id += vocab;
      valid = id >= 0 && id < vocab;
      source = id * row_words + i % row_words;
    }
    Elements<Out> result;
    if (valid) {
      uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(weights.blocks) + source);
      float scale = e8m0_to_float(__ldg(weights.scales + source / kBlockWords));
#pragma unroll
      for (int j = 0; j < kWordElements; ++j)
        result.v[j] = convert<Out>(e2m1_to_float(word >> (4 * j) & 15u, scale));
    } else {
#pragma unroll
      for (int j = 0; j < kWordElements; ++j)
        result.v[j] = convert<Out>(__int_as_float(0x7fc00000));
    }
    out[i] = result;
  }
}

template <typename Out>
cudaError_t launch(PackedWeights weights, const int32_t* ids, int64_t vocab, int64_t rows,
                   int64_t k, void* out, cudaStream_t stream) {
  const int64_t words = rows * (k / kWordElements);
  const int64_t blocks = std::min<int64_t>((words + kThreads - 1) / kThreads, 1 << 20);
  unpack_kernel<Out><<<unsigned(blocks), kThreads, 0, stream>>>(
      weights, ids, vocab, words, int(k / kWordElements), static_cast<Elements<Out>*>(out));
  return cudaGetLastError();
}

}  // namespace

cudaError_t take(PackedWeights weights, const int32_t* ids, int64_t count, int64_t vocab, int64_t k,
                 void* out, DType out_type, cudaStream_t stream) {
  switch (out_type) {
    case DType::kBF16:
      return launch<__nv_bfloat16>(weights, ids, vocab, count, k, out, stream);
    case DType::kF16:
      return launch<__half>(weights, ids, vocab, count, k, out, stream);
    default:
      return launch<float>(weights, ids, vocab, count, k, out, stream);
  }
}

cudaError_t dequantize(PackedWeights weights, int64_t rows, int64_t k, void* out, DType out_type,
                       cudaStream_t stream) {
  return take(weights, nullptr, rows, rows, k, out, out_type, stream);
}

}  // namespace jax_mxfp4
