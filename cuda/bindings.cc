// The Python module jax_mxfp4._native: what was built, the FFI handlers, and the kernel choice for
// tests and benchmarks. It imports and answers on a machine without a GPU or driver.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "ffi.h"
#include "gemm_config.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace {

nb::dict registrations() {
  nb::dict targets;
#ifdef JAX_MXFP4_HAS_CUDA
  for (const jax_mxfp4::NamedHandler& handler : jax_mxfp4::cuda_handlers())
    targets[handler.target] = nb::capsule(handler.handler);
#endif
  return targets;
}

const char* name_of(jax_mxfp4::GemmKind kind) {
  switch (kind) {
    case jax_mxfp4::GemmKind::kStreaming:
      return "streaming";
    case jax_mxfp4::GemmKind::kWgmma:
      return "wgmma";
    case jax_mxfp4::GemmKind::kOneToken:
      return "one_token";
    default:
      return "tiled";
  }
}

nb::dict describe(int index, int split) {
  const jax_mxfp4::GemmConfig& config = jax_mxfp4::kGemmConfigs[index];
  nb::dict result;
  result["index"] = index;
  result["kind"] = name_of(config.kind);
  result["tile_m"] = config.tile_m;
  result["tile_n"] = config.tile_n();
  result["stage_k"] = 128 * config.stage_chunks();
  result["warps_k"] = config.warps_k;
  result["stages"] = config.stages;
  result["split"] = split;
  return result;
}

nb::dict select_gemm(int64_t m, int64_t n, int64_t k, int streaming_multiprocessors,
                     int wgmma_multiprocessors) {
  const jax_mxfp4::GemmChoice choice =
      jax_mxfp4::select_gemm({m, n, k, streaming_multiprocessors, wgmma_multiprocessors});
  return describe(choice.config, choice.split);
}

nb::dict select_moe(int64_t tokens, int64_t top_k, int64_t experts, int64_t d, int64_t inner,
                    int streaming_multiprocessors, int wgmma_multiprocessors) {
  return describe(jax_mxfp4::select_moe({tokens, top_k, experts, d, inner,
                                         streaming_multiprocessors, wgmma_multiprocessors}),
                  1);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native part of jax_mxfp4: XLA FFI handlers and facts about the build.";
  m.def("registrations", &registrations, "CUDA FFI handlers by target name; empty without CUDA.");
  m.def(
      "xla_ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "(major, minor) of the XLA FFI headers that the handlers were compiled against.");
  m.def(
      "has_cuda",
      [] {
#ifdef JAX_MXFP4_HAS_CUDA
        return true;
#else
        return false;
#endif
      },
      "Whether CUDA kernels were compiled in.");
  m.def(
      "cuda_version", [] { return JAX_MXFP4_CUDA_VERSION; },
      "CUDA runtime version compiled in, as 1000 * major + 10 * minor; 0 without CUDA.");
  m.def(
      "cuda_architectures", [] { return std::string(JAX_MXFP4_CUDA_ARCHITECTURES); },
      "CMAKE_CUDA_ARCHITECTURES of the build; empty without CUDA.");
  m.def("select_gemm", &select_gemm, nb::arg("m"), nb::arg("n"), nb::arg("k"),
        nb::arg("streaming_multiprocessors"), nb::arg("wgmma_multiprocessors"),
        "The compiled configuration that serves y[m, n] = x[m, k] w[n, k]^T.");
  m.def("select_moe", &select_moe, nb::arg("tokens"), nb::arg("top_k"), nb::arg("experts"),
        nb::arg("d"), nb::arg("inner"), nb::arg("streaming_multiprocessors"),
        nb::arg("wgmma_multiprocessors"),
        "The compiled configuration that serves both products of an expert layer.");
}
