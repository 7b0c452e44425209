// The handlers' names and addresses, free of XLA and CUDA headers.
#pragma once

#include <vector>

namespace jax_mxfp4 {

struct NamedHandler {
  const char* target;  // starts with jax_mxfp4_
  void* handler;       // XLA_FFI_Handler*
};

std::vector<NamedHandler> cuda_handlers();

}  // namespace jax_mxfp4
