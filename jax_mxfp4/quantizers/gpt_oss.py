"""GPTQ for the experts of a GPT-OSS model, one layer after the other.

Every expert has a Hessian of its own, from the tokens that the router sends to it. A token counts
with the square of its routing weight, because that weight multiplies the expert's error. Inputs
are those of the model whose earlier layers are packed already, and those of `down` come from the
packed `gate_up`. Beside the embedding and the hidden states of the calibration tokens, one layer
is in memory at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.models.gpt_oss import GptOss, GptOssConfig, Params
from jax_mxfp4.models.gpt_oss.layers import rms_norm
from jax_mxfp4.models.gpt_oss.params import MLP, Layer, Weight
from jax_mxfp4.ops import Implementation, prepare_on_cuda
from jax_mxfp4.quantizers.gptq import gptq
from jax_mxfp4.quantizers.options import (
    DEFAULT_OPTIONS,
    GptqOptions,
    Progress,
    WeightReport,
    output_sqnr_db,
)
from jax_mxfp4.quantizers.store import LayerStore, fingerprint
from jax_mxfp4.reference import dequantize

# Width of the empty experts that stand in where only attention and router are wanted.
_EMPTY_WIDTH = 32


def quantize_gpt_oss(
    params: Params,
    config: GptOssConfig,
    tokens: ArrayLike,
    options: GptqOptions = DEFAULT_OPTIONS,
    *,
    implementation: Implementation = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[GptOss, tuple[WeightReport, ...]]:
    """Pack the experts of a model with `gptq`; everything else stays as it is.

    Args:
      params: as of a `GptOss`, but with dense experts, `gate_up` [E, 2I, D] and `down` [E, D, I].
      config: the model's hyperparameters.
      tokens: calibration text, integers [B, T].
      options: see `GptqOptions`.
      implementation: of the packed operations.
      checkpoint: folder in which finished layers are kept. A later call with the same arguments
        and folder goes on after the last of them.
      progress: called after each parameter of experts.

    Returns:
      The packed model, and one report for each parameter of experts that this call rounded.

    Raises:
      ValueError: tokens are no [B, T], experts are packed already, or `checkpoint` belongs to
        another calibration.
    """
    layers: list[Layer] = []
    reports: list[WeightReport] = []
    calibrated = calibrate_experts(
        params.embedding,
        lambda index: params.layers[index],
        config,
        tokens,
        options,
        implementation=implementation,
        checkpoint=checkpoint,
        progress=progress,
    )
    for layer, new_reports in calibrated:
        layers.append(layer)
        reports += new_reports
    packed = replace(params, layers=tuple(layers))
    return GptOss(packed, config, implementation), tuple(reports)


def calibrate_experts(
    embedding: Weight,
    layer: Callable[[int], Layer],
    config: GptOssConfig,
    tokens: ArrayLike,
    options: GptqOptions = DEFAULT_OPTIONS,
    *,
    implementation: Implementation = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Layer, list[WeightReport]]]:
    """Yield layers with packed experts, in order: `quantize_gpt_oss` for a model of any size.

    Args:
      embedding: dense [V, D].
      layer: gives the parameters of layer i with dense experts; called once for each.
      config: see `quantize_gpt_oss`, as for all other arguments.
      tokens: likewise.
      options: likewise.
      implementation: likewise.
      checkpoint: likewise.
      progress: likewise.

    Yields:
      (layer, reports of what was rounded for it).
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens: expected [B, T], not empty, found {tokens.shape}")
    if isinstance(embedding, MXFP4Array):
        raise ValueError("embedding: expected a dense array, found it packed")
    dtype = embedding.dtype
    batches = [tokens[i : i + options.batch] for i in range(0, len(tokens), options.batch)]
    hidden = [jnp.asarray(embedding)[batch] for batch in batches]
    store = None
    for index in range(config.num_layers):
        dense = layer(index)
        if isinstance(dense.mlp.gate_up, MXFP4Array) or isinstance(dense.mlp.down, MXFP4Array):
            raise ValueError(f"layers.{index}: expected dense experts, found packed ones")
        if checkpoint is not None and store is None:
            first = (dense.mlp.gate_up[0], dense.mlp.down[0])
            settings = {
                **asdict(options),
                "dtype": str(dtype),
                "layers": config.num_layers,
                "tokens": fingerprint(tokens),
                "first_layer": fingerprint(*first),
            }
            store = LayerStore(checkpoint, settings)
        one_layer = _OneLayer(config, index, dtype, implementation)
        weights = {} if store is None else store.load(index) or {}
        reports: list[WeightReport] = []
        if not weights:
            weights, reports = _pack_experts(one_layer, dense, hidden, options)
            if store is not None:
                store.save(index, weights)
        weights = {
            name: prepare_on_cuda(jax.tree.map(jnp.asarray, weight), donate=True)
            for name, weight in weights.items()
        }
        packed = Layer(dense.attention, replace(dense.mlp, **weights))
        hidden = [one_layer(packed, x)["hidden"] for x in hidden]
        for number, name in enumerate(weights, 1 + index * len(weights)):
            if progress is not None:
                progress(f"layers.{index}.mlp.{name}", number, config.num_layers * len(weights))
        yield packed, reports


class _OneLayer:
    """Runs a single layer through `GptOss.forward`, which shows what happens inside.

    The model is one whose vocabulary are the calibration tokens: their hidden states are its
    embedding.
    """

    def __init__(
        self,
        config: GptOssConfig,
        index: int,
        dtype: jnp.dtype,
        implementation: Implementation,
    ) -> None:
        self.config = config
        self.index = index
        self.dtype = dtype
        self.implementation: Implementation = implementation

    def __call__(self, layer: Layer, x: jax.Array) -> dict[str, jax.Array]:
        """Return the captures of `layer` for hidden states x [B, T, D]."""
        config = replace(
            self.config,
            layer_types=(self.config.layer_types[self.index],),
            vocab_size=x.shape[0] * x.shape[1],
            eos_token_ids=(),
        )
        width = x.shape[-1]
        params = Params(
            embedding=x.reshape(-1, width),
            layers=(layer,),
            norm=jnp.ones(width, self.dtype),
            unembedding=jnp.zeros((1, width), self.dtype),
        )
        ids = np.arange(config.vocab_size, dtype=np.int32).reshape(x.shape[:2])
        _, (captures,) = GptOss(params, config, self.implementation).forward(ids, capture=True)
        return captures

    def route(self, layer: Layer, x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Return the experts' inputs, float32 [tokens, D], and routing weights [tokens, E]."""
        experts, width = self.config.num_experts, x.shape[-1]
        empty = replace(
            layer.mlp,
            gate_up=_empty((experts, 2 * _EMPTY_WIDTH, width)),
            gate_up_bias=jnp.zeros((experts, 2 * _EMPTY_WIDTH), self.dtype),
            down=_empty((experts, width, _EMPTY_WIDTH)),
            down_bias=jnp.zeros((experts, width), self.dtype),
        )
        captures = self(Layer(layer.attention, empty), x)
        normed = _norm(x + captures["attn_out"], layer.mlp.norm, self.config.rms_norm_eps)
        indices, weights = (
            np.asarray(captures[f"router_{name}"]).reshape(-1, self.config.experts_per_token)
            for name in ("indices", "weights")
        )
        share = np.zeros((len(indices), experts), np.float32)
        np.put_along_axis(share, indices, weights, axis=1)
        return np.asarray(normed, np.float32).reshape(-1, width), share


_norm = jax.jit(rms_norm, static_argnames="eps")


def _empty(shape: tuple[int, ...]) -> MXFP4Array:
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), MXFP4Array.shape_dtype(shape)
    )


def _pack_experts(
    one_layer: _OneLayer, layer: Layer, hidden: list[jax.Array], options: GptqOptions
) -> tuple[dict[str, MXFP4Array], list[WeightReport]]:
    routed = [one_layer.route(layer, x) for x in hidden]
    inputs, shares = (np.concatenate(parts) for parts in zip(*routed, strict=True))
    experts = range(shares.shape[1])
    chosen = [np.flatnonzero(shares[:, e]) for e in experts]
    weights = [shares[rows, e, None] for e, rows in enumerate(chosen)]
    gate_up, gate_up_report = _pack_stack(
        layer.mlp.gate_up, [inputs[r] * w for r, w in zip(chosen, weights, strict=True)], options
    )
    activations = [
        _activate(inputs[rows], gate_up[e], layer.mlp, e, one_layer.config) * weights[e]
        for e, rows in enumerate(chosen)
    ]
    down, down_report = _pack_stack(layer.mlp.down, activations, options)
    prefix = f"layers.{one_layer.index}.mlp."
    reports = [
        WeightReport(f"{prefix}gate_up", gate_up_report),
        WeightReport(f"{prefix}down", down_report),
    ]
    return {"gate_up": gate_up, "down": down}, reports


def _activate(
    x: np.ndarray, gate_up: MXFP4Array, mlp: MLP, expert: int, config: GptOssConfig
) -> np.ndarray:
    """Return what arrives at `down` of an expert, float32 [tokens, I]; see `reference.moe`."""
    bias = np.asarray(mlp.gate_up_bias[expert], np.float32)
    gu = x @ _decoded(gate_up).T + bias
    gate = np.minimum(gu[:, 0::2], config.swiglu_limit)
    up = np.clip(gu[:, 1::2], -config.swiglu_limit, config.swiglu_limit)
    return gate / (1 + np.exp(-config.swiglu_alpha * gate)) * (up + 1)


def _pack_stack(
    dense: Weight, inputs: list[np.ndarray], options: GptqOptions
) -> tuple[MXFP4Array, float]:
    """Pack [E, N, K] given each expert's inputs [tokens, K]; also return the output SQNR."""
    hessians = np.stack([x.T @ x for x in inputs]).astype(np.float64)
    # Where an expert saw little, what all of them saw is a better guess than the identity.
    pooled = options.damping * hessians.mean(axis=0)
    packed, wanted, found = [], [], []
    for expert, hessian in enumerate(hessians):
        weight = np.asarray(dense[expert], np.float32)
        packed.append(
            gptq(
                weight,
                hessian + pooled,
                scale_rule=options.scale_rule,
                damping=options.damping,
                activation_order=options.activation_order,
            )
        )
        wanted.append(weight.astype(np.float64))
        found.append(_decoded(packed[-1]).astype(np.float64))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *packed)
    return stacked, output_sqnr_db(np.stack(wanted), np.stack(found), hessians)


def _decoded(array: MXFP4Array) -> np.ndarray:
    return np.asarray(dequantize(array, jnp.float32))
