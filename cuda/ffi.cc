// XLA FFI handlers: validate, hand over to kernels.h, turn failures into ffi::Error. Nothing else.
//
// Operand contracts stand beside each handler; jax_mxfp4/ffi.py builds calls that meet them, so
// these checks guard against other callers and against ourselves.
#include "ffi.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jax_mxfp4 {
namespace {

using ffi::AnyBuffer;
using Dimensions = AnyBuffer::Dimensions;

std::string to_string(Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

ffi::Error invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("jax_mxfp4: " + message);
}

ffi::Error from_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_mxfp4: ") + what + " failed to launch: " +
                              cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

bool float_type(ffi::DataType type, DType& out) {
  switch (type) {
    case ffi::F32:
      out = DType::kF32;
      return true;
    case ffi::F16:
      out = DType::kF16;
      return true;
    case ffi::BF16:
      out = DType::kBF16;
      return true;
    default:
      return false;
  }
}

bool aligned16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Collects the first failed check of a call; the ones after it are skipped.
class Checker {
 public:
  DType floating(const char* name, const AnyBuffer& buffer) {
    DType type = DType::kF32;
    if (!float_type(buffer.element_type(), type)) fail(name, "must be f32, f16 or bf16");
    return type;
  }
  void type(const char* name, const AnyBuffer& buffer, ffi::DataType expected, const char* text) {
    if (buffer.element_type() != expected) fail(name, std::string("must be ") + text);
  }
  void shape(const char* name, const AnyBuffer& buffer, std::initializer_list<int64_t> expected) {
    Dimensions dims = buffer.dimensions();
    bool same = dims.size() == expected.size();
    size_t i = 0;
    for (int64_t e : expected) same = same && dims[i++] == e;
    if (same) return;
    std::string text = "must have shape [";
    i = 0;
    for (int64_t e : expected) text += (i++ ? ", " : "") + std::to_string(e);
    fail(name, text + "], found " + to_string(dims));
  }
  void rank(const char* name, const AnyBuffer& buffer, size_t expected) {
    if (buffer.dimensions().size() != expected)
      fail(name, "must have rank " + std::to_string(expected) + ", found shape " +
                     to_string(buffer.dimensions()));
  }
  // 16-byte loads and cp.async; XLA promises this much for entry parameters.
  void aligned(const char* name, const AnyBuffer& buffer) {
    if (!aligned16(buffer.untyped_data())) fail(name, "must be aligned to 16 bytes");
  }
  void at_most(const char* name, int64_t value, int64_t limit) {
    if (value > limit)
      fail(name, "is " + std::to_string(value) + ", more than " + std::to_string(limit));
  }
  PackedWeights packed(const char* name, const AnyBuffer& blocks, const AnyBuffer& scales) {
    std::string prefix = name;
    type((prefix + "blocks").c_str(), blocks, ffi::U8, "u8");
    type((prefix + "scales").c_str(), scales, ffi::U8, "u8");
    Dimensions b = blocks.dimensions(), s = scales.dimensions();
    bool match = b.size() == s.size() + 1 && s.size() >= 1 && b[b.size() - 1] == 16;
    for (size_t i = 0; match && i < s.size(); ++i) match = b[i] == s[i];
    if (!match)
      fail((prefix + "blocks").c_str(),
           "must have the shape of scales plus a last dimension of 16, found " + to_string(b) +
               " and scales " + to_string(s));
    aligned((prefix + "blocks").c_str(), blocks);
    aligned((prefix + "scales").c_str(), scales);
    return {blocks.typed_data<uint8_t>(), scales.typed_data<uint8_t>()};
  }
  // An empty vector stands for no bias.
  Bias bias(const char* name, const AnyBuffer& buffer, std::initializer_list<int64_t> expected) {
    if (buffer.element_count() == 0) return {nullptr, DType::kF32};
    DType bias_type = floating(name, buffer);
    shape(name, buffer, expected);
    aligned(name, buffer);
    return {buffer.untyped_data(), bias_type};
  }
  bool ok() const { return message_.empty(); }
  ffi::Error error() const { return invalid(message_); }

 private:
  void fail(const char* name, const std::string& what) {
    if (message_.empty()) message_ = std::string(name) + " " + what;
  }
  std::string message_;
};

// blocks u8 [..., G, 16], scales u8 [..., G] -> out f32/f16/bf16 [..., 32 G]
ffi::Error dequantize_impl(cudaStream_t stream, AnyBuffer blocks, AnyBuffer scales,
                           ffi::Result<AnyBuffer> out, bool prepared) {
  Checker check;
  PackedWeights weights = check.packed("", blocks, scales);
  DType out_type = check.floating("out", *out);
  check.aligned("out", *out);
  if (check.ok() && int64_t(out->element_count()) != int64_t(scales.element_count()) * 32)
    return invalid("out must hold 32 elements per scale, found shape " +
                   to_string(out->dimensions()));
  if (!check.ok()) return check.error();
  Dimensions dims = scales.dimensions();
  const int64_t groups = dims[dims.size() - 1];
  if (out->element_count() == 0) return ffi::Error::Success();
  return from_cuda(dequantize(weights, scales.element_count() / groups, 32 * groups,
                              out->untyped_data(), out_type, prepared, stream),
                   "dequantize");
}

// blocks u8 [V, G, 16], scales u8 [V, G], ids s32 [n] -> out f32/f16/bf16 [n, 32 G]
ffi::Error take_impl(cudaStream_t stream, AnyBuffer blocks, AnyBuffer scales, AnyBuffer ids,
                     ffi::Result<AnyBuffer> out, bool prepared) {
  Checker check;
  PackedWeights weights = check.packed("", blocks, scales);
  check.rank("scales", scales, 2);
  check.type("ids", ids, ffi::S32, "s32");
  check.rank("ids", ids, 1);
  DType out_type = check.floating("out", *out);
  check.aligned("out", *out);
  if (!check.ok()) return check.error();
  const int64_t vocab = scales.dimensions()[0], k = 32 * scales.dimensions()[1];
  const int64_t count = ids.dimensions()[0];
  check.shape("out", *out, {count, k});
  if (!check.ok()) return check.error();
  if (count * k == 0) return ffi::Error::Success();
  return from_cuda(take(weights, ids.typed_data<int32_t>(), count, vocab, k, out->untyped_data(),
                        out_type, prepared, stream),
                   "take");
}

// x [M, K], blocks u8 [N, G, 16], scales u8 [N, G], bias [N] or [0] -> out [M, N]
ffi::Error matmul_impl(cudaStream_t stream, AnyBuffer x, AnyBuffer blocks, AnyBuffer scales,
                       AnyBuffer bias, ffi::Result<AnyBuffer> out) {
  Checker check;
  MatmulArgs args = {};
  args.weights = check.packed("", blocks, scales);
  check.rank("scales", scales, 2);
  check.rank("x", x, 2);
  args.x_type = check.floating("x", x);
  args.out_type = check.floating("out", *out);
  check.aligned("x", x);
  if (!check.ok()) return check.error();
  args.m = x.dimensions()[0];
  args.n = scales.dimensions()[0];
  args.k = 32 * scales.dimensions()[1];
  check.shape("x", x, {args.m, args.k});
  check.shape("out", *out, {args.m, args.n});
  check.at_most("N", args.n, INT32_MAX);
  check.at_most("K", args.k, INT32_MAX / 2);
  args.bias = check.bias("bias", bias, {args.n});
  if (!check.ok()) return check.error();
  if (args.m * args.n * args.k == 0) return invalid("matmul of an empty array");
  args.x = x.untyped_data();
  args.out = out->untyped_data();
  return from_cuda(matmul(args, stream), "matmul");
}

// x [T, D], expert_ids s32 [T, k], expert_weights f32 [T, k],
// gate_up blocks u8 [E, 2I, D/32, 16], scales, bias [E, 2I] or [0],
// down blocks u8 [E, D, I/32, 16], scales, bias [E, D] or [0]
// -> out [T, D]; workspaces hidden [T k, I], partial f32 [T k, D], schedule s32
ffi::Error moe_impl(cudaStream_t stream, AnyBuffer x, AnyBuffer expert_ids,
                    AnyBuffer expert_weights, AnyBuffer gate_up_blocks, AnyBuffer gate_up_scales,
                    AnyBuffer gate_up_bias, AnyBuffer down_blocks, AnyBuffer down_scales,
                    AnyBuffer down_bias, ffi::Result<AnyBuffer> out, ffi::Result<AnyBuffer> hidden,
                    ffi::Result<AnyBuffer> partial, ffi::Result<AnyBuffer> schedule, float alpha,
                    float limit) {
  Checker check;
  MoeArgs args = {};
  args.gate_up = check.packed("gate_up ", gate_up_blocks, gate_up_scales);
  args.down = check.packed("down ", down_blocks, down_scales);
  check.rank("gate_up scales", gate_up_scales, 3);
  check.rank("down scales", down_scales, 3);
  check.rank("x", x, 2);
  check.rank("expert_ids", expert_ids, 2);
  check.type("expert_ids", expert_ids, ffi::S32, "s32");
  check.type("expert_weights", expert_weights, ffi::F32, "f32");
  check.type("partial", *partial, ffi::F32, "f32");
  check.type("schedule", *schedule, ffi::S32, "s32");
  args.x_type = check.floating("x", x);
  args.out_type = check.floating("out", *out);
  check.aligned("x", x);
  check.aligned("hidden", *hidden);
  if (!check.ok()) return check.error();
  args.tokens = x.dimensions()[0];
  args.d = x.dimensions()[1];
  args.top_k = expert_ids.dimensions()[1];
  args.experts = gate_up_scales.dimensions()[0];
  args.inner = gate_up_scales.dimensions()[1] / 2;
  const int64_t pairs = args.tokens * args.top_k;
  check.shape("gate_up scales", gate_up_scales, {args.experts, 2 * args.inner, args.d / 32});
  check.shape("down scales", down_scales, {args.experts, args.d, args.inner / 32});
  check.shape("expert_ids", expert_ids, {args.tokens, args.top_k});
  check.shape("expert_weights", expert_weights, {args.tokens, args.top_k});
  check.shape("out", *out, {args.tokens, args.d});
  check.shape("hidden", *hidden, {pairs, args.inner});
  check.type("hidden", *hidden, x.element_type(), "of x's type");
  check.shape("partial", *partial, {pairs, args.d});
  check.shape("schedule", *schedule, {moe_schedule_size(pairs, args.experts)});
  check.at_most("tokens * top_k", pairs, INT32_MAX / 8);
  check.at_most("experts", args.experts, 8192);  // one shared-memory counter each
  check.at_most("2I", 2 * args.inner, INT32_MAX / 2);
  check.at_most("D", args.d, INT32_MAX / 2);
  args.gate_up_bias = check.bias("gate_up_bias", gate_up_bias, {args.experts, 2 * args.inner});
  args.down_bias = check.bias("down_bias", down_bias, {args.experts, args.d});
  if (!check.ok()) return check.error();
  if (args.d % 32 || args.inner % 32) return invalid("D and I must be multiples of 32");
  if (pairs * args.d * args.inner * args.experts == 0) return invalid("moe of an empty array");
  args.x = x.untyped_data();
  args.expert_ids = expert_ids.typed_data<int32_t>();
  args.expert_weights = expert_weights.typed_data<float>();
  args.out = out->untyped_data();
  args.hidden = hidden->untyped_data();
  args.partial = partial->typed_data<float>();
  args.schedule = schedule->typed_data<int32_t>();
  args.alpha = alpha;
  args.limit = limit;
  return from_cuda(moe(args, stream), "moe");
}

using Stream = ffi::PlatformStream<cudaStream_t>;

XLA_FFI_DEFINE_HANDLER(kDequantize, dequantize_impl,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<AnyBuffer>()  // blocks
                           .Arg<AnyBuffer>()  // scales
                           .Ret<AnyBuffer>()  // out
                           .Attr<bool>("prepared"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kTake, take_impl,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<AnyBuffer>()  // blocks
                           .Arg<AnyBuffer>()  // scales
                           .Arg<AnyBuffer>()  // ids
                           .Ret<AnyBuffer>()  // out
                           .Attr<bool>("prepared"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kMatmul, matmul_impl,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<AnyBuffer>()   // x
                           .Arg<AnyBuffer>()   // blocks
                           .Arg<AnyBuffer>()   // scales
                           .Arg<AnyBuffer>()   // bias
                           .Ret<AnyBuffer>(),  // out
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kMoe, moe_impl,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<AnyBuffer>()  // x
                           .Arg<AnyBuffer>()  // expert_ids
                           .Arg<AnyBuffer>()  // expert_weights
                           .Arg<AnyBuffer>()  // gate_up blocks
                           .Arg<AnyBuffer>()  // gate_up scales
                           .Arg<AnyBuffer>()  // gate_up_bias
                           .Arg<AnyBuffer>()  // down blocks
                           .Arg<AnyBuffer>()  // down scales
                           .Arg<AnyBuffer>()  // down_bias
                           .Ret<AnyBuffer>()  // out
                           .Ret<AnyBuffer>()  // hidden
                           .Ret<AnyBuffer>()  // partial
                           .Ret<AnyBuffer>()  // schedule
                           .Attr<float>("alpha")
                           .Attr<float>("limit"),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

std::vector<NamedHandler> cuda_handlers() {
  return {
      {"jax_mxfp4_dequantize", reinterpret_cast<void*>(kDequantize)},
      {"jax_mxfp4_take", reinterpret_cast<void*>(kTake)},
      {"jax_mxfp4_matmul", reinterpret_cast<void*>(kMatmul)},
      {"jax_mxfp4_moe", reinterpret_cast<void*>(kMoe)},
  };
}

}  // namespace jax_mxfp4
