"""Linen linear layer with an MXFP4 weight; import this module by itself."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flax_layers.variables import (
    check_block_multiple,
    check_float_dtype,
    compute_dtype,
    from_leaves,
    to_leaves,
)
from jax_mxfp4.ops import Implementation, matmul, prepare_on_cuda
from jax_mxfp4.quantize import ScaleRule, quantize


class MXFP4Dense(nn.Module):
    """`flax.linen.Dense` with an MXFP4 weight.

    The collection "mxfp4" holds `weight_blocks` uint8 [features, in/32, 16] and `weight_scales`
    uint8 [features, in/32]; "params" holds the bias only, so optimizers of the parameters leave
    the weight alone. On CUDA `init` makes prepared blocks, uint8 [features, in/32, 4, 4]; by that
    shape the layer knows the layout of what it is given, and `flax_layers.with_layout` converts
    variables. The meaning of the attributes and the arithmetic are those of the NNX layer
    `flax_layers.MXFP4Dense`.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    scale_rule: ScaleRule = "even"
    implementation: Implementation = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer to the last axis.

        Args:
          inputs: [..., in]; `in` must be a multiple of 32.

        Returns:
          [..., features] of the computation dtype.

        Raises:
          TypeError: `dtype` is not float32, bfloat16 or float16.
          ValueError: `in` is not a positive multiple of 32.
        """
        in_features = inputs.shape[-1]
        check_float_dtype("dtype", self.dtype)
        check_block_multiple("the last axis of inputs", in_features)
        blocks = scales = None
        if self.is_initializing():
            shape = (in_features, self.features)
            kernel = self.kernel_init(self.make_rng("params"), shape, self.param_dtype)
            packed = quantize(kernel.T, self.scale_rule)
            blocks, scales = to_leaves(prepare_on_cuda(packed, donate=True))
        weight = from_leaves(
            self.variable("mxfp4", "weight_blocks", lambda: blocks).value,
            self.variable("mxfp4", "weight_scales", lambda: scales).value,
        )
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        dtype = compute_dtype(self.dtype, inputs, bias)
        return matmul(
            jnp.asarray(inputs, dtype),
            weight,
            bias=bias,
            implementation=self.implementation,
        )
