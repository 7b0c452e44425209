#include "gemm_config.h"

namespace jax_mxfp4 {

int select_gemm_config(const GemmShape& shape) {
  if (shape.m <= 16) return 0;  // at most two token tiles; the second read of the weights hits L2
  if (shape.m <= 64) return 1;
  return 2;
}

}  // namespace jax_mxfp4
