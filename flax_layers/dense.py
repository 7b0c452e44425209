"""Linear layer with an MXFP4 weight."""

from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flax_layers.variables import (
    NO_METADATA,
    check_block_multiple,
    check_float_dtype,
    compute_dtype,
    metadata_of,
    pack,
    unpack,
)
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.ops import Implementation, matmul
from jax_mxfp4.quantize import ScaleRule

_default_kernel_init = nnx.initializers.lecun_normal()
_default_bias_init = nnx.initializers.zeros_init()


class MXFP4Dense(nnx.Module):
    """`nnx.Linear` with an MXFP4 weight: ``y = x @ weight.T + bias``.

    The constructor draws the kernel that `nnx.Linear` would draw from the same `rngs`, and packs
    it. The weight is two `MXFP4Weight` variables, `weight_blocks` uint8 [out, in/32, 16] and
    `weight_scales` uint8 [out, in/32], read together as the property `weight`; on CUDA the blocks
    are prepared (see `MXFP4Weight`). The bias is an `nnx.Param` and trains as usual; gradients also
    flow to the inputs.

    Products accumulate in float32, the bias is added in float32 and the sum is rounded once.
    `dot_general` and `promote_dtype` of `nnx.Linear` have no counterpart and are not accepted.

    Args:
      in_features: size of the last axis of the inputs, a multiple of 32.
      out_features: size of the last axis of the result.
      use_bias: whether to add a bias.
      dtype: of the computation and the result: float32, bfloat16 or float16. None promotes the
        dtypes of inputs and bias as `nnx.Linear` does; the packed weight takes no part, so without
        a bias the result has the dtype of the inputs.
      param_dtype: of the kernel before it is packed, and of the bias.
      precision: accepted as in `nnx.Linear` and always met: float32 inputs are multiplied in full
        float32.
      kernel_init: initializer of the kernel [in, out]. It may also return an `MXFP4Array` of shape
        (out, in) in either layout, which is stored unchanged but for being prepared on CUDA.
      bias_init: initializer of the bias [out].
      preferred_element_type: dtype of the result, if not that of the computation.
      rngs: `rngs.params()` is drawn for the kernel, then for the bias.
      kernel_metadata: as in `nnx.Linear`: `out_sharding` names the axes (in, out) and is
        translated to the packed arrays.
      bias_metadata: metadata of the bias.
      scale_rule: how block scales are chosen, see `jax_mxfp4.quantize`.
      implementation: "cuda", "reference" or None, see `jax_mxfp4.matmul`.

    Raises:
      TypeError: `dtype` or `preferred_element_type` is another type.
      ValueError: `in_features` is not a positive multiple of 32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: nnx.Initializer = _default_kernel_init,
        bias_init: nnx.Initializer = _default_bias_init,
        preferred_element_type: DTypeLike | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_rule: ScaleRule = "even",
        implementation: Implementation = None,
    ) -> None:
        """Draws and packs the weights; the class describes the arguments."""
        check_float_dtype("dtype", dtype)
        check_float_dtype("preferred_element_type", preferred_element_type)
        check_block_multiple("in_features", in_features)
        self.weight_blocks, self.weight_scales = pack(
            kernel_init(rngs.params(), (in_features, out_features), param_dtype),
            kernel_metadata,
            scale_rule,
            shape=(out_features, in_features),
            transpose=True,
        )
        self.bias: nnx.Param[jax.Array] | None
        if use_bias:
            bias = bias_init(rngs.params(), (out_features,), param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)
        else:
            self.bias = nnx.data(None)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.preferred_element_type = preferred_element_type
        self.implementation: Implementation = implementation

    @classmethod
    def from_packed(
        cls,
        weight: MXFP4Array,
        bias: jax.Array | None = None,
        *,
        dtype: DTypeLike | None = None,
        preferred_element_type: DTypeLike | None = None,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        implementation: Implementation = None,
    ) -> Self:
        """Builds the layer around packed weights.

        Canonical weights are not copied, except on CUDA, where the layer's are prepared.

        Args:
          weight: packed [..., out, in]; leading axes are a stack of layers, as made by `nnx.vmap`.
            The leaves may be `jax.ShapeDtypeStruct`.
          bias: [..., out], or None for a layer without one.
          dtype: see the constructor, as for all other arguments.
          preferred_element_type: see the constructor.
          kernel_metadata: see the constructor.
          bias_metadata: see the constructor.
          implementation: see the constructor.

        Raises:
          ValueError: the weight has fewer than two axes, or the bias does not fit it.
        """
        if weight.ndim < 2:
            raise ValueError(f"weight must have shape [..., out, in], got {weight.shape}")
        if bias is not None and bias.shape != weight.shape[:-1]:
            raise ValueError(
                f"bias must have shape {weight.shape[:-1]} to match weight {weight.shape}, "
                f"got {bias.shape}"
            )
        return cls(
            weight.shape[-1],
            weight.shape[-2],
            use_bias=bias is not None,
            dtype=dtype,
            param_dtype=jnp.float32 if bias is None else bias.dtype,
            kernel_init=lambda *_: weight,
            bias_init=lambda *_: bias,
            preferred_element_type=preferred_element_type,
            rngs=nnx.Rngs(0),
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            implementation=implementation,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        *,
        scale_rule: ScaleRule = "even",
        dtype: DTypeLike | None = None,
        implementation: Implementation = None,
    ) -> Self:
        """Packs the kernel of an `nnx.Linear`, which is left as it is.

        A stack of layers (kernel [..., in, out]) and an abstract one (`nnx.eval_shape`) give the
        same of the packed layer. The bias is a new `nnx.Param` on the same array; metadata is
        kept.

        Args:
          linear: the layer to pack; float32, bfloat16 or float16.
          scale_rule: how block scales are chosen, see `jax_mxfp4.quantize`.
          dtype: of the computation; None keeps that of `linear`.
          implementation: "cuda", "reference" or None, see `jax_mxfp4.matmul`.

        Raises:
          ValueError: `in_features` is not a positive multiple of 32.
        """
        bias = linear.bias
        return cls(
            linear.in_features,
            linear.out_features,
            use_bias=bias is not None,
            dtype=linear.dtype if dtype is None else dtype,
            param_dtype=linear.param_dtype,
            precision=linear.precision,
            kernel_init=lambda *_: linear.kernel.get_value(),
            bias_init=lambda *_: bias.get_value() if bias is not None else None,
            preferred_element_type=linear.preferred_element_type,
            rngs=nnx.Rngs(0),
            kernel_metadata=metadata_of(linear.kernel),
            bias_metadata=NO_METADATA if bias is None else metadata_of(bias),
            scale_rule=scale_rule,
            implementation=implementation,
        )

    @property
    def weight(self) -> MXFP4Array:
        """The packed weight [out, in]."""
        return unpack(self.weight_blocks, self.weight_scales)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer to the last axis.

        Args:
          inputs: [..., in_features]; cast to the computation dtype.

        Returns:
          [..., out_features], of `preferred_element_type` or else the computation dtype.
        """
        bias = None if self.bias is None else self.bias[...]
        dtype = compute_dtype(self.dtype, inputs, bias)
        return matmul(
            jnp.asarray(inputs, dtype),
            self.weight,
            bias=bias,
            out_dtype=dtype if self.preferred_element_type is None else self.preferred_element_type,
            implementation=self.implementation,
        )
