"""The Linen layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization

import jax_mxfp4 as mx
from flax_layers import MXFP4Dense as NNXDense
from flax_layers import with_layout
from flax_layers.linen import MXFP4Dense


def initialized(layer, in_features=64):
    return layer.init(jax.random.key(0), jnp.ones((1, in_features)))


def test_packed_weights_have_their_own_collection(no_kernels):
    variables = initialized(MXFP4Dense(48, bias_init=nn.initializers.ones))
    assert {name: set(collection) for name, collection in variables.items()} == {
        "params": {"bias"},
        "mxfp4": {"weight_blocks", "weight_scales"},
    }
    assert variables["mxfp4"]["weight_blocks"].shape == (48, 2, 16)
    assert variables["mxfp4"]["weight_scales"].shape == (48, 2)
    assert "params" not in initialized(MXFP4Dense(48, use_bias=False))


def test_the_kernel_is_packed_along_its_inputs(no_kernels):
    def kernel_init(key, shape, dtype):
        return jnp.linspace(-1, 1, shape[0] * shape[1], dtype=dtype).reshape(shape)

    layer = MXFP4Dense(48, kernel_init=kernel_init, scale_rule="mse")
    expected = mx.quantize(kernel_init(None, (64, 48), jnp.float32).T, "mse")
    weight = initialized(layer)["mxfp4"]
    np.testing.assert_array_equal(weight["weight_blocks"], expected.blocks)
    np.testing.assert_array_equal(weight["weight_scales"], expected.scales)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_result_is_that_of_the_nnx_layer(dtype, implementation):
    layer = MXFP4Dense(
        48, dtype=dtype, bias_init=nn.initializers.normal(1.0), implementation=implementation
    )
    variables = initialized(layer)
    x = jax.random.normal(jax.random.key(1), (2, 3, 64))
    packed = with_layout(variables["mxfp4"], "canonical")
    weight = mx.MXFP4Array(packed["weight_blocks"], packed["weight_scales"])
    bias = variables["params"]["bias"]
    nnx_layer = NNXDense.from_packed(weight, bias, dtype=dtype, implementation=implementation)
    y = layer.apply(variables, x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, nnx_layer(x))


def test_gradients_of_params_leave_the_weight_out():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return MXFP4Dense(32)(nn.relu(MXFP4Dense(64)(x)))

    x = jnp.ones((2, 32))
    variables = Model().init(jax.random.key(0), x)

    @jax.jit
    def loss(params):
        return jnp.sum(jnp.square(Model().apply({**variables, "params": params}, x)))

    gradients = jax.grad(loss)(variables["params"])
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(gradients)} == {"bias"}
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradients))


def test_variables_survive_serialization():
    layer = MXFP4Dense(48)
    variables = initialized(layer)
    restored = serialization.from_bytes(variables, serialization.to_bytes(variables))
    x = jnp.ones((2, 64))
    np.testing.assert_array_equal(layer.apply(restored, x), layer.apply(variables, x))


def test_abstract_initialization(no_kernels):
    variables = jax.eval_shape(MXFP4Dense(48).init, jax.random.key(0), jnp.ones((1, 64)))
    assert variables["mxfp4"]["weight_blocks"].shape == (48, 2, 16)


def test_errors():
    with pytest.raises(ValueError, match="last axis of inputs must be a positive multiple of 32"):
        initialized(MXFP4Dense(48), 40)
    with pytest.raises(TypeError, match=r"dtype must be float32, .* got int32"):
        initialized(MXFP4Dense(48, dtype=jnp.int32))
