"""Calibration of the experts of GPT-OSS, in memory and from a checkpoint on disk."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mxfp4 import MXFP4Array, dequantize, quantize
from jax_mxfp4.checkpoints import CheckpointError
from jax_mxfp4.models.gpt_oss import (
    GptOss,
    GptOssConfig,
    Params,
    abstract_params,
    mini_path,
)
from jax_mxfp4.models.gpt_oss.layers import rms_norm
from jax_mxfp4.quantizers import (
    GptqOptions,
    WeightReport,
    calibrate_and_quantize,
    calibrated_packer,
    quantize_gpt_oss,
)

CONFIG = GptOssConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    num_experts=4,
    experts_per_token=2,
    layer_types=("full_attention", "full_attention"),
    sliding_window=8,
    max_position_embeddings=64,
)
DRAW = np.random.default_rng(0)
TOKENS = DRAW.integers(0, CONFIG.vocab_size, (24, 16), np.int32)
UNSEEN = DRAW.integers(0, CONFIG.vocab_size, (4, 16), np.int32)


OPTIONS = GptqOptions(batch=24)


def is_packed(leaf: object) -> bool:
    return isinstance(leaf, MXFP4Array)


@pytest.fixture(scope="module")
def dense() -> Params:
    """Random parameters whose experts are dense arrays."""

    def fill(leaf):
        scale = leaf.shape[-1] ** -0.5 if len(leaf.shape) > 1 else 1.0
        return jnp.asarray(DRAW.normal(0, scale, leaf.shape), jnp.float32)

    params = jax.tree.map(fill, abstract_params(CONFIG), is_leaf=is_packed)
    # A few directions dominate the hidden states, as in trained models.
    directions = DRAW.normal(size=(CONFIG.vocab_size, 8)) @ DRAW.normal(size=(8, 64))
    return replace(params, embedding=jnp.asarray(directions, jnp.float32))


@pytest.fixture(scope="module")
def calibrated(dense: Params) -> tuple[GptOss, tuple[WeightReport, ...]]:
    return quantize_gpt_oss(dense, CONFIG, TOKENS, OPTIONS)


def with_experts(params: Params, function) -> Params:
    layers = tuple(
        replace(
            layer,
            mlp=replace(
                layer.mlp, gate_up=function(layer.mlp.gate_up), down=function(layer.mlp.down)
            ),
        )
        for layer in params.layers
    )
    return replace(params, layers=layers)


def test_only_experts_change(dense: Params, calibrated) -> None:
    packed, reports = calibrated
    assert [r.name for r in reports] == [
        f"layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate_up", "down")
    ]
    assert all(17 < r.output_sqnr_db < 40 for r in reports)
    for layer, original in zip(packed.params.layers, dense.layers, strict=True):
        assert layer.attention is original.attention
        assert layer.mlp.router is original.mlp.router
        for name in ("gate_up", "down"):
            weight, found = getattr(original.mlp, name), getattr(layer.mlp, name)
            error = jnp.linalg.norm(dequantize(found, jnp.float32) - weight)
            assert 0.1 < error / jnp.linalg.norm(weight) < 0.3


def test_outputs_of_experts_come_closer(dense: Params, calibrated) -> None:
    """The first layer on unseen tokens, where all models have the same inputs and routing."""
    packed, _ = calibrated
    plain = GptOss(with_experts(dense, lambda w: quantize(w, "floor")), CONFIG)
    (captures, _), (calibrated_captures, _) = (
        model.forward(UNSEEN, capture=True)[1] for model in (plain, packed)
    )
    routing = captures["router_indices"], captures["router_weights"]
    mlp = dense.layers[0].mlp
    x = rms_norm(dense.embedding[UNSEEN] + captures["attn_out"], mlp.norm, CONFIG.rms_norm_eps)

    gu = jnp.einsum("btd,eod->bteo", x, mlp.gate_up, precision="highest") + mlp.gate_up_bias
    gate, up = jnp.minimum(gu[..., 0::2], 7), jnp.clip(gu[..., 1::2], -7, 7)
    hidden = gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    out = jnp.einsum("btei,eoi->bteo", hidden, mlp.down, precision="highest") + mlp.down_bias
    chosen = jnp.take_along_axis(out, routing[0][..., None], axis=2)
    exact = jnp.sum(routing[1][..., None] * chosen, axis=2)

    np.testing.assert_array_equal(calibrated_captures["router_indices"], routing[0])
    error, plain_error = (
        np.linalg.norm(found["mlp_out"] - exact) for found in (calibrated_captures, captures)
    )
    assert error < 0.75 * plain_error


def test_a_killed_run_goes_on(dense: Params, calibrated, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(name: str, done: int, total: int) -> None:
        if (name, done, total) == ("layers.1.mlp.gate_up", 3, 4):
            raise Killed

    model = GptOss(dense, CONFIG)
    with pytest.raises(Killed):
        calibrate_and_quantize(model, TOKENS, OPTIONS, checkpoint=tmp_path / "run", progress=kill)
    resumed, reports = calibrate_and_quantize(model, TOKENS, OPTIONS, checkpoint=tmp_path / "run")
    assert not reports  # layer 1 was complete when the report of its progress failed
    for left, right in zip(jax.tree.leaves(calibrated[0]), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(left, right)


def test_experts_without_tokens_are_rounded_plainly(dense: Params) -> None:
    """A router that never chooses the last two experts."""
    biases = jnp.asarray([0.0, 0.0, -1e9, -1e9])
    layers = tuple(
        replace(layer, mlp=replace(layer.mlp, router=replace(layer.mlp.router, bias=biases)))
        for layer in dense.layers
    )
    packed, _ = quantize_gpt_oss(replace(dense, layers=layers), CONFIG, TOKENS, OPTIONS)
    for layer, original in zip(packed.params.layers, dense.layers, strict=True):
        for found, weight in (
            (layer.mlp.gate_up, original.mlp.gate_up),
            (layer.mlp.down, original.mlp.down),
        ):
            error = dequantize(found, jnp.float32) - weight
            relative = jnp.linalg.norm(error, axis=(1, 2)) / jnp.linalg.norm(weight, axis=(1, 2))
            assert np.all(np.asarray(relative) < 0.3)


def test_packed_experts_are_refused(dense: Params) -> None:
    packed = with_experts(dense, lambda w: quantize(w))
    with pytest.raises(ValueError, match=r"layers\.0: expected dense experts, found packed ones"):
        quantize_gpt_oss(packed, CONFIG, TOKENS, OPTIONS)
    with (
        pytest.raises(CheckpointError, match="packed already"),
        calibrated_packer(mini_path(), TOKENS),
    ):
        pass
