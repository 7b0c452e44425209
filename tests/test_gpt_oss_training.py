"""The model in training against the packed one that it becomes, and its checkpoint."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mxfp4 as mx
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import CheckpointError
from jax_mxfp4.models.gpt_oss import GptOss, load_params, read_config
from jax_mxfp4.models.gpt_oss.saving import save_params
from jax_mxfp4.models.gpt_oss.training import TrainableGptOss
from jax_mxfp4.validation.errors import negative_log_likelihood
from jax_mxfp4.validation.gpt_oss_dense import DenseGptOss

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
TOKENS = np.load(GOLDEN / "hf_oracle.npz")["tokens"]
# Logits of size 7; see tests/test_gpt_oss.py.
TOLERANCE = 1e-4 if jax.default_backend() == "cpu" else 1e-3

forward = jax.jit(lambda model: model.forward(TOKENS))


@pytest.fixture(scope="module")
def released() -> GptOss:
    """The first two layers, a sliding and a full one."""
    model = GptOss.from_pretrained(GOLDEN / "hf", jnp.float32, "reference")
    return GptOss(
        replace(model.params, layers=model.params.layers[:2]),
        replace(model.config, layer_types=model.config.layer_types[:2]),
        "reference",
    )


@pytest.fixture(scope="module")
def trainable(released) -> TrainableGptOss:
    """The same weights; those of experts moved off the grid, by less than rounding moves back."""
    params = DenseGptOss.from_packed(released).params
    nudged = (
        replace(layer, mlp=replace(layer.mlp, gate_up=layer.mlp.gate_up * np.float32(1.01)))
        for layer in params.layers
    )
    return TrainableGptOss(
        replace(params, layers=tuple(nudged)), released.config, dtype=jnp.float32
    )


def assert_equal_leaves(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_computes_what_the_packed_model_computes(released, trainable):
    np.testing.assert_allclose(forward(trainable)[0], released(TOKENS), rtol=0, atol=TOLERANCE)


def test_packs_what_it_computes_with(released, trainable):
    packed = trainable.packed()
    assert all(leaf.dtype in (jnp.uint8, jnp.bfloat16) for leaf in jax.tree.leaves(packed))
    for layer, expected in zip(packed.layers, released.params.layers, strict=True):
        assert isinstance(layer.mlp.gate_up, MXFP4Array)
        np.testing.assert_array_equal(
            mx.dequantize(layer.mlp.gate_up), mx.dequantize(expected.mlp.gate_up)
        )
    # All of its dense parameters are in bfloat16 already.
    assert_equal_leaves(
        packed.layers[0].attention,
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), released.params.layers[0].attention),
    )


def test_gradients_pass_straight_through(released, trainable):
    tokens = TOKENS[:, :32]

    def gradients(model):
        def loss(model):
            return jnp.mean(negative_log_likelihood(model(tokens[:, :-1]), tokens[:, 1:]))

        return jax.jit(jax.grad(loss))(model).params

    # By other code, at the rounded weights.
    expected = gradients(DenseGptOss.from_packed(released))

    def compare(found, expected):
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * scale)

    jax.tree.map(compare, gradients(trainable), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_models_have_float32_gradients(trainable, dtype):
    def loss(model):
        return jnp.mean(model(TOKENS))

    gradients = jax.eval_shape(jax.grad(loss), replace(trainable, dtype=dtype))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))


def test_balance_is_one_for_even_use_and_more_otherwise(released):
    config = released.config
    model = TrainableGptOss.init(config, jax.random.key(0), jnp.float32)
    assert forward(model)[1] < 1.2

    def favour(layer, count):
        bias = jnp.where(jnp.arange(config.num_experts) < count, 1e3, 0.0)
        router = replace(layer.mlp.router, bias=bias.astype(jnp.float32))
        return replace(layer, mlp=replace(layer.mlp, router=router))

    layers = tuple(favour(layer, config.experts_per_token) for layer in model.params.layers)
    uneven = replace(model, params=replace(model.params, layers=layers))
    expected = config.num_experts / config.experts_per_token
    np.testing.assert_allclose(forward(uneven)[1], expected, rtol=1e-3)


def test_initial_model_guesses(released):
    model = TrainableGptOss.init(released.config, jax.random.key(0), jnp.float32)
    logits, _ = forward(model)
    loss = jnp.mean(negative_log_likelihood(logits[:, :-1], TOKENS[:, 1:]))
    np.testing.assert_allclose(loss, np.log(released.config.vocab_size), rtol=0.02)


def test_saved_parameters_are_read_back(trainable, tmp_path):
    params = trainable.packed()
    save_params(tmp_path / "saved", params, trainable.config, tokenizer="{}")
    assert read_config(tmp_path / "saved") == trainable.config
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"
    assert_equal_leaves(load_params(tmp_path / "saved", trainable.config, jnp.bfloat16), params)
    with pytest.raises(CheckpointError, match="exists already"):
        save_params(tmp_path / "saved", params, trainable.config)


def test_only_the_parameters_of_the_configuration_are_saved(trainable, tmp_path):
    params = trainable.packed()
    shorter = replace(trainable.config, layer_types=trainable.config.layer_types[:-1])
    with pytest.raises(ValueError, match=r"layers\.1\..*: expected None, found dense"):
        save_params(tmp_path / "saved", params, shorter)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_up: expected packed .*found dense"):
        save_params(tmp_path / "saved", trainable.params, trainable.config)
    wide = replace(params, norm=params.norm.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"norm: expected a float .* found int32"):
        save_params(tmp_path / "saved", wide, trainable.config)
    assert not (tmp_path / "saved").exists()
