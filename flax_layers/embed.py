"""Embedding table with MXFP4 rows."""

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
    metadata_of,
    pack,
    unpack,
)
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.ops import Implementation, matmul, take
from jax_mxfp4.quantize import ScaleRule

_default_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class MXFP4Embed(nnx.Module):
    """`nnx.Embed` with an MXFP4 table.

    The constructor draws the table that `nnx.Embed` would draw from the same `rngs`, and packs it
    along `features`. The table is two `MXFP4Weight` variables, `embedding_blocks` uint8
    [num_embeddings, features/32, 16] and `embedding_scales` uint8 [num_embeddings, features/32],
    read together as the property `embedding`; on CUDA the blocks are prepared (see `MXFP4Weight`).
    `promote_dtype` of `nnx.Embed` has no counterpart and is not accepted.

    Args:
      num_embeddings: number of rows.
      features: size of a row, a multiple of 32.
      dtype: of the result: float32, bfloat16 or float16; None is `param_dtype`, as in `nnx.Embed`.
      param_dtype: of the table before it is packed.
      embedding_init: initializer of the table [num_embeddings, features]. It may also return an
        `MXFP4Array` of that shape in either layout, which is stored unchanged but for being
        prepared on CUDA.
      rngs: `rngs.params()` is drawn for the table.
      embedding_metadata: metadata of the table; `out_sharding` names the axes (num_embeddings,
        features) and is translated to the packed arrays.
      scale_rule: how block scales are chosen, see `jax_mxfp4.quantize`.
      implementation: "cuda", "reference" or None, see `jax_mxfp4.take` and `jax_mxfp4.matmul`.

    Raises:
      TypeError: `dtype` is another type.
      ValueError: `features` is not a positive multiple of 32.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        embedding_init: nnx.Initializer = _default_init,
        rngs: nnx.Rngs,
        embedding_metadata: Mapping[str, Any] = NO_METADATA,
        scale_rule: ScaleRule = "even",
        implementation: Implementation = None,
    ) -> None:
        """Draws and packs the weights; the class describes the arguments."""
        check_float_dtype("dtype", dtype)
        check_block_multiple("features", features)
        self.embedding_blocks, self.embedding_scales = pack(
            embedding_init(rngs.params(), (num_embeddings, features), param_dtype),
            embedding_metadata,
            scale_rule,
            shape=(num_embeddings, features),
            transpose=False,
        )
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self.param_dtype = param_dtype
        self.implementation: Implementation = implementation

    @classmethod
    def from_packed(
        cls,
        embedding: MXFP4Array,
        *,
        dtype: DTypeLike = jnp.float32,
        embedding_metadata: Mapping[str, Any] = NO_METADATA,
        implementation: Implementation = None,
    ) -> Self:
        """Builds the layer around a packed table.

        A canonical table is not copied, except on CUDA, where the layer's is prepared.

        Args:
          embedding: packed [..., num_embeddings, features]; leading axes are a stack of layers.
            The leaves may be `jax.ShapeDtypeStruct`.
          dtype: see the constructor, as for all other arguments.
          embedding_metadata: see the constructor.
          implementation: see the constructor.

        Raises:
          ValueError: the table has fewer than two axes.
        """
        if embedding.ndim < 2:
            raise ValueError(
                f"embedding must have shape [..., num_embeddings, features], got {embedding.shape}"
            )
        return cls(
            embedding.shape[-2],
            embedding.shape[-1],
            dtype=dtype,
            embedding_init=lambda *_: embedding,
            rngs=nnx.Rngs(0),
            embedding_metadata=embedding_metadata,
            implementation=implementation,
        )

    @classmethod
    def from_embed(
        cls,
        embed: nnx.Embed,
        *,
        scale_rule: ScaleRule = "even",
        dtype: DTypeLike | None = None,
        implementation: Implementation = None,
    ) -> Self:
        """Packs the table of an `nnx.Embed`, which is left as it is; metadata is kept.

        Args:
          embed: the layer to pack, possibly abstract; float32, bfloat16 or float16.
          scale_rule: how block scales are chosen, see `jax_mxfp4.quantize`.
          dtype: of the result; None keeps that of `embed`.
          implementation: "cuda", "reference" or None.

        Raises:
          ValueError: `features` is not a positive multiple of 32.
        """
        return cls(
            embed.num_embeddings,
            embed.features,
            dtype=embed.dtype if dtype is None else dtype,
            param_dtype=embed.param_dtype,
            embedding_init=lambda *_: embed.embedding.get_value(),
            rngs=nnx.Rngs(0),
            embedding_metadata=metadata_of(embed.embedding),
            scale_rule=scale_rule,
            implementation=implementation,
        )

    @property
    def embedding(self) -> MXFP4Array:
        """The packed table [num_embeddings, features]."""
        return unpack(self.embedding_blocks, self.embedding_scales)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Looks up rows.

        Args:
          inputs: integer ids of any shape. -num_embeddings..-1 count from the end and any other id
            outside the table gives NaN, except that a table of one row answers every id with that
            row: both as `nnx.Embed` does.

        Returns:
          `dtype` inputs.shape + [features].

        Raises:
          ValueError: `inputs` is not of an integer dtype.
        """
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"inputs must be of an integer dtype, got {inputs.dtype}")
        if self.num_embeddings == 1:
            inputs = jnp.zeros_like(inputs)
        return take(self.embedding, inputs, dtype=self.dtype, implementation=self.implementation)

    def attend(self, query: jax.Array) -> jax.Array:
        """Multiplies queries by every row, the logits of a tied output layer.

        Args:
          query: [..., features]; cast to `dtype`.

        Returns:
          `dtype` [..., num_embeddings].
        """
        return matmul(
            jnp.asarray(query, self.dtype), self.embedding, implementation=self.implementation
        )
