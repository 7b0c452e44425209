"""NNX layers: arithmetic, dtypes, and how packed weights travel through NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerance import assert_close, expected_matmul, gamma

import jax_mxfp4 as mx
from flax_layers import MXFP4Dense, MXFP4Embed, MXFP4MoE, MXFP4Weight

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def float64(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def decoded(weight):
    """The weight as float64; E2M1 times a power of two is exact there."""
    return float64(mx.dequantize(weight, jnp.float32, implementation="reference"))


def assert_matmul(y, x, weight, bias=None):
    """Asserts that y is x @ weight.T + bias, accumulated in float32 and rounded once."""
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    rows = float64(x).reshape(-1, x.shape[-1])
    expected = expected_matmul(rows, decoded(weight), None if bias is None else float64(bias))
    assert_close(np.asarray(y).reshape(expected.exact.shape), expected)


def dense(in_features=64, out_features=48, **kwargs):
    kwargs.setdefault("bias_init", nnx.initializers.normal(1.0))
    return MXFP4Dense(in_features, out_features, rngs=nnx.Rngs(0), **kwargs)


def packed_state(model):
    return jax.tree.leaves(nnx.state(model, MXFP4Weight))


def assert_trees_equal(a, b):
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves_a) == len(leaves_b) > 0
    for x, y in zip(leaves_a, leaves_b, strict=True):
        np.testing.assert_array_equal(x, y)


class MLP(nnx.Module):
    """Two packed layers with a residual, an embedding and a tied output."""

    def __init__(self, rngs, implementation=None):
        options = {"implementation": implementation, "rngs": rngs}
        self.embed = MXFP4Embed(50, 64, **options)
        self.up = MXFP4Dense(64, 96, **options)
        self.down = MXFP4Dense(96, 64, **options)
        self.norm = nnx.LayerNorm(64, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.down(nnx.relu(self.up(x)))
        return self.embed.attend(self.norm(x))


# Dense -------------------------------------------------------------------------------------------


def test_dense_packs_the_kernel_that_linear_draws(no_kernels):
    options = {"bias_init": nnx.initializers.normal(1.0)}
    linear = nnx.Linear(64, 48, rngs=nnx.Rngs(3), **options)
    layer = MXFP4Dense(64, 48, rngs=nnx.Rngs(3), scale_rule="mse", **options)
    assert_trees_equal(layer.weight, mx.quantize(linear.kernel[...].T, "mse"))
    np.testing.assert_array_equal(layer.bias[...], linear.bias[...])
    assert layer.weight_blocks.shape == (48, 2, 16)
    assert layer.weight_scales.shape == (48, 2)
    assert layer.weight.shape == (48, 64)
    assert_trees_equal(MXFP4Dense.from_linear(linear, scale_rule="mse").weight, layer.weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_is_one_rounding_of_the_exact_sum(dtype, use_bias, implementation):
    layer = dense(use_bias=use_bias, dtype=dtype, implementation=implementation)
    x = normal(1, (5, 64), dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_matmul(y, x, layer.weight, layer.bias[...] if use_bias else None)


def test_dense_agrees_with_linear_on_the_decoded_kernel(implementation):
    layer = dense(implementation=implementation)
    linear = nnx.Linear(64, 48, precision="highest", rngs=nnx.Rngs(0))
    linear.kernel[...] = mx.dequantize(layer.weight, jnp.float32).T
    linear.bias[...] = layer.bias[...]
    x = normal(1, (5, 64))
    assert_matmul(linear(x), x, layer.weight, layer.bias[...])
    assert_matmul(layer(x), x, layer.weight, layer.bias[...])


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 0, 64)])
def test_dense_keeps_leading_axes(shape):
    assert dense()(normal(1, shape)).shape == (*shape[:-1], 48)


@pytest.mark.parametrize("param_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("input_dtype", [*DTYPES, jnp.int32])
def test_dense_result_dtype_is_that_of_linear(input_dtype, dtype, param_dtype):
    arguments = {"dtype": dtype, "param_dtype": param_dtype}
    layer = MXFP4Dense(32, 8, rngs=nnx.Rngs(0), **arguments)
    linear = nnx.Linear(32, 8, rngs=nnx.Rngs(0), **arguments)
    x = jnp.ones((2, 32), input_dtype)
    with jax.numpy_dtype_promotion("standard"):
        assert layer(x).dtype == linear(x).dtype
    assert layer.bias.dtype == param_dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_without_bias_follows_the_inputs(dtype):
    assert dense(use_bias=False)(jnp.ones((2, 64), dtype)).dtype == dtype


def test_preferred_element_type_is_the_dtype_of_the_result():
    layer = dense(dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    x = normal(1, (3, 64), jnp.bfloat16)
    y = layer(x)
    assert y.dtype == jnp.float32
    assert_matmul(y, x, layer.weight, layer.bias[...])


@pytest.mark.parametrize("in_features", [0, 16, 33, -32])
def test_dense_rejects_sizes_without_whole_blocks(in_features):
    message = f"in_features must be a positive multiple of 32, got {in_features}"
    with pytest.raises(ValueError, match=message):
        dense(in_features)


def test_dense_rejects_arguments_without_meaning():
    with pytest.raises(TypeError, match="dot_general"):
        dense(dot_general=jax.lax.dot_general)
    for name in ("dtype", "preferred_element_type"):
        with pytest.raises(TypeError, match=f"{name} must be float32, .* got float64"):
            dense(**{name: np.float64})
    with pytest.raises(ValueError, match="scale_rule"):
        dense(scale_rule="nearest")
    with pytest.raises(ValueError, match=r"must end in shape \(48, 64\), got \(48, 32\)"):
        dense(kernel_init=lambda *_: mx.quantize(jnp.ones((48, 32))))
    with pytest.raises(ValueError, match=r"got \(2, 32\)"):
        dense()(jnp.ones((2, 32)))


def test_from_packed_keeps_the_arrays(no_kernels):
    weight, bias = mx.quantize(normal(0, (48, 64))), normal(1, (48,), jnp.bfloat16)
    layer = MXFP4Dense.from_packed(weight, bias, dtype=jnp.bfloat16)
    assert layer.weight_blocks[...] is weight.blocks
    assert (layer.in_features, layer.out_features, layer.use_bias) == (64, 48, True)
    assert layer.param_dtype == jnp.bfloat16
    x = normal(2, (3, 64), jnp.bfloat16)
    assert_matmul(layer(x), x, weight, bias)
    assert MXFP4Dense.from_packed(weight).bias is None
    with pytest.raises(ValueError, match=r"bias must have shape \(48,\)"):
        MXFP4Dense.from_packed(weight, bias[:-1])
    with pytest.raises(ValueError, match="weight must have shape"):
        MXFP4Dense.from_packed(weight[0])


def test_from_linear_leaves_the_source_alone():
    linear = nnx.Linear(64, 48, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer = MXFP4Dense.from_linear(linear)
    assert layer.dtype == jnp.bfloat16
    layer.bias[...] = jnp.ones(48)
    np.testing.assert_array_equal(linear.bias[...], np.zeros(48))


# Embed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_decodes_rows(dtype, implementation):
    layer = MXFP4Embed(50, 64, dtype=dtype, rngs=nnx.Rngs(0), implementation=implementation)
    ids = jnp.array([[0, 49, 7], [-1, -50, 7]])
    rows = layer(ids)
    assert rows.dtype == dtype
    table = mx.dequantize(layer.embedding, dtype)
    np.testing.assert_array_equal(float64(rows), float64(table[ids]))


def test_embed_out_of_range_ids_are_nan(implementation):
    layer = MXFP4Embed(50, 64, rngs=nnx.Rngs(0), implementation=implementation)
    nan = np.isnan(layer(jnp.array([50, -51, 49])))
    assert nan[:2].all()
    assert not nan[2].any()


def test_embed_packs_the_table_that_embed_draws(no_kernels):
    embed = nnx.Embed(50, 64, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    layer = MXFP4Embed(50, 64, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    assert_trees_equal(layer.embedding, mx.quantize(embed.embedding[...]))
    assert layer.dtype == embed.dtype == jnp.bfloat16
    assert_trees_equal(MXFP4Embed.from_embed(embed).embedding, layer.embedding)


def test_embed_of_one_row_answers_every_id_as_nnx_does():
    embed = nnx.Embed(1, 32, rngs=nnx.Rngs(0))
    layer = MXFP4Embed.from_embed(embed)
    ids = jnp.array([[0, 5], [-3, 1]])
    expected = np.broadcast_to(mx.dequantize(layer.embedding[0], jnp.float32), embed(ids).shape)
    np.testing.assert_array_equal(layer(ids), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_multiplies_by_every_row(dtype, implementation):
    layer = MXFP4Embed(50, 64, dtype=dtype, rngs=nnx.Rngs(0), implementation=implementation)
    query = normal(1, (2, 3, 64), dtype)
    logits = layer.attend(query)
    assert logits.dtype == dtype
    assert_matmul(logits, query, layer.embedding)


def test_embed_errors():
    with pytest.raises(ValueError, match="features must be a positive multiple of 32, got 30"):
        MXFP4Embed(50, 30, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="integer dtype, got float32"):
        MXFP4Embed(50, 32, rngs=nnx.Rngs(0))(jnp.ones(3))
    with pytest.raises(ValueError, match="embedding must have shape"):
        MXFP4Embed.from_packed(mx.quantize(jnp.ones(32)))


# MoE ---------------------------------------------------------------------------------------------


def moe(implementation=None, **kwargs):
    kwargs = {"bias_init": nnx.initializers.normal(0.5), "dtype": jnp.float32, **kwargs}
    return MXFP4MoE(6, 64, 32, 2, rngs=nnx.Rngs(0), implementation=implementation, **kwargs)


def moe_float64(layer, x):
    """GPT-OSS's expert layer written out for one token at a time."""
    gate_up, down = decoded(layer.gate_up), decoded(layer.down)
    biased = layer.gate_up_bias is not None
    gate_up_bias = float64(layer.gate_up_bias[...]) if biased else np.zeros(gate_up.shape[:2])
    down_bias = float64(layer.down_bias[...]) if biased else np.zeros(down.shape[:2])
    logits = float64(layer.router(x))
    out = np.zeros_like(float64(x))
    for token in np.ndindex(x.shape[:-1]):
        chosen = np.argsort(-logits[token], kind="stable")[: layer.num_experts_per_token]
        weights = np.exp(logits[token][chosen] - logits[token].max())
        weights /= weights.sum()
        for expert, weight in zip(chosen, weights, strict=True):
            hidden = gate_up[expert] @ float64(x[token]) + gate_up_bias[expert]
            gate = np.minimum(hidden[0::2], layer.limit)
            up = np.clip(hidden[1::2], -layer.limit, layer.limit)
            hidden = gate / (1 + np.exp(-layer.alpha * gate)) * (up + 1)
            out[token] += weight * (down[expert] @ hidden + down_bias[expert])
    return out


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"alpha": 1.0, "limit": 0.25}])
def test_moe_is_the_gpt_oss_expert_layer(options, implementation):
    layer = moe(implementation, **options)
    x = normal(1, (2, 5, 64))
    exact = moe_float64(layer, x)
    tolerance = (gamma(64) + gamma(32)) * np.abs(exact).max()
    np.testing.assert_allclose(layer(x), exact, rtol=0, atol=tolerance)
    np.testing.assert_allclose(layer(x[0, 0]), exact[0, 0], rtol=0, atol=tolerance)


def test_moe_computes_in_dtype(implementation):
    layer = moe(implementation, dtype=jnp.bfloat16)
    x = normal(1, (5, 64), jnp.bfloat16)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    # The hidden activations are rounded to bfloat16 (8 bits), then the result.
    exact = moe_float64(layer, x)
    assert np.linalg.norm(float64(y) - exact) <= 2.0**-8 * np.linalg.norm(exact)


def test_moe_initial_kernels_have_the_fan_in_of_one_expert():
    layer = MXFP4MoE(8, 256, 128, 2, rngs=nnx.Rngs(0))
    for weight, fan_in in ((layer.gate_up, 256), (layer.down, 128)):
        assert decoded(weight).std() == pytest.approx(fan_in**-0.5, rel=0.03)


def test_moe_from_packed_is_the_same_layer():
    layer = moe()
    same = MXFP4MoE.from_packed(
        layer.router,
        layer.gate_up,
        layer.down,
        layer.gate_up_bias[...],
        layer.down_bias[...],
        num_experts_per_token=2,
    )
    assert same.router is layer.router
    assert same.intermediate_features == 32
    x = normal(1, (5, 64))
    np.testing.assert_array_equal(same(x), layer(x))


def test_moe_trains_router_and_biases_only():
    layer = moe()
    x = normal(1, (5, 64))
    gradients = nnx.grad(lambda m: jnp.sum(jnp.square(m(x))))(layer)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(gradients)}
    assert paths == {"router.kernel", "router.bias", "gate_up_bias", "down_bias"}
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradients))


def test_moe_errors():
    router = nnx.Linear(64, 6, rngs=nnx.Rngs(0))
    gate_up, down = mx.quantize(jnp.ones((6, 64, 64))), mx.quantize(jnp.ones((6, 64, 32)))

    def build(*arguments):
        return MXFP4MoE.from_packed(*arguments, num_experts_per_token=2)

    with pytest.raises(ValueError, match="intermediate_features must be a positive multiple"):
        MXFP4MoE(6, 64, 40, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"num_experts_per_token must be in 1\.\.num_experts"):
        MXFP4MoE(6, 64, 32, 7, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="down must have shape"):
        build(router, gate_up, gate_up)
    with pytest.raises(ValueError, match=r"router\.kernel must have shape"):
        build(router, gate_up[:5], down[:5])
    with pytest.raises(ValueError, match="both be given"):
        build(router, gate_up, down, jnp.ones((6, 64)))
    with pytest.raises(ValueError, match="gate_up_bias must have shape"):
        build(router, gate_up, down, jnp.ones((6, 32)), jnp.ones((6, 64)))


# Gradients and training --------------------------------------------------------------------------


def test_gradients_equal_those_of_linear_on_the_decoded_kernel(implementation):
    layer = dense(implementation=implementation)
    linear = nnx.Linear(64, 48, precision="highest", rngs=nnx.Rngs(0))
    linear.kernel[...] = mx.dequantize(layer.weight, jnp.float32).T
    linear.bias[...] = layer.bias[...]
    x, target = normal(1, (5, 64)), normal(2, (5, 48))

    def loss(model, x):
        return jnp.sum(model(x) * target)

    bias_gradient, x_gradient = nnx.grad(loss, argnums=(0, 1))(layer, x)
    expected, x_expected = nnx.grad(loss, argnums=(0, 1))(linear, x)
    assert set(bias_gradient) == {"bias"}
    np.testing.assert_array_equal(bias_gradient["bias"][...], expected["bias"][...])
    exact = expected_matmul(float64(target), decoded(layer.weight).T)
    assert_close(x_gradient, exact)
    assert_close(x_expected, exact)


def test_training_leaves_packed_weights_alone(implementation):
    model = MLP(nnx.Rngs(0), implementation)
    before = packed_state(model)
    optimizer = nnx.Optimizer(model, optax.sgd(2.0), wrt=nnx.Param)
    ids = jax.random.randint(jax.random.key(1), (8, 4), 0, 50)

    def loss(model):
        logits = model(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, (ids + 1) % 50).mean()

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    assert_trees_equal(packed_state(model), before)
    assert len(before) == 6


def test_lora_trains_on_a_packed_base():
    base = dense(64, 32)
    layer = nnx.LoRA(64, 4, 32, base_module=base, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(layer, optax.sgd(0.5), wrt=nnx.LoRAParam)
    x, target = normal(1, (16, 64)), normal(2, (16, 32))
    weight, bias = base.weight, base.bias[...]

    @nnx.jit
    def step(layer, optimizer):
        def loss(layer):
            return jnp.mean(jnp.square(layer(x) - target))

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, gradients = nnx.value_and_grad(loss, argnums=wrt)(layer)
        optimizer.update(layer, gradients)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    assert_trees_equal((base.weight, base.bias[...]), (weight, bias))


# Transformations and state -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        nnx.jit,
        jax.jit,
        lambda apply: lambda layer, x: jax.vmap(layer)(x),
        lambda apply: nnx.vmap(apply, in_axes=(None, 0)),
        nnx.remat,
    ],
    ids=["nnx.jit", "jax.jit", "jax.vmap", "nnx.vmap", "nnx.remat"],
)
def test_transformations_of_a_layer(transform, implementation):
    layer = dense(implementation=implementation)
    x = normal(1, (4, 3, 64))
    y = transform(lambda layer, x: layer(x))(layer, x)
    assert_matmul(y, x, layer.weight, layer.bias[...])


def test_gradient_under_remat(implementation):
    layer = dense(implementation=implementation)
    x, target = normal(1, (3, 64)), normal(2, (3, 48))

    @nnx.remat
    def loss(layer, x):
        return jnp.sum(layer(x) * target)

    gradient = nnx.jit(nnx.grad(loss, argnums=1))(layer, x)
    assert_close(gradient, expected_matmul(float64(target), decoded(layer.weight).T))


def test_layers_created_by_vmap_run_under_scan(implementation):
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return MXFP4Dense(64, 64, rngs=rngs, implementation=implementation)

    stack = create(nnx.Rngs(0).split(3))
    assert stack.weight.shape == (3, 64, 64)
    x = normal(1, (5, 64))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    expected = x
    for i in range(3):
        expected = MXFP4Dense.from_packed(stack.weight[i], stack.bias[i])(expected)
    tolerance = 3 * gamma(64) * np.abs(expected).max()
    np.testing.assert_allclose(run(stack, x), expected, rtol=0, atol=tolerance)


def test_split_and_merge():
    model = MLP(nnx.Rngs(0))
    graphdef, params, packed = nnx.split(model, nnx.Param, MXFP4Weight)
    assert {path[-1] for path, _ in nnx.to_flat_state(packed)} == {
        "embedding_blocks",
        "embedding_scales",
        "weight_blocks",
        "weight_scales",
    }
    ids = jnp.arange(5)
    np.testing.assert_array_equal(nnx.merge(graphdef, params, packed)(ids), model(ids))


def test_abstract_model_is_filled_from_a_pure_dict():
    model = MLP(nnx.Rngs(0))
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    abstract = nnx.eval_shape(lambda: MLP(nnx.Rngs(1)))
    assert abstract.up.weight.shape == (96, 64)
    assert isinstance(abstract.up.weight.blocks, jax.ShapeDtypeStruct)
    graphdef, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, saved)
    ids = jnp.arange(5)
    np.testing.assert_array_equal(nnx.merge(graphdef, state)(ids), model(ids))


def test_linen_bridge_names_the_collection():
    module = nnx.bridge.to_linen(MXFP4Dense, 64, 32)
    x = normal(1, (2, 64))
    variables = module.init(jax.random.key(0), x)
    assert set(variables) >= {"params", "mxfp4"}
    assert set(variables["mxfp4"]) == {"weight_blocks", "weight_scales"}
    assert set(variables["params"]) == {"bias"}
    assert module.apply(variables, x).shape == (2, 32)


# Sharding metadata -------------------------------------------------------------------------------
#
# Of canonical weights, and therefore without kernels; of prepared ones see test_flax_layouts.py.


@pytest.fixture
def mesh():
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def active_mesh(mesh):
    with jax.set_mesh(mesh):
        yield mesh


def test_kernel_sharding_is_translated(active_mesh, no_kernels):
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    by_initializer = dense(kernel_init=kernel_init)
    by_metadata = dense(kernel_metadata={"out_sharding": ("data", "model")})
    for layer in (by_initializer, by_metadata):
        specs = nnx.get_partition_spec(nnx.state(layer))
        assert specs["weight_blocks"].get_value() == PartitionSpec("model", "data", None)
        assert specs["weight_scales"].get_value() == PartitionSpec("model", "data")


def test_kernel_sharding_keeps_its_kind(mesh, no_kernels):
    named = NamedSharding(mesh, PartitionSpec(None, "model"))
    layer = dense(kernel_metadata={"out_sharding": named})
    blocks = NamedSharding(mesh, PartitionSpec("model", None, None))
    assert layer.weight_blocks.get_metadata("out_sharding") == blocks
    with jax.set_mesh(mesh):
        layer = dense(kernel_metadata={"out_sharding": PartitionSpec("data")})
    assert layer.weight_scales.get_metadata("out_sharding") == PartitionSpec(None, "data")


def test_vmap_adds_its_axis_to_the_sharding(active_mesh, no_kernels):
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
    def create(rngs):
        return MXFP4Dense(
            64, 32, rngs=rngs, kernel_metadata={"out_sharding": (None, "model")}, use_bias=False
        )

    layer = create(nnx.Rngs(0).split(2))
    assert layer.weight_blocks.get_metadata("out_sharding") == (None, "model", None, None)
    assert layer.weight_scales.get_metadata("out_sharding") == (None, "model", None)


def test_embedding_sharding_is_extended(active_mesh, no_kernels):
    metadata = {"out_sharding": ("model", "data")}
    layer = MXFP4Embed(50, 64, rngs=nnx.Rngs(0), embedding_metadata=metadata)
    assert layer.embedding_blocks.get_metadata("out_sharding") == ("model", "data", None)
    assert layer.embedding_scales.get_metadata("out_sharding") == ("model", "data")


def test_sharding_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"out_sharding must be .* at most 2 axes"):
        dense(kernel_metadata={"out_sharding": (None, None, "model")})
