// Unpacking to f32, bf16 or f16: a whole tensor, or rows gathered by id.
//
// A thread decodes pieces: the elements of one 16-byte store, eight of 16 bits or four of 32. The
// threads of a row take every blockDim.x-th piece, so that a warp reads and writes without gaps,
// and a thread has the loads of several pieces in flight before it stores the first.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "mxfp4.cuh"

namespace jax_mxfp4 {
namespace {

constexpr int kThreads = 256;  // of a thread block, at most
constexpr int kUnroll = 4;     // pieces in flight per thread

template <typename Out>
constexpr unsigned kPiece = 16 / sizeof(Out);

// Where a piece's codes lie and how two of them become a raw pair: bf16 halves, the earlier element
// in the lower one, that read as value * 2^-126 (the sign in bit 15, e, e, m in bits 8..6).
//
// Canonical: element 2j in the low nibble of byte j, 2j + 1 in the high one.
template <unsigned kElements>
struct Canonical {
  using Codes = std::conditional_t<kElements == 8, uint32_t, uint16_t>;

  __device__ explicit Canonical(unsigned) {}

  __device__ Codes load(const uint8_t* blocks, unsigned piece) const {
    return __ldg(reinterpret_cast<const Codes*>(blocks) + piece);
  }

  // Byte i, once shifted and once not, goes to the upper byte of each half; what else comes along
  // is masked.
  __device__ uint32_t raw_pair(Codes codes, unsigned i) const {
    const uint32_t word = codes;
    const uint32_t x = __byte_perm(word << 4, word, 0x4400u + 0x1111u * i);
    return (x & 0x80008000u) | ((x >> 6) & 0x01c001c0u);
  }
};

// Prepared (mxfp4.cuh): word c has a pair of every group p = 0 .. 3 of 8 elements. Lanes of
// different p share an instruction, hence one formula for what raw_pair does in two.
template <unsigned kElements>
struct Prepared {
  static constexpr unsigned kWords = kElements / 2;
  using Vector = std::conditional_t<kElements == 8, uint4, uint2>;
  struct Codes {
    uint32_t words[kWords];
  };

  unsigned shift, factor;
  uint32_t mask;

  // All pieces of a thread have the same place in their blocks.
  __device__ explicit Prepared(unsigned piece) {
    const unsigned p = piece * kElements / 8 % 4;
    shift = p == 3 ? kLastShift : 0;
    mask = p == 3 ? kLastBits : 0xffffffffu;
    factor = p == 3 ? kLastFactor : 1u << 3 * p;
  }

  // The four (of 32-bit elements: eight) threads of a block read the same 16 bytes: one request of
  // the warp, and no exchange of pairs between lanes.
  __device__ Codes load(const uint8_t* blocks, unsigned piece) const {
    constexpr unsigned kPerRun = 8 / kElements, kPerBlock = kBlockSize / kElements;
    const unsigned vector = piece / kPerBlock * kPerRun + piece % kPerRun;
    const Vector v = __ldg(reinterpret_cast<const Vector*>(blocks) + vector);
    if constexpr (kElements == 8)
      return {v.x, v.y, v.z, v.w};
    else
      return {v.x, v.y};
  }

  __device__ uint32_t raw_pair(const Codes& codes, unsigned i) const {
    return (((codes.words[i] >> shift) & mask) * factor) & kRawBits;
  }
};

// Exact but for f16, which rounds to nearest even: both products are by powers of two, in a type
// with the exponents of f32. Two, because 2^126 * scale may be beyond them.
template <typename Out, typename Layout>
__device__ uint4 decode(const Layout& layout, const typename Layout::Codes& codes, uint32_t byte) {
  const float scale = e8m0_to_float(byte);
  uint32_t out[4];
#pragma unroll
  for (unsigned i = 0; i < kPiece<Out> / 2; ++i) {
    const uint32_t raw = layout.raw_pair(codes, i);
    if constexpr (std::is_same_v<Out, __nv_bfloat16>) {
      const uint32_t scales = __byte_perm(__float_as_uint(scale), 0, 0x3232);
      out[i] = mul_bf16x2(mul_bf16x2(raw, 0x7e807e80u), scales);
    } else {
      const float low = (__uint_as_float(raw << 16) * 0x1p126f) * scale;
      const float high = (__uint_as_float(raw & 0xffff0000u) * 0x1p126f) * scale;
      if constexpr (std::is_same_v<Out, __half>) {
        const __half2 pair = __floats2half2_rn(low, high);
        out[i] = reinterpret_cast<const uint32_t&>(pair);
      } else {
        out[2 * i] = __float_as_uint(low);
        out[2 * i + 1] = __float_as_uint(high);
      }
    }
  }
  return {out[0], out[1], out[2], out[3]};
}

// Thread (x, y) of block b decodes of output row blockDim.y * b + y. Rows have row_pieces pieces,
// the last one as many as there are left of `pieces`. blockDim.x is a multiple of the pieces in a
// block of codes. ids == nullptr: output row r is weight row r.
template <typename Out, template <unsigned> class LayoutOf>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(PackedWeights weights, const int32_t* ids, int64_t vocab, int64_t pieces,
                  unsigned row_pieces, uint4* out) {
  using Layout = LayoutOf<kPiece<Out>>;
  constexpr unsigned kPerBlock = kBlockSize / kPiece<Out>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t left = pieces - row * row_pieces;
  if (left <= 0) return;
  const unsigned end = unsigned(min(left, int64_t(row_pieces)));

  int64_t source = row;
  bool valid = true;
  if (ids != nullptr) {
    source = __ldg(ids + row);
    if (source < 0) source += vocab;
    valid = source >= 0 && source < vocab;
  }
  const int64_t first_block = source * (row_pieces / kPerBlock);
  const uint8_t* blocks = weights.blocks + first_block * kBlockBytes;
  const uint8_t* scales = weights.scales + first_block;
  out += row * row_pieces;

  const Layout layout(threadIdx.x);
  for (unsigned first = threadIdx.x; first < end; first += kUnroll * blockDim.x) {
    typename Layout::Codes codes[kUnroll];
    uint32_t bytes[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned piece = first + u * blockDim.x;
      codes[u] = {};
      bytes[u] = 255;  // a NaN scale: a row of NaN where the id is not valid
      if (valid && piece < end) {
        codes[u] = layout.load(blocks, piece);
        bytes[u] = __ldg(scales + piece / kPerBlock);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned piece = first + u * blockDim.x;
      if (piece < end) out[piece] = decode<Out>(layout, codes[u], bytes[u]);
    }
  }
}

// Short rows share a warp. Longer ones get whole warps, enough for one pass if a thread block is.
unsigned threads_per_row(int64_t row_pieces) {
  if (row_pieces <= 32) return unsigned(row_pieces);
  const int64_t warps = (row_pieces + 32 * kUnroll - 1) / (32 * kUnroll);
  return unsigned(std::min<int64_t>(32 * warps, kThreads));
}

template <typename Out>
cudaError_t launch(PackedWeights weights, const int32_t* ids, int64_t vocab, int64_t rows,
                   int64_t k, void* out, bool prepared, cudaStream_t stream) {
  const int64_t pieces = rows * (k / kPiece<Out>);
  if (pieces == 0) return cudaSuccess;
  // A whole tensor is one long row, cut to suit the thread blocks.
  const int64_t row_pieces = ids ? k / kPiece<Out> : kThreads * kUnroll;
  const unsigned x = threads_per_row(row_pieces), y = kThreads / x;
  const int64_t row_count = (pieces + row_pieces - 1) / row_pieces;
  const auto kernel = prepared ? unpack_kernel<Out, Prepared> : unpack_kernel<Out, Canonical>;
  kernel<<<unsigned((row_count + y - 1) / y), dim3(x, y), 0, stream>>>(
      weights, ids, vocab, pieces, unsigned(row_pieces), static_cast<uint4*>(out));
  return cudaGetLastError();
}

cudaError_t unpack(PackedWeights weights, const int32_t* ids, int64_t vocab, int64_t rows,
                   int64_t k, void* out, DType out_type, bool prepared, cudaStream_t stream) {
  switch (out_type) {
    case DType::kBF16:
      return launch<__nv_bfloat16>(weights, ids, vocab, rows, k, out, prepared, stream);
    case DType::kF16:
      return launch<__half>(weights, ids, vocab, rows, k, out, prepared, stream);
    default:
      return launch<float>(weights, ids, vocab, rows, k, out, prepared, stream);
  }
}

}  // namespace

cudaError_t take(PackedWeights weights, const int32_t* ids, int64_t count, int64_t vocab, int64_t k,
                 void* out, DType out_type, bool prepared, cudaStream_t stream) {
  return unpack(weights, ids, vocab, count, k, out, out_type, prepared, stream);
}

cudaError_t dequantize(PackedWeights weights, int64_t rows, int64_t k, void* out, DType out_type,
                       bool prepared, cudaStream_t stream) {
  return unpack(weights, nullptr, rows, rows, k, out, out_type, prepared, stream);
}

}  // namespace jax_mxfp4
