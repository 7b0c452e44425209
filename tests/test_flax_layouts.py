"""Layouts of packed weights in Flax layers: who prepares them, and how variables tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization
from jax.sharding import PartitionSpec

import jax_mxfp4 as mx
from flax_layers import MXFP4Dense, MXFP4Embed, MXFP4MoE, MXFP4Weight, quantize_model, with_layout
from flax_layers.linen import MXFP4Dense as LinenDense

RNG = np.random.default_rng(0)


class Model(nnx.Module):
    """Every kind of layer, twice where one is packed later; the reference runs everywhere."""

    def __init__(self, rngs):
        options = {"implementation": "reference", "rngs": rngs}
        self.embed = MXFP4Embed(50, 128, **options)
        self.experts = MXFP4MoE(4, 128, 64, 2, **options)
        # Scales [4, 4], whose shape could be that of a prepared block.
        self.narrow = MXFP4Dense(128, 4, **options)
        # Scales [8, 16], whose shape could be that of canonical blocks.
        self.wide = nnx.Sequential(nnx.Linear(4, 512, rngs=rngs), MXFP4Dense(512, 8, **options))

    def __call__(self, ids):
        return self.wide(self.narrow(self.experts(self.embed(ids))))


IDS = RNG.integers(0, 50, (2, 3), np.int32)
PACKED = ("embed.embedding", "experts.gate_up", "experts.down", "narrow.weight")


def weights(model):
    named = {name: model for name in PACKED}
    for name in PACKED:
        for attribute in name.split("."):
            named[name] = getattr(named[name], attribute)
    return named | {"wide.weight": model.wide.layers[1].weight}


def layouts(model):
    return {w.layout for w in weights(model).values()}


def assert_same(actual, expected):
    found, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected))
    assert [path for path, _ in found] == [path for path, _ in wanted]
    for (path, leaf), (_, other) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(leaf, other, strict=True, err_msg=jax.tree_util.keystr(path))


@pytest.fixture
def canonical_model():
    return with_layout(Model(nnx.Rngs(0)), "canonical")


def test_layers_prepare_their_weights_on_cuda(canonical_model, like_cuda):
    model = Model(nnx.Rngs(0))
    assert layouts(canonical_model) == {"canonical"}
    assert layouts(model) == {"prepared"}
    assert model.narrow.weight_blocks.shape == (4, 4, 4, 4)
    assert model.narrow.weight_scales.shape == (4, 4)
    assert model.experts.gate_up_blocks.shape == (4, 128, 4, 4, 4)
    assert_same(weights(model), mx.prepare(weights(canonical_model)))
    np.testing.assert_array_equal(model(IDS), canonical_model(IDS))
    np.testing.assert_array_equal(jax.jit(lambda m: m(IDS))(model), canonical_model(IDS))


def test_abstract_layers_are_like_real_ones(like_cuda):
    real, abstract = Model(nnx.Rngs(0)), nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    described = jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(real)))
    found = jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(abstract)))
    assert found == described
    assert layouts(abstract) == {"prepared"}


@pytest.mark.parametrize("layout", ["canonical", "prepared"])
def test_layers_around_arrays_of_either_layout(layout):
    """Everywhere; but on CUDA canonical arrays are prepared."""
    convert = {"canonical": mx.canonical, "prepared": mx.prepare}[layout]
    x = jnp.asarray(RNG.standard_normal((3, 64)), jnp.float32)
    packed = convert(mx.quantize(jnp.asarray(RNG.standard_normal((48, 64)), jnp.float32)))
    experts = mx.quantize(jnp.asarray(RNG.standard_normal((4, 128, 64)), jnp.float32))
    down = mx.quantize(jnp.asarray(RNG.standard_normal((4, 64, 64)), jnp.float32))
    router = nnx.Linear(64, 4, rngs=nnx.Rngs(0))
    options = {"implementation": "reference"}
    expected = mx.matmul(x, packed, **options)
    np.testing.assert_array_equal(MXFP4Dense.from_packed(packed, **options)(x), expected)
    embed = MXFP4Embed.from_packed(packed, **options)
    np.testing.assert_array_equal(embed.attend(x), expected)
    np.testing.assert_array_equal(embed(jnp.arange(48)), mx.dequantize(packed, jnp.float32))
    moe, same = (
        MXFP4MoE.from_packed(router, gate_up, down, num_experts_per_token=2, **options)
        for gate_up in (experts, convert(experts))
    )
    np.testing.assert_array_equal(moe(x), same(x))
    described = mx.MXFP4Array.shape_dtype((48, 64), layout)
    weight = MXFP4Dense.from_packed(described).weight
    assert jax.tree.leaves(weight) == jax.tree.leaves(described)


def test_given_arrays_stay_usable_on_cuda(like_cuda):
    packed = mx.quantize(jnp.ones((48, 64)))
    assert MXFP4Dense.from_packed(packed).weight.layout == "prepared"
    assert not packed.blocks.is_deleted()


def test_quantize_model_prepares_on_cuda(like_cuda):
    linear = nnx.Sequential(
        nnx.Linear(64, 96, rngs=nnx.Rngs(0)), nnx.Embed(50, 64, rngs=nnx.Rngs(1))
    )
    model, report = quantize_model(linear, ".*", implementation="reference")
    dense, embed = model.layers
    assert (dense.weight.layout, embed.embedding.layout) == ("prepared", "prepared")
    assert_same(dense.weight, mx.prepare(mx.quantize(linear.layers[0].kernel[...].T)))
    assert all(10 < module.sqnr_db < 40 for module in report.modules)
    assert report.packed[0].bytes_after == dense.weight.nbytes + dense.bias.nbytes


def test_stacks_of_layers_on_cuda(like_cuda):
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return MXFP4Dense(64, 64, rngs=rngs, implementation="reference")

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    stack = create(nnx.Rngs(0).split(3))
    assert (stack.weight.shape, stack.weight.layout) == ((3, 64, 64), "prepared")
    x = jnp.asarray(RNG.standard_normal((5, 64)), jnp.float32)
    np.testing.assert_array_equal(run(stack, x), run(with_layout(stack, "canonical"), x))


def test_sharding_metadata_has_an_entry_for_each_axis(like_cuda):
    for sharding in (("in", "out"), PartitionSpec("in", "out")):
        metadata = {"out_sharding": sharding, "eager_sharding": False}
        layer = MXFP4Dense(64, 48, rngs=nnx.Rngs(0), kernel_metadata=metadata)
        for model, inner in ((layer, (None, None)), (with_layout(layer, "canonical"), (None,))):
            found = model.weight_blocks.get_metadata()["out_sharding"]
            assert isinstance(found, type(sharding))
            assert tuple(found) == ("out", "in", *inner)
            assert tuple(model.weight_scales.get_metadata()["out_sharding"]) == ("out", "in")


# with_layout -------------------------------------------------------------------------------------


def pure_dict(state):
    return nnx.to_pure_dict(state)


@pytest.mark.parametrize("form", [lambda state: state, pure_dict], ids=["state", "dict"])
def test_state_in_both_layouts(canonical_model, form):
    canonical = form(nnx.state(canonical_model))
    prepared = with_layout(canonical, "prepared")
    assert jax.tree.structure(prepared) == jax.tree.structure(canonical)
    changed = [
        jax.tree_util.keystr(path)
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(prepared), jax.tree.leaves(canonical), strict=True
        )
        if new is not old
    ]
    assert len(changed) == 5
    assert all("_blocks" in path for path in changed)
    assert_same(with_layout(prepared, "canonical"), canonical)
    again = with_layout(prepared, "prepared")
    assert all(
        a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(prepared), strict=True)
    )


def test_models_in_both_layouts(canonical_model):
    prepared = with_layout(canonical_model, "prepared")
    assert (layouts(canonical_model), layouts(prepared)) == ({"canonical"}, {"prepared"})
    assert isinstance(prepared, Model)
    assert isinstance(prepared.narrow.weight_blocks, MXFP4Weight)
    assert_same(weights(prepared), mx.prepare(weights(canonical_model)))
    np.testing.assert_array_equal(prepared(IDS), canonical_model(IDS))


def test_any_state_fits_any_model(canonical_model):
    """The variables say themselves what they hold."""
    prepared = with_layout(canonical_model, "prepared")
    expected, other = canonical_model(IDS), with_layout(Model(nnx.Rngs(1)), "canonical")
    assert np.any(other(IDS) != expected)
    nnx.update(other, nnx.state(prepared))
    assert layouts(other) == {"prepared"}
    np.testing.assert_array_equal(other(IDS), expected)
    nnx.update(prepared, nnx.state(canonical_model))
    np.testing.assert_array_equal(prepared(IDS), expected)


def test_a_checkpoint_of_one_layout_does_not_fit_the_other(canonical_model, like_cuda):
    """What restores arrays by their shapes, as Orbax does, sees the difference in each."""
    abstract = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    for (path, wanted), saved in zip(
        jax.tree_util.tree_leaves_with_path(abstract),
        jax.tree.leaves(nnx.state(canonical_model)),
        strict=True,
    ):
        assert (wanted.shape != saved.shape) == ("_blocks" in jax.tree_util.keystr(path))
    target = with_layout(abstract, "canonical")
    assert jax.tree.map(jnp.shape, target) == jax.tree.map(jnp.shape, nnx.state(canonical_model))


def test_restored_models_are_prepared_on_cuda_by_default(canonical_model, like_cuda):
    assert layouts(with_layout(canonical_model)) == {"prepared"}


def test_elsewhere_the_default_changes_nothing(canonical_model, no_kernels):
    prepared = with_layout(canonical_model, "prepared")
    for model, layout in ((canonical_model, "canonical"), (prepared, "prepared")):
        assert layouts(with_layout(model)) == {layout}


def test_unknown_layout(canonical_model):
    with pytest.raises(ValueError, match='layout must be "canonical" or "prepared", got \'cuda\''):
        with_layout(canonical_model, "cuda")


def test_blocks_that_do_not_fit_their_scales():
    variables = {"weight_blocks": np.zeros((3, 2, 4, 4), np.uint8)}
    variables["weight_scales"] = np.zeros((3, 3), np.uint8)
    with pytest.raises(ValueError, match="blocks must have shape"):
        with_layout(variables, "canonical")


def test_other_arrays_called_blocks_are_left_alone():
    variables = {"building_blocks": np.ones(3), "deep": {"weight_blocks": np.ones(2)}}
    assert with_layout(variables, "prepared") == variables


# Linen -------------------------------------------------------------------------------------------


class LinenModel(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(LinenDense(128, implementation="reference")(x))
        return LinenDense(4, implementation="reference")(hidden)


X = jnp.asarray(RNG.standard_normal((3, 64)), jnp.float32)


def test_linen_layers_prepare_on_cuda(no_kernels, request):
    canonical = LinenModel().init(jax.random.key(0), X)
    expected = LinenModel().apply(canonical, X)
    request.getfixturevalue("like_cuda")
    variables = LinenModel().init(jax.random.key(0), X)
    assert variables["mxfp4"]["MXFP4Dense_1"]["weight_blocks"].shape == (4, 4, 4, 4)
    assert_same(variables, with_layout(canonical, "prepared"))
    assert_same(with_layout(variables, "canonical"), canonical)
    described = jax.eval_shape(lambda key: LinenModel().init(key, X), jax.random.key(0))
    assert jax.tree.map(jnp.shape, described) == jax.tree.map(jnp.shape, variables)
    for given in (canonical, variables):
        np.testing.assert_array_equal(LinenModel().apply(given, X), expected)
    # Bytes that were saved with one layout, read into variables of the other.
    restored = serialization.from_bytes(canonical, serialization.to_bytes(variables))
    assert_same(restored, variables)
    np.testing.assert_array_equal(LinenModel().apply(restored, X), expected)
