// The expert layer for one token; see moe_one_token.cu.
#pragma once

#include "kernels.h"

namespace jax_mxfp4 {

// With a configuration of kind kOneToken; `hidden`, `partial` and `schedule` stay unused.
cudaError_t launch_one_token_moe(int config, const MoeArgs& args, int multiprocessors,
                                 cudaStream_t stream);

}  // namespace jax_mxfp4
