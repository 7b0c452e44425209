"""Block rotations of a `Llama` that cost nothing at run time, because its weights absorb them.

Between two linear layers with nothing but a sum or a weighted mean of positions, a rotation R and
its inverse can be multiplied into both. In a `Llama` that is so

* from each head's values to the attention's output: ``v`` and ``out``;
* along the residual stream, once the scales of the norms have moved into the layers after them
  (the root mean square of x R is that of x): embedding, ``out`` and ``down`` write x R, and ``q``,
  ``k``, ``v``, ``gate``, ``up`` and the output layer read it.

Between ``up`` and ``down`` lies a product; `RotatedDense` can rotate there at run time.
Source: QuaRot (arXiv:2404.00456, section 4), with blocks of 32 in place of the whole width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from flax_layers import MXFP4Dense, MXFP4Embed
from jax_mxfp4.format import BLOCK_SIZE
from jax_mxfp4.models.llama import Llama
from jax_mxfp4.models.llama.modeling import Block, Norm
from jax_mxfp4.quantizers.hadamard import rotate


def fold_rotations(model: Llama) -> Llama:
    """Return a model that computes the same logits up to rounding, with rotated weights.

    Its norms have scales of one. Where the embedding was also the output layer, the two are now
    different matrices: the output layer carries the scale of the last norm.

    Args:
      model: a `Llama` without packed layers; it is not changed.

    Raises:
      ValueError: the width of the model or of a head is not a multiple of 32, or a layer is packed.
    """
    config = model.config
    for name in ("hidden_size", "head_dim"):
        if getattr(config, name) % BLOCK_SIZE:
            raise ValueError(
                f"{name}: expected a multiple of {BLOCK_SIZE}, found {getattr(config, name)}"
            )
    for path, module in nnx.iter_modules(model):
        if isinstance(module, MXFP4Dense | MXFP4Embed):
            name = ".".join(map(str, path))
            raise ValueError(f"{name}: expected a dense layer, found it packed")
    folded = nnx.clone(model)
    table = model.embedding.embedding.get_value()
    output = table.T if model.output is None else model.output.kernel.get_value()
    folded.embedding.embedding.set_value(rotate(table))
    folded.output = nnx.Linear(
        config.hidden_size,
        config.vocab_size,
        use_bias=False,
        dtype=model.embedding.dtype,
        param_dtype=table.dtype,
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=lambda *_: _rotate_rows(_scaled(output, model.norm)),
        rngs=nnx.Rngs(0),
    )
    _set_to_one(folded.norm)
    for block in folded.layers:
        _fold_block(block)
    return folded


def _fold_block(block: Block) -> None:
    attention, mlp = block.attention, block.mlp
    for norm, readers in (
        (block.attention_norm, (attention.q, attention.k, attention.v)),
        (block.mlp_norm, (mlp.gate, mlp.up)),
    ):
        for linear in readers:
            _update(linear, _rotate_rows(_scaled(linear.kernel.get_value(), norm)))
        _set_to_one(norm)
    for writer in (attention.out, mlp.down):
        _update(writer, rotate(writer.kernel.get_value()))
    # Heads are whole blocks, so that one head's values never mix with another's.
    _update(attention.v, rotate(attention.v.kernel.get_value()))
    _update(attention.out, _rotate_rows(attention.out.kernel.get_value()))


def _rotate_rows(kernel: jax.Array) -> jax.Array:
    """Rotate what a layer with this kernel [in, out] reads."""
    return rotate(kernel.T).T


def _scaled(kernel: jax.Array, norm: Norm) -> jax.Array:
    return kernel * norm.scale.get_value()[:, None]


def _set_to_one(norm: Norm) -> None:
    norm.scale.set_value(jnp.ones_like(norm.scale.get_value()))


def _update(linear: nnx.Linear, kernel: ArrayLike) -> None:
    linear.kernel.set_value(jnp.asarray(kernel, linear.kernel.dtype))
