"""GPTQ for a `Llama`, one layer after the other.

Inputs of a layer are those of the model whose earlier layers are quantized already, and inside a
block every linear layer sees what the quantized ones before it make. What is in memory at a time,
beside the model itself, is one hidden state of the calibration tokens and the statistics of the
linear layers that share one input.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from flax_layers import MXFP4Dense
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.models.llama import Llama
from jax_mxfp4.models.llama.modeling import Block
from jax_mxfp4.quantizers.gptq import gptq
from jax_mxfp4.quantizers.hadamard import RotatedDense, rotate, rotate_both
from jax_mxfp4.quantizers.options import (
    DEFAULT_OPTIONS,
    GptqOptions,
    Progress,
    WeightReport,
    output_sqnr_db,
)
from jax_mxfp4.quantizers.statistics import InputStatistics
from jax_mxfp4.quantizers.store import LayerStore, fingerprint
from jax_mxfp4.reference import dequantize

# (block, residual stream, input of the linear layers before) -> (residual stream, next input)
Step = Callable[[Block, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class _Stage:
    """Linear layers of a block that share an input.

    Attributes:
      names: their attribute paths.
      step: computes that input from the state of the stage before.
      ends_branch: whether their result is added to the residual stream.
    """

    names: tuple[str, ...]
    step: Step
    ends_branch: bool = False


def _enter_mlp(block: Block, stream: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    stream = stream + block.attention.out(x)
    return stream, block.mlp_norm(stream)


_STAGES = (
    _Stage(
        ("attention.q", "attention.k", "attention.v"),
        lambda block, stream, x: (stream, block.attention_norm(stream)),
    ),
    _Stage(
        ("attention.out",),
        lambda block, stream, x: (stream, block.attention.mix(x)),
        ends_branch=True,
    ),
    _Stage(("mlp.gate", "mlp.up"), _enter_mlp),
    _Stage(
        ("mlp.down",),
        lambda block, stream, x: (stream, block.mlp.activate(x)),
        ends_branch=True,
    ),
)


_NAMES = [name for stage in _STAGES for name in stage.names]


@partial(nnx.jit, static_argnames="step")
def _run(block: Block, stream: jax.Array, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
    return step(block, stream, x)


def _leave(block: Block, stream: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    stream = stream + block.mlp.down(x)
    return stream, stream


class _Tokens:
    """The calibration tokens on their way through one model, in batches."""

    def __init__(self, model: Llama, tokens: np.ndarray, batch: int) -> None:
        parts = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
        self.streams = [model.embedding(jnp.asarray(part)) for part in parts]
        self.inputs = list(self.streams)

    def advance(self, block: Block, step: Step) -> None:
        for i, (stream, x) in enumerate(zip(self.streams, self.inputs, strict=True)):
            self.streams[i], self.inputs[i] = _run(block, stream, x, step)


def quantize_llama(
    model: Llama,
    tokens: ArrayLike,
    options: GptqOptions = DEFAULT_OPTIONS,
    *,
    rotate_inputs: str | None = None,
    follow_original: bool = True,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Llama, tuple[WeightReport, ...]]:
    """Pack all linear layers of the blocks with `gptq`.

    The given model is not changed; the new one shares its other arrays.

    Args:
      model: a `Llama` whose blocks are not packed yet.
      tokens: calibration text, integers [B, T].
      options: see `GptqOptions`.
      rotate_inputs: regular expression for the names of linear layers, as "layers.0.mlp.down",
        that are packed rotated and rotate their inputs (`RotatedDense`); None for none of them.
      follow_original: also run the original model, and aim every layer at what it computes
        (`InputStatistics.corrected`); that takes about twice as long.
      checkpoint: folder in which finished layers are kept. A later call with the same arguments
        and folder goes on after the last of them.
      progress: called after each linear layer.

    Returns:
      The new model, and one report for each linear layer that was rounded by this call.

    Raises:
      ValueError: tokens are no [B, T], a layer is packed already, `rotate_inputs` matches none, or
        `checkpoint` belongs to another calibration.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens: expected [B, T], not empty, found {tokens.shape}")
    names = _linear_layers(model)
    rotated = _rotated(names, rotate_inputs)
    store = None
    if checkpoint is not None:
        kernels = [attrgetter(name)(model.layers[0]).kernel.get_value() for name in _NAMES]
        settings = {
            **asdict(options),
            "rotate_inputs": rotate_inputs,
            "follow_original": follow_original,
            "layers": len(model.layers),
            "tokens": fingerprint(tokens),
            "first_layer": fingerprint(*kernels),
        }
        store = LayerStore(checkpoint, settings)

    new_model = nnx.clone(model)
    finished = [] if store is None else store.finished()
    for index, weights in enumerate(finished):
        for name, weight in weights.items():
            _install(new_model.layers[index], name, weight, f"layers.{index}.{name}" in rotated)
    reports: list[WeightReport] = []
    if len(finished) == len(model.layers):
        return new_model, ()

    run = _Run(model, tokens, options, follow_original)
    for index, (block, original) in enumerate(zip(new_model.layers, model.layers, strict=True)):
        packed: dict[str, MXFP4Array] = {}
        for stage in _STAGES:
            run.advance(block, original, stage.step)
            if index < len(finished):
                continue
            statistics = run.statistics(stage.ends_branch)
            for name in stage.names:
                full_name = f"layers.{index}.{name}"
                packed[name], sqnr_db = _round(
                    attrgetter(name)(original), statistics, full_name in rotated, options
                )
                _install(block, name, packed[name], full_name in rotated)
                reports.append(WeightReport(full_name, sqnr_db))
                if progress is not None:
                    progress(full_name, names.index(full_name) + 1, len(names))
        run.advance(block, original, _leave)
        if store is not None and packed:
            store.save(index, packed)
    return new_model, tuple(reports)


def _linear_layers(model: Llama) -> list[str]:
    """Return the names of all linear layers of the blocks, which must not be packed yet."""
    names = []
    for index, block in enumerate(model.layers):
        for name in _NAMES:
            names.append(f"layers.{index}.{name}")
            if not isinstance(attrgetter(name)(block), nnx.Linear):
                raise ValueError(f"{names[-1]}: expected nnx.Linear, found it packed")
    return names


def _rotated(names: list[str], pattern: str | None) -> set[str]:
    """Return the layers that `pattern` matches, at least one where there is a pattern."""
    if pattern is None:
        return set()
    try:
        found = {name for name in names if re.fullmatch(pattern, name)}
    except re.error as error:
        raise ValueError(f"rotate_inputs: {pattern!r} is no regular expression: {error}") from error
    if not found:
        raise ValueError(f"rotate_inputs: {pattern!r} matches none of {names[0]}, {names[1]}, ...")
    return found


class _Run:
    """The calibration tokens on their way through the model that is being packed.

    Attributes:
      quantized: what they are there.
      original: what they are in the model as it was, or None.
    """

    def __init__(
        self, model: Llama, tokens: np.ndarray, options: GptqOptions, follow_original: bool
    ) -> None:
        self.quantized = _Tokens(model, tokens, options.batch)
        self.original = _Tokens(model, tokens, options.batch) if follow_original else None

    def advance(self, block: Block, original: Block, step: Step) -> None:
        """Take the next step in both models."""
        self.quantized.advance(block, step)
        if self.original is not None:
            self.original.advance(original, step)

    def statistics(self, ends_branch: bool) -> InputStatistics:
        """Return the statistics of the input that the last step computed."""
        quantized, original = self.quantized, self.original
        statistics = InputStatistics.zeros(
            quantized.inputs[0].shape[-1],
            follow=original is not None,
            stream=quantized.streams[0].shape[-1] if ends_branch else None,
        )
        for i, x in enumerate(quantized.inputs):
            if original is None:
                statistics.add(x, None, None)
            else:
                drift = original.streams[i] - quantized.streams[i] if ends_branch else None
                statistics.add(x, original.inputs[i], drift)
        return statistics


def _round(
    linear: nnx.Linear, statistics: InputStatistics, rotates: bool, options: GptqOptions
) -> tuple[MXFP4Array, float]:
    weight = np.asarray(linear.kernel.get_value(), np.float64).T
    wanted = statistics.corrected(weight, options.damping)
    hessian = statistics.hessian
    if rotates:
        wanted = np.asarray(rotate(jnp.asarray(wanted, jnp.float32)), np.float64)
        hessian = rotate_both(hessian)
    packed = gptq(
        wanted,
        hessian,
        scale_rule=options.scale_rule,
        damping=options.damping,
        activation_order=options.activation_order,
    )
    found = np.asarray(dequantize(packed, jnp.float32), np.float64)
    return packed, output_sqnr_db(wanted, found, hessian)


def _install(block: Block, name: str, weight: MXFP4Array, rotates: bool) -> None:
    """Put the packed layer in the place of the linear layer `name`, which has no bias."""
    parent_name, _, attribute = name.rpartition(".")
    parent = attrgetter(parent_name)(block)
    linear: nnx.Linear = getattr(parent, attribute)
    weight = jax.tree.map(jnp.asarray, weight)
    dense = MXFP4Dense.from_packed(weight, dtype=linear.dtype)
    setattr(parent, attribute, RotatedDense(dense) if rotates else dense)
