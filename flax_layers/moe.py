"""Mixture of experts with MXFP4 weights, as in GPT-OSS."""

from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flax_layers.variables import (
    NO_METADATA,
    MXFP4Weight,
    check_block_multiple,
    check_float_dtype,
    compute_dtype,
    pack,
    unpack,
)
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.ops import Implementation, moe
from jax_mxfp4.quantize import ScaleRule

_default_router_init = nnx.initializers.lecun_normal()
_default_bias_init = nnx.initializers.zeros_init()
# The expert axis is not part of the fan-in.
_default_kernel_init = nnx.initializers.lecun_normal(batch_axis=0)


class MXFP4MoE(nnx.Module):
    """The GPT-OSS expert layer: router, top-k, clamped SwiGLU experts, weighted sum.

    ``expert_weights, expert_ids = top_k(router(x))``, a softmax over those k logits, then
    `jax_mxfp4.moe`. The router is an `nnx.Linear` and stays unpacked, as in the released
    checkpoints; its product uses full precision in float32, and top-k and softmax are float32 in
    every dtype. Experts are `MXFP4Weight` variables: `gate_up_blocks` uint8 [E, 2I, D/32, 16] and
    `gate_up_scales` uint8 [E, 2I, D/32] (row 2i is a gate, row 2i + 1 its linear partner),
    `down_blocks` uint8 [E, D, I/32, 16] and `down_scales` uint8 [E, D, I/32]; the properties
    `gate_up` and `down` read them. On CUDA the blocks are prepared (see `MXFP4Weight`). Biases are
    `nnx.Param`.

    Args:
      num_experts: E.
      features: D, size of the last axis of inputs and result, a multiple of 32.
      intermediate_features: I, width of an expert, a multiple of 32.
      num_experts_per_token: k, the experts that each token is sent to.
      use_bias: whether router and experts have biases.
      dtype: of the computation and the result: float32, bfloat16 or float16. None promotes the
        dtypes of inputs and expert biases.
      param_dtype: of the router, the biases, and the experts before they are packed.
      router_init: initializer of the router kernel [D, E].
      kernel_init: initializer of the expert kernels [E, D, 2I] and [E, I, D]. It may also return
        an `MXFP4Array` of shape (E, 2I, D) or (E, D, I) in either layout, which is stored unchanged
        but for being prepared on CUDA.
      bias_init: initializer of all biases.
      alpha: slope inside the sigmoid of the activation.
      limit: clamp of the activation's inputs.
      rngs: `rngs.params()` is drawn for the router, gate_up, its bias, down, and its bias.
      gate_up_metadata: metadata of gate_up; `out_sharding` names the axes (E, D, 2I) and is
        translated to the packed arrays.
      down_metadata: the same for down, with the axes (E, I, D).
      scale_rule: how block scales are chosen, see `jax_mxfp4.quantize`.
      implementation: "cuda", "reference" or None, see `jax_mxfp4.moe`.

    Raises:
      TypeError: `dtype` is another type.
      ValueError: a size is not a multiple of 32, or k is not in 1..E.
    """

    def __init__(
        self,
        num_experts: int,
        features: int,
        intermediate_features: int,
        num_experts_per_token: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        router_init: nnx.Initializer = _default_router_init,
        kernel_init: nnx.Initializer = _default_kernel_init,
        bias_init: nnx.Initializer = _default_bias_init,
        alpha: float = 1.702,
        limit: float = 7.0,
        rngs: nnx.Rngs,
        gate_up_metadata: Mapping[str, Any] = NO_METADATA,
        down_metadata: Mapping[str, Any] = NO_METADATA,
        scale_rule: ScaleRule = "even",
        implementation: Implementation = None,
    ) -> None:
        """Draws and packs the weights; the class describes the arguments."""
        check_float_dtype("dtype", dtype)
        check_block_multiple("features", features)
        check_block_multiple("intermediate_features", intermediate_features)
        if not 1 <= num_experts_per_token <= num_experts:
            raise ValueError(
                f"num_experts_per_token must be in 1..num_experts ({num_experts}), "
                f"got {num_experts_per_token}"
            )
        self.router = nnx.Linear(
            features,
            num_experts,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=router_init,
            bias_init=bias_init,
            rngs=rngs,
        )

        def weight(in_size: int, out_size: int, metadata: Mapping[str, Any]) -> Any:
            kernel = kernel_init(rngs.params(), (num_experts, in_size, out_size), param_dtype)
            shape = (num_experts, out_size, in_size)
            return pack(kernel, metadata, scale_rule, shape=shape, transpose=True)

        def bias(size: int) -> nnx.Param[jax.Array] | None:
            if not use_bias:
                return nnx.data(None)
            return nnx.Param(bias_init(rngs.params(), (num_experts, size), param_dtype))

        self.gate_up_blocks: MXFP4Weight
        self.gate_up_scales: MXFP4Weight
        self.down_blocks: MXFP4Weight
        self.down_scales: MXFP4Weight
        gate_up_size = 2 * intermediate_features
        self.gate_up_blocks, self.gate_up_scales = weight(features, gate_up_size, gate_up_metadata)
        self.gate_up_bias = bias(gate_up_size)
        self.down_blocks, self.down_scales = weight(intermediate_features, features, down_metadata)
        self.down_bias = bias(features)
        self.num_experts = num_experts
        self.features = features
        self.intermediate_features = intermediate_features
        self.num_experts_per_token = num_experts_per_token
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.alpha = alpha
        self.limit = limit
        self.implementation: Implementation = implementation

    @classmethod
    def from_packed(
        cls,
        router: nnx.Linear,
        gate_up: MXFP4Array,
        down: MXFP4Array,
        gate_up_bias: jax.Array | None = None,
        down_bias: jax.Array | None = None,
        *,
        num_experts_per_token: int,
        dtype: DTypeLike | None = None,
        alpha: float = 1.702,
        limit: float = 7.0,
        implementation: Implementation = None,
    ) -> Self:
        """Builds the layer around packed experts.

        Canonical experts are not copied, except on CUDA, where the layer's are prepared.

        Args:
          router: the module that gives the logits [..., E] of inputs [..., D]; it becomes a part
            of this layer.
          gate_up: packed [E, 2I, D]; row 2i is a gate, row 2i + 1 its linear partner.
          down: packed [E, D, I].
          gate_up_bias: [E, 2I], or None.
          down_bias: [E, D], or None.
          num_experts_per_token: see the constructor, as for all other arguments.
          dtype: see the constructor.
          alpha: see the constructor.
          limit: see the constructor.
          implementation: see the constructor.

        Raises:
          ValueError: the shapes do not belong together, or only one of the biases is given.
        """
        if gate_up.ndim != 3 or gate_up.shape[1] % 2:
            raise ValueError(f"gate_up must have shape [E, 2I, D], got {gate_up.shape}")
        experts, gate_up_size, features = gate_up.shape
        expected = {
            "router.kernel": (router.kernel.shape, (features, experts)),
            "down": (down.shape, (experts, features, gate_up_size // 2)),
        }
        if (gate_up_bias is None) != (down_bias is None):
            raise ValueError("gate_up_bias and down_bias must both be given or both be None")
        if gate_up_bias is not None and down_bias is not None:
            expected["gate_up_bias"] = (gate_up_bias.shape, (experts, gate_up_size))
            expected["down_bias"] = (down_bias.shape, (experts, features))
        for name, (found, wanted) in expected.items():
            if tuple(found) != wanted:
                raise ValueError(
                    f"{name} must have shape {wanted} to match gate_up {gate_up.shape}, got {found}"
                )
        kernels = iter((gate_up, down))
        layer = cls(
            experts,
            features,
            gate_up_size // 2,
            num_experts_per_token,
            use_bias=False,
            dtype=dtype,
            param_dtype=router.param_dtype,
            router_init=lambda *_: router.kernel.get_value(),
            kernel_init=lambda *_: next(kernels),
            alpha=alpha,
            limit=limit,
            rngs=nnx.Rngs(0),
            implementation=implementation,
        )
        layer.router = router
        if gate_up_bias is not None and down_bias is not None:
            layer.use_bias = True
            layer.gate_up_bias = nnx.Param(gate_up_bias)
            layer.down_bias = nnx.Param(down_bias)
        return layer

    @property
    def gate_up(self) -> MXFP4Array:
        """The packed first projections [E, 2I, D]."""
        return unpack(self.gate_up_blocks, self.gate_up_scales)

    @property
    def down(self) -> MXFP4Array:
        """The packed second projections [E, D, I]."""
        return unpack(self.down_blocks, self.down_scales)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Sends each token to its experts.

        Args:
          inputs: [..., T, features] or [features]; cast to the computation dtype.

        Returns:
          Computation dtype, the shape of `inputs`.
        """
        gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias[...]
        down_bias = None if self.down_bias is None else self.down_bias[...]
        dtype = compute_dtype(self.dtype, inputs, gate_up_bias, down_bias)
        x = jnp.atleast_2d(jnp.asarray(inputs, dtype))
        logits, expert_ids = jax.lax.top_k(
            self.router(x).astype(jnp.float32), self.num_experts_per_token
        )
        y = moe(
            x,
            expert_ids,
            jax.nn.softmax(logits, axis=-1),
            self.gate_up,
            gate_up_bias,
            self.down,
            down_bias,
            alpha=self.alpha,
            limit=self.limit,
            implementation=self.implementation,
        )
        return y.reshape(inputs.shape)
