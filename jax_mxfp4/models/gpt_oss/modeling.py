"""`GptOss`: a GPT-OSS model as a pytree that can be called."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jax_mxfp4 import ops
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import Placement, Progress
from jax_mxfp4.format import BLOCK_SIZE
from jax_mxfp4.models.gpt_oss import forward
from jax_mxfp4.models.gpt_oss.cache import KVCache, context_size, init_cache
from jax_mxfp4.models.gpt_oss.config import GptOssConfig
from jax_mxfp4.models.gpt_oss.config_json import read_config
from jax_mxfp4.models.gpt_oss.kv_formats import CacheFormat
from jax_mxfp4.models.gpt_oss.packing import DensePart, check_parts, pack_dense
from jax_mxfp4.models.gpt_oss.params import Params, load_params
from jax_mxfp4.ops import Implementation

_STATIC = ("config", "implementation")


@partial(jax.jit, static_argnames=_STATIC)
def _logits(
    params: Params, tokens: jax.Array, router_indices: list[jax.Array] | None, **static: Any
) -> jax.Array:
    return forward.full_forward(params, tokens, router_indices, **static)[0]


_logits_and_captures = jax.jit(forward.full_forward, static_argnames=_STATIC)
_prefill = jax.jit(
    forward.prefill, static_argnames=(*_STATIC, "context"), donate_argnames=("cache", "logits")
)
_decode_step = jax.jit(forward.decode_step, static_argnames=_STATIC, donate_argnames="cache")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class GptOss:
    """A GPT-OSS model: parameters, and the functions that need them.

    It is a pytree, so that it can be an argument of transformed functions::

        model = GptOss.from_pretrained(folder)
        logits = model(tokens)                                     # compiled already
        logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
        logits = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)

    Pass the model as an argument, as above. `jax.jit(model)` is valid too, but the parameters are
    then constants of the compiled program, which for a large model costs their size once more.

    Attributes:
      params: the weights; their dtype is the dtype that the model computes in.
      config: hyperparameters.
      implementation: of the packed operations: "cuda", "reference", or None to go by platform.
    """

    params: Params
    config: GptOssConfig = field(metadata={"static": True})
    implementation: Implementation = field(default=None, metadata={"static": True})

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: DTypeLike = jnp.bfloat16,
        implementation: Implementation = None,
        *,
        sharding: Placement = None,
        pack: Collection[DensePart] = (),
        progress: Progress | None = None,
    ) -> "GptOss":
        """Load a checkpoint in Hugging Face's or OpenAI's layout, or a GGUF file.

        The experts stay packed as they are stored, on CUDA in the layout that the kernels read
        (`jax_mxfp4.prepare`); everything else is converted to `dtype`.

        Args:
          path: folder with config.json and safetensors files, or a file `*.gguf`.
          dtype: float32, bfloat16 or float16. In float32 every product is in full float32.
          implementation: see the class.
          sharding: the `jax.Device` or `jax.sharding.Sharding` of all parameters, or a function
            (canonical name, logical shape) -> one of these; see `checkpoints.Placement`. By default
            JAX's default device.
          pack: which matrices that are stored unpacked to round to MXFP4 once they are loaded, of
            "attention", "embedding" and "unembedding". Unlike everything else about loading, this
            changes what the model computes.
          progress: called after each parameter with (name, bytes read so far, bytes of all).

        Raises:
          CheckpointError: a ValueError that names every problem with the files of `path`.
          TypeError: `sharding` is something else.
          ValueError: `dtype`, `implementation` or a part in `pack` is unknown, or `sharding` does
            not fit.
          RuntimeError: `implementation` is "cuda" and cannot be had.
        """
        if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, found {dtype}")
        # Whether the implementation can be had is better known before the weights are loaded.
        row = MXFP4Array.shape_dtype((BLOCK_SIZE,))
        jax.eval_shape(partial(ops.dequantize, implementation=implementation), row)
        check_parts(pack)
        config = read_config(path)
        params = load_params(path, config, dtype, progress, sharding)
        return cls(pack_dense(params, pack), config, implementation)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of hidden states and of the key-value cache."""
        return self.params.norm.dtype

    def __call__(self, tokens: ArrayLike) -> jax.Array:
        """Return the logits that follow each token.

        Args:
          tokens: integers [B, T], each in [0, V). In a traced function they cannot be checked:
            an id outside [-V, V) then makes the logits at its place NaN, and any others of its
            sequence may be NaN too; a negative one counts from the end of the vocabulary.

        Returns:
          float32 [B, T, V].

        Raises:
          TypeError: tokens are no integers.
          ValueError: tokens are not [B, T], empty, or outside [0, V).
        """
        return _logits(self.params, self._tokens(tokens, 2), None, **self._static())

    def forward(
        self,
        tokens: ArrayLike,
        *,
        router_indices: Sequence[ArrayLike] | None = None,
        capture: bool = False,
    ) -> jax.Array | tuple[jax.Array, forward.Captures]:
        """Return the logits as `__call__` does, with a view into the layers.

        Args:
          tokens: integers [B, T].
          router_indices: for each layer the experts that each token uses, integers [B, T, k] or
            [B * T, k]; their weights are still the router's. None: the routers choose.
          capture: also return, for each layer, a dictionary of `attn_out`, `router_logits`,
            `router_indices`, `router_weights`, `mlp_out` and `hidden` (the block's result), with
            leading dimensions [B, T].

        Returns:
          float32 [B, T, V], or (that, captures).

        Raises:
          TypeError, ValueError: as `__call__`, and where router_indices do not fit.
        """
        ids = self._tokens(tokens, 2)
        forced = None if router_indices is None else self._router_indices(router_indices, ids)
        compiled = _logits_and_captures if capture else _logits
        return compiled(self.params, ids, forced, **self._static())

    def init_cache(self, batch: int, max_len: int, cache_format: CacheFormat = None) -> KVCache:
        """Return an empty cache for `batch` sequences of at most `max_len` tokens.

        Args:
          batch: B.
          max_len: how many tokens a sequence can have.
          cache_format: None keeps keys and values in the model's dtype; "fp8" and "mxfp4" store
            them in half and about a quarter of the bytes of bfloat16, at a loss of accuracy.

        Raises:
          ValueError: batch or max_len is below 1, or max_len beyond the model's longest sequence;
            cache_format is unknown, or "mxfp4" with heads that are no multiple of 32.
        """
        return init_cache(self.config, batch, max_len, self.dtype, cache_format)

    def prefill(
        self,
        tokens: ArrayLike,
        lengths: ArrayLike,
        cache: KVCache,
        *,
        chunk_size: int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Process whole prompts.

        Args:
          tokens: integers [B, T]; prompts shorter than T are padded at the end with any valid id.
          lengths: integers [B], the length of each prompt, 1 to T.
          cache: from `init_cache`. It is consumed: do not use it again.
          chunk_size: process so many positions at a time, which bounds the memory for what is
            computed in between; None for all at once.

        Returns:
          The logits after each prompt's last token, float32 [B, V], and the filled cache.

        Raises:
          TypeError: tokens or lengths are no integers.
          ValueError: they have a wrong shape, lie outside their range, or do not fit the cache;
            chunk_size is below 1.
        """
        ids = self._tokens(tokens, 2)
        batch, length = ids.shape
        if length > cache.max_len:
            raise ValueError(
                f"tokens: expected at most {cache.max_len} positions, the size of the cache, "
                f"found {length}"
            )
        self._check_batch(batch, cache)
        sizes = _integers("lengths", lengths, (batch,), 1, length + 1)
        chunk = length if chunk_size is None else chunk_size
        if chunk < 1:
            raise ValueError(f"chunk_size: expected at least 1, found {chunk_size}")
        logits = None
        for start in range(0, length, chunk):
            logits, cache = _prefill(
                self.params,
                ids[:, start : start + chunk],
                sizes,
                cache=cache,
                start=jnp.int32(start),
                logits=logits,
                context=context_size(start, chunk, cache.max_len),
                **self._static(),
            )
        assert logits is not None  # there is at least one position
        return logits, cache

    def decode_step(self, tokens: ArrayLike, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Process one more token of each sequence.

        Args:
          tokens: integers [B].
          cache: from `prefill` or `decode_step`. It is consumed: do not use it again.

        Returns:
          The logits after that token, float32 [B, V], and the grown cache. The logits of a
          sequence that already had max_len tokens are NaN.

        Raises:
          TypeError: tokens are no integers.
          ValueError: tokens are not [B] or outside [0, V).
        """
        ids = self._tokens(tokens, 1)
        self._check_batch(ids.shape[0], cache)
        return _decode_step(self.params, ids, cache=cache, **self._static())

    def __repr__(self) -> str:
        """Show the sizes, not the weights."""
        config = self.config
        return (
            f"GptOss(layers={config.num_layers}, hidden_size={config.hidden_size}, "
            f"experts={config.num_experts}, vocab_size={config.vocab_size}, "
            f"implementation={self.implementation!r})"
        )

    def _static(self) -> dict[str, Any]:
        return {"config": self.config, "implementation": self.implementation}

    def _tokens(self, tokens: ArrayLike, ndim: int) -> jax.Array:
        expected = ("[B]", "[B, T]")[ndim - 1]
        shape = np.shape(tokens)
        if len(shape) != ndim or 0 in shape:
            raise ValueError(f"tokens: expected {expected}, not empty, found {list(shape)}")
        return _integers("tokens", tokens, shape, 0, self.config.vocab_size)

    def _check_batch(self, batch: int, cache: KVCache) -> None:
        if batch != cache.lengths.shape[0]:
            raise ValueError(
                f"tokens: expected {cache.lengths.shape[0]} sequences as in the cache, "
                f"found {batch}"
            )

    def _router_indices(
        self, router_indices: Sequence[ArrayLike], tokens: jax.Array
    ) -> list[jax.Array]:
        config = self.config
        if len(router_indices) != config.num_layers:
            raise ValueError(
                f"router_indices: expected one entry for each of the {config.num_layers} layers, "
                f"found {len(router_indices)}"
            )
        shape = (*tokens.shape, config.experts_per_token)
        forced = []
        for index, layer_indices in enumerate(router_indices):
            name = f"router_indices[{index}]"
            if np.shape(layer_indices) == (tokens.size, config.experts_per_token):
                layer_indices = jnp.reshape(layer_indices, shape)
            forced.append(_integers(name, layer_indices, shape, 0, config.num_experts))
        return forced


def _integers(
    name: str, values: ArrayLike, shape: tuple[int, ...], low: int, high: int
) -> jax.Array:
    """Return `values` as int32; check their range where they are no tracers."""
    if np.shape(values) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(np.shape(values))}")
    array = values if isinstance(values, jax.Array) else np.asarray(values)
    if not jnp.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, found {array.dtype}")
    if not isinstance(array, Tracer):
        concrete = np.asarray(array)
        outside = concrete[(concrete < low) | (concrete >= high)]
        if outside.size:
            raise ValueError(
                f"{name}: expected integers from {low} to {high - 1}, found {outside[0]}"
            )
    return jnp.asarray(array, jnp.int32)
