"""`Llama`: a decoder-only transformer from ordinary Flax NNX layers.

Every linear layer is an `nnx.Linear`, so that `flax_layers.quantize_model` can pack any of them::

    model = Llama.from_gguf(path)
    packed, report = quantize_model(model, r"layers\\..*")     # all linear layers
    logits = packed(tokens)

A block is written as the steps between its linear layers, because calibration needs what arrives
at each of them (see `jax_mxfp4.quantizers.llama`).
"""

from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jax_mxfp4.models.gpt_oss.attention import attend_causal
from jax_mxfp4.models.gpt_oss.layers import rms_norm, rope
from jax_mxfp4.models.llama.config import LlamaConfig


class Norm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, computed in float32.

    `nnx.RMSNorm` does the same, but not under strict dtype promotion.

    Attributes:
      scale: [D].
    """

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike) -> None:
        """Makes a scale of ones."""
        self.scale = nnx.Param(jnp.ones(config.hidden_size, dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [..., D]."""
        return rms_norm(x, self.scale.get_value(), self.eps)


class Attention(nnx.Module):
    """Causal attention with grouped query heads and rotary positions.

    Attributes:
      q: D -> heads x head_dim; k and v: D -> kv heads x head_dim; out: heads x head_dim -> D.
    """

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Draws the weights."""
        self.config = config
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q = _linear(config.hidden_size, width, dtype, rngs)
        self.k = _linear(config.hidden_size, kv_width, dtype, rngs)
        self.v = _linear(config.hidden_size, kv_width, dtype, rngs)
        self.out = _linear(width, config.hidden_size, dtype, rngs)

    def mix(self, x: jax.Array) -> jax.Array:
        """Returns what arrives at `out`, [B, T, heads x head_dim], for normed x [B, T, D]."""
        q, k, v = (
            part(x).reshape(*x.shape[:2], -1, self.config.head_dim)
            for part in (self.q, self.k, self.v)
        )
        rotation = _rotations(x.shape[1], self.config)
        q, k = rope(q, rotation), rope(k, rotation)
        mixed = attend_causal(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)).out
        return mixed.reshape(*x.shape[:2], -1).astype(x.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends; x and the result are [B, T, D]."""
        return self.out(self.mix(x))


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``, the SwiGLU block of arXiv:2002.05202.

    Attributes:
      gate, up: D -> I; down: I -> D.
    """

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Draws the weights."""
        self.gate = _linear(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.up = _linear(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.down = _linear(config.intermediate_size, config.hidden_size, dtype, rngs)

    def activate(self, x: jax.Array) -> jax.Array:
        """Returns what arrives at `down`, [..., I], for normed x [..., D]."""
        return jax.nn.silu(self.gate(x)) * self.up(x)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block; x and the result are [..., D]."""
        return self.down(self.activate(x))


class Block(nnx.Module):
    """One transformer block: attention and feed-forward, each with a norm before it."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Draws the weights."""
        self.attention_norm = Norm(config, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = Norm(config, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block; x and the result are [B, T, D]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """A Llama model as an NNX module.

    Attributes:
      config: hyperparameters.
      embedding: V -> D.
      layers: the blocks.
      norm: after the last block.
      output: D -> V, or None where the embedding is used for it too.

    Args:
      config: hyperparameters.
      dtype: of the parameters and of the computation: float32, bfloat16 or float16. In float32
        every product is in full float32.
      rngs: for random weights.
    """

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        """Draws random weights."""
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List(
            [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = Norm(config, dtype=dtype)
        self.output: nnx.Linear | None = nnx.data(None)
        if not config.tie_embeddings:
            self.output = _linear(config.hidden_size, config.vocab_size, dtype, rngs)

    @classmethod
    def from_gguf(cls, path: str | Path, dtype: DTypeLike = jnp.float32) -> Self:
        """Loads a GGUF file of architecture `llama`; quantized tensors are decoded to `dtype`.

        Args:
          path: file `*.gguf`.
          dtype: float32, bfloat16 or float16.

        Raises:
          CheckpointError: a ValueError that names every problem with the file.
        """
        from jax_mxfp4.models.llama.loading import load_gguf

        return load_gguf(cls, Path(path), dtype)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: DTypeLike = jnp.float32) -> Self:
        """Loads a folder in Hugging Face's layout, `model_type` llama.

        Linear layers that compressed-tensors has packed as MXFP4 (see
        `jax_mxfp4.checkpoints.WeightsFolder`) become `MXFP4Dense`.

        Args:
          path: folder with config.json and safetensors files.
          dtype: of what is not packed: float32, bfloat16 or float16.

        Raises:
          CheckpointError: a ValueError that names every problem with the folder.
        """
        from jax_mxfp4.models.llama.loading import load_folder

        return load_folder(cls, Path(path), dtype)

    def __call__(self, tokens: ArrayLike) -> jax.Array:
        """Returns the logits that follow each token; compiled for each shape of `tokens`.

        Args:
          tokens: integers [B, T], each in [0, V); others give NaN or count from the end, as in
            `jnp.take`.

        Returns:
          float32 [B, T, V].

        Raises:
          TypeError: tokens are no integers.
          ValueError: tokens are not [B, T], empty, or longer than the model supports.
        """
        shape = np.shape(tokens)
        limit = self.config.max_position_embeddings
        if len(shape) != 2 or 0 in shape or shape[1] > limit:
            raise ValueError(
                f"tokens: expected [B, T], not empty, with T up to {limit}, found {list(shape)}"
            )
        array = jnp.asarray(tokens)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"tokens: expected integers, found {array.dtype}")
        return _forward(self, array.astype(jnp.int32))

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns float32 [..., V] for the last block's result x [..., D]."""
        x = self.norm(x)
        # Without it float32 means TF32 on GPUs with tensor cores.
        with jax.default_matmul_precision("highest"):
            logits = self.embedding.attend(x) if self.output is None else self.output(x)
        return logits.astype(jnp.float32)


@nnx.jit
def _forward(model: Llama, tokens: jax.Array) -> jax.Array:
    x = model.embedding(tokens)
    for block in model.layers:
        x = block(x)
    return model.logits(x)


def _rotations(length: int, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of positions 0 to T - 1, float32 [1, T, head_dim / 2].

    Dimension i of a half turns by ``theta ** (-i / half)`` per position.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    positions = jnp.arange(length, dtype=jnp.float32)[None, :, None]
    angles = positions * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def _linear(inputs: int, outputs: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=dtype,
        param_dtype=dtype,
        precision=jax.lax.Precision.HIGHEST,
        rngs=rngs,
    )
