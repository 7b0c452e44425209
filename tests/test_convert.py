"""Packing whole NNX models: which modules, what stays, and what is reported."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from tolerance import gamma

import jax_mxfp4 as mx
from flax_layers import MXFP4Dense, MXFP4Embed, MXFP4MoE, MXFP4Weight, quantize_model


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.up = nnx.Linear(64, 96, rngs=rngs)
        self.down = nnx.Linear(96, 64, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 64, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(64, 50, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Holder(nnx.Module):
    """A module with the given attributes."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


def model():
    return Model(nnx.Rngs(0))


def linear(in_features=64, out_features=32, **kwargs):
    return nnx.Linear(in_features, out_features, rngs=nnx.Rngs(0), **kwargs)


def entries(report):
    return {module.path: module for module in report.modules}


def only(report):
    (module,) = report.modules
    return module


def snapshot(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


# What becomes of a model -------------------------------------------------------------------------


def test_everything_that_can_be_packed_is_packed():
    packed, report = quantize_model(model(), ".*")
    assert [m.path for m in report.modules] == [
        "embed",
        "blocks.0.norm",
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.norm",
        "blocks.1.up",
        "blocks.1.down",
        "head",
    ]
    assert [m.path for m in report.kept] == ["blocks.0.norm", "blocks.1.norm"]
    assert len(report.packed) == 6
    assert type(packed.embed) is MXFP4Embed
    assert type(packed.head) is type(packed.blocks[1].down) is MXFP4Dense
    assert packed.blocks[1].down.bias is None
    assert type(packed.blocks[0].norm) is nnx.LayerNorm


def test_packed_model_computes_what_the_decoded_one_does():
    original = model()
    packed, _ = quantize_model(original, ".*", scale_rule="mse")
    decoded = nnx.clone(original)
    decoded.embed.embedding[...] = mx.dequantize(packed.embed.embedding, jnp.float32)
    pairs = [(decoded.head, packed.head)]
    for a, b in zip(decoded.blocks, packed.blocks, strict=True):
        pairs += [(a.up, b.up), (a.down, b.down)]
    for layer, packed_layer in pairs:
        layer.kernel[...] = mx.dequantize(packed_layer.weight, jnp.float32).T
        layer.precision = "highest"
    expected = mx.quantize(original.head.kernel[...].T, "mse")
    np.testing.assert_array_equal(mx.canonical(packed.head.weight).blocks, expected.blocks)
    ids = jnp.arange(12).reshape(3, 4)
    exact = decoded(ids)
    # Five chained sums of at most 96 products; either side may be off.
    tolerance = 2 * 5 * gamma(96) * np.abs(exact).max()
    np.testing.assert_allclose(packed(ids), exact, rtol=0, atol=tolerance)
    jitted = nnx.jit(lambda m, x: m(x))(packed, ids)
    np.testing.assert_allclose(jitted, exact, rtol=0, atol=tolerance)


def test_the_given_model_is_not_changed():
    original = model()
    before = snapshot(original)
    packed, _ = quantize_model(original, ".*")
    packed.head.bias[...] = jnp.ones(50)
    packed.blocks[0].norm.scale[...] = jnp.zeros(64)
    packed.added = 1
    assert type(original.head) is nnx.Linear
    assert not hasattr(original, "added")
    jax.tree.map(np.testing.assert_array_equal, snapshot(original), before)


def test_arrays_that_are_not_packed_are_shared():
    original = model()
    packed, _ = quantize_model(original, "head")
    assert packed.embed.embedding[...] is original.embed.embedding[...]
    assert packed.head.bias[...] is original.head.bias[...]
    assert packed.head.bias is not original.head.bias


def test_attributes_of_the_layers_are_kept():
    original = Holder(
        dense=linear(dtype=jnp.bfloat16, preferred_element_type=jnp.float32),
        embed=nnx.Embed(10, 32, dtype=jnp.float16, rngs=nnx.Rngs(0)),
    )
    packed, _ = quantize_model(original, ".*", implementation="reference")
    assert packed.dense.dtype == jnp.bfloat16
    assert packed.dense.preferred_element_type == jnp.float32
    assert packed.embed.dtype == jnp.float16
    assert packed.dense.implementation == packed.embed.implementation == "reference"
    assert packed.embed(jnp.arange(3)).dtype == jnp.float16
    assert packed.dense(jnp.ones((2, 64), jnp.bfloat16)).dtype == jnp.float32


def test_a_converted_model_has_the_structure_of_a_constructed_one():
    converted, _ = quantize_model(linear(), ".*")
    constructed = MXFP4Dense(64, 32, rngs=nnx.Rngs(0))
    assert nnx.graphdef(converted) == nnx.graphdef(constructed)


def test_a_packed_model_trains_and_splits():
    packed, _ = quantize_model(model(), ".*")
    frozen = snapshot(nnx.state(packed, MXFP4Weight))
    optimizer = nnx.Optimizer(packed, optax.sgd(1.0), wrt=nnx.Param)
    ids = jnp.arange(12)

    @nnx.jit
    def step(packed, optimizer):
        def loss(packed):
            logits = packed(ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids + 1).mean()

        value, gradients = nnx.value_and_grad(loss)(packed)
        optimizer.update(packed, gradients)
        return value

    losses = [float(step(packed, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, snapshot(nnx.state(packed, MXFP4Weight)), frozen)
    np.testing.assert_array_equal(nnx.merge(*nnx.split(packed))(ids), packed(ids))


# References, containers, stacks, abstract models -------------------------------------------------


def test_shared_modules_stay_shared():
    shared = linear()
    original = Holder(a=shared, b=shared, other=linear())
    packed, report = quantize_model(original, "b|other")
    assert packed.a is packed.b
    assert type(packed.a) is MXFP4Dense
    assert packed.other is not packed.a
    assert (report.modules[0].path, report.modules[0].aliases) == ("a", ("b",))


def test_tied_embedding_stays_one_object():
    embed = nnx.Embed(50, 64, rngs=nnx.Rngs(0))
    packed, report = quantize_model(Holder(encoder=embed, logits=Holder(embed=embed)), ".*")
    assert packed.encoder is packed.logits.embed
    assert type(packed.encoder) is MXFP4Embed
    assert only(report).aliases == ("logits.embed",)


def test_tied_biases_stay_tied():
    a, b = linear(), linear()
    b.bias = a.bias
    packed, _ = quantize_model(Holder(a=a, b=b), ".*")
    assert packed.a.bias is packed.b.bias


@pytest.mark.parametrize(
    "container",
    [
        lambda layers: nnx.List(layers),
        lambda layers: nnx.data(list(layers)),
        lambda layers: nnx.data(tuple(layers)),
        lambda layers: nnx.Sequential(*layers),
    ],
    ids=["nnx.List", "list", "tuple", "nnx.Sequential"],
)
def test_sequences(container):
    packed, report = quantize_model(Holder(layers=container([linear(), linear()])), r".*\.1")
    layers = packed.layers.layers if isinstance(packed.layers, nnx.Sequential) else packed.layers
    assert [type(layer) for layer in layers] == [nnx.Linear, MXFP4Dense]
    assert only(report).path.endswith(".1")


@pytest.mark.parametrize("container", [nnx.Dict, nnx.data], ids=["nnx.Dict", "dict"])
def test_dictionaries(container):
    packed, report = quantize_model(
        Holder(heads=container({"x": linear(), "y": linear()})), r".*\.y"
    )
    assert type(packed.heads["x"]) is nnx.Linear
    assert type(packed.heads["y"]) is MXFP4Dense
    assert only(report).path == "heads.y"


def test_modules_that_refer_back_to_their_parent():
    parent, child = Holder(), Holder(dense=linear())
    parent.child, child.parent = child, parent
    packed, report = quantize_model(parent, ".*")
    assert packed.child.parent is packed
    assert type(packed.child.dense) is MXFP4Dense
    assert only(report).path == "child.dense"


def test_a_layer_by_itself():
    packed, report = quantize_model(linear(), ".*")
    assert type(packed) is MXFP4Dense
    assert only(report).path == ""


def test_stacks_of_layers():
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return nnx.Linear(64, 64, rngs=rngs)

    stack = create(nnx.Rngs(0).split(3))
    packed, report = quantize_model(stack, ".*")
    assert only(report).shape == (3, 64, 64)
    assert packed.weight.shape == (3, 64, 64)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    expected = x = jnp.ones((2, 64))
    for i in range(3):
        weight = mx.quantize(stack.kernel[i].T)
        expected = MXFP4Dense.from_packed(weight, stack.bias[i])(expected)
    tolerance = 2 * 3 * gamma(64) * np.abs(expected).max()
    np.testing.assert_allclose(run(packed, x), expected, rtol=0, atol=tolerance)


def test_abstract_models():
    abstract = nnx.eval_shape(model)
    packed, report = quantize_model(abstract, ".*")
    assert isinstance(packed.head.weight.blocks, jax.ShapeDtypeStruct)
    assert isinstance(abstract.head.kernel.get_value(), jax.ShapeDtypeStruct)
    real, real_report = quantize_model(model(), ".*")
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(real)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(packed))) == shapes
    assert report.model_bytes_after == real_report.model_bytes_after
    assert all(m.sqnr_db is None for m in report.modules)
    nnx.update(packed, nnx.state(real))
    np.testing.assert_array_equal(packed(jnp.arange(4)), real(jnp.arange(4)))


def test_under_eval_shape():
    packed = nnx.eval_shape(lambda: quantize_model(model(), ".*")[0])
    assert isinstance(packed.head.weight.blocks, jax.ShapeDtypeStruct)


def test_partition_metadata_is_translated(no_kernels):
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        original = linear(
            kernel_metadata={"out_sharding": (None, "model")},
            bias_metadata={"out_sharding": ("model",)},
        )
    packed, _ = quantize_model(original, ".*")
    assert packed.weight_blocks.get_metadata("out_sharding") == ("model", None, None)
    assert packed.weight_scales.get_metadata("out_sharding") == ("model", None)
    assert packed.bias.get_metadata("out_sharding") == ("model",)


# Rules -------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_decides():
    original = model()
    packed, report = quantize_model(
        original,
        [
            (r"blocks\.0\..*", {"scale_rule": "floor", "dtype": jnp.bfloat16}),
            ("head", False),
            ("embed", None),
            (r".*\.(up|down)|head", {}),
        ],
        scale_rule="rceil",
    )
    for i, rule in enumerate(("floor", "rceil")):
        expected = mx.quantize(original.blocks[i].up.kernel[...].T, rule)
        np.testing.assert_array_equal(packed.blocks[i].up.weight.scales, expected.scales)
    assert packed.blocks[0].up.dtype == jnp.bfloat16
    assert packed.blocks[1].up.dtype is None
    actions = {path: entry.action for path, entry in entries(report).items()}
    assert actions["head"] == actions["embed"] == "excluded"
    assert "blocks.1.norm" not in actions
    assert type(packed.head) is nnx.Linear


@pytest.mark.parametrize("rules", ["Block", "blocks", "up", [(".*", {}), ("heads", None)]])
def test_a_rule_that_matches_nothing_is_an_error(rules):
    name = rules if isinstance(rules, str) else rules[1][0]
    with pytest.raises(ValueError, match=f"rule '{name}' matches no module .* 8: embed, blocks"):
        quantize_model(model(), rules)


def test_bad_rules():
    with pytest.raises(ValueError, match=r"rule '\(' is not a regular expression"):
        quantize_model(model(), "(")
    with pytest.raises(ValueError, match=r"rule '\.\*': unknown options \['rule'\]"):
        quantize_model(model(), [(".*", {"rule": "even"})])
    with pytest.raises(ValueError, match="scale_rule must be one of floor, even, rceil, mse"):
        quantize_model(model(), ".*", scale_rule="best")
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16 or float16, got int8"):
        quantize_model(model(), [(".*", {"dtype": jnp.int8})])
    with pytest.raises(TypeError, match="options must be a dict, None or False"):
        quantize_model(model(), [(".*", True)])
    with pytest.raises(TypeError, match="a rule must be"):
        quantize_model(model(), ["head", "embed"])
    with pytest.raises(TypeError, match="rules must be"):
        quantize_model(model(), [])
    with pytest.raises(TypeError, match=r"model must be an nnx\.Module, got dict"):
        quantize_model({}, ".*")


def test_packed_modules_are_not_packed_again():
    original = Holder(moe=MXFP4MoE(4, 32, 32, 2, rngs=nnx.Rngs(0)), dense=linear())
    packed, report = quantize_model(original, ".*")
    assert [m.path for m in report.modules] == ["dense"]
    assert type(packed.moe.router) is nnx.Linear
    with pytest.raises(ValueError, match="matches no module"):
        quantize_model(packed, ".*")


# What cannot be packed ---------------------------------------------------------------------------


class OwnLinear(nnx.Linear):
    pass


def own_promotion(arrays, *, dtype=None):
    return arrays


def hooked():
    layer = linear()
    layer.kernel.set_metadata(on_get_value=lambda variable, value: value * 2)
    return layer


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: linear(33), "in_features=33 is not a multiple of 32"),
        (lambda: nnx.Embed(9, 40, rngs=nnx.Rngs(0)), "features=40 is not a multiple of 32"),
        (lambda: OwnLinear(64, 32, rngs=nnx.Rngs(0)), "a subclass may use its kernel"),
        (lambda: linear(dot_general=lambda *args, **kwargs: None), "its own dot_general"),
        (lambda: linear(promote_dtype=own_promotion), "its own promote_dtype"),
        (lambda: linear(param_dtype=jnp.complex64), "its kernel has dtype complex64"),
        (lambda: linear(dtype=np.float64), "it computes in float64"),
        (hooked, "its kernel has Variable hooks"),
        (lambda: nnx.LayerNorm(64, rngs=nnx.Rngs(0)), "no packed form"),
        (lambda: nnx.LinearGeneral(64, (4, 8), rngs=nnx.Rngs(0)), "no packed form"),
        (lambda: nnx.Einsum("ab,bc->ac", (64, 32), rngs=nnx.Rngs(0)), "no packed form"),
        (lambda: nnx.Conv(32, 32, (3,), rngs=nnx.Rngs(0)), "no packed form"),
    ],
)
def test_what_cannot_be_packed_is_kept_and_reported(build, reason):
    original = Holder(layer=build(), dense=linear())
    packed, report = quantize_model(original, ".*")
    entry = entries(report)["layer"]
    assert entry.action == "kept"
    assert reason in entry.reason
    assert entry.kind == type(original.layer).__name__ == type(packed.layer).__name__
    assert entry.bytes_before == entry.bytes_after > 0
    assert type(packed.dense) is MXFP4Dense
    assert f"kept: {entry.reason}" in str(report)


def test_lora_linear_is_kept():
    layer = nnx.LoRALinear(64, 32, lora_rank=4, rngs=nnx.Rngs(0))
    packed, report = quantize_model(Holder(layer=layer), ".*")
    assert type(packed.layer) is nnx.LoRALinear
    assert {m.path for m in report.kept} == {"layer", "layer.lora"}


def test_lora_around_a_linear_is_packed_inside():
    lora = nnx.LoRA(64, 4, 32, base_module=linear(), rngs=nnx.Rngs(0))
    packed, _ = quantize_model(lora, "base_module")
    assert type(packed.base_module) is MXFP4Dense
    assert packed(jnp.ones((2, 64))).shape == (2, 32)


def test_kernels_that_a_parent_rewrites_are_kept():
    norm = nnx.WeightNorm(linear(), rngs=nnx.Rngs(0))
    packed, report = quantize_model(norm, "layer_instance")
    assert type(packed.layer_instance) is nnx.Linear
    assert only(report).reason == "its kernel is rewritten by WeightNorm"


def test_stacks_along_another_axis_are_kept():
    @nnx.vmap(in_axes=0, out_axes=1)
    def create(rngs):
        return nnx.Linear(64, 32, rngs=rngs)

    _, report = quantize_model(Holder(stack=create(nnx.Rngs(0).split(3))), ".*")
    assert only(report).reason == "its kernel has shape (64, 3, 32), which does not end in (64, 32)"


# The report --------------------------------------------------------------------------------------


def test_report_numbers():
    original = model()
    packed, report = quantize_model(original, "head|embed")
    head, embed = entries(report)["head"], entries(report)["embed"]
    assert (head.kind, head.shape) == ("Linear", (64, 50))
    assert (embed.kind, embed.shape) == ("Embed", (50, 64))
    assert head.bytes_before == 4 * (64 * 50 + 50)
    assert head.bytes_after == 64 * 50 // 32 * 17 + 4 * 50
    assert report.model_bytes_before == 4 * sum(
        a.size for a in jax.tree.leaves(nnx.state(original))
    )
    saved = sum(m.bytes_before - m.bytes_after for m in report.modules)
    assert report.model_bytes_after == report.model_bytes_before - saved
    kernel = np.asarray(original.head.kernel[...].T, np.float64)
    noise = kernel - np.asarray(mx.dequantize(packed.head.weight, jnp.float32), np.float64)
    expected = 10 * np.log10(np.sum(kernel**2) / np.sum(noise**2))
    assert head.sqnr_db == pytest.approx(expected, abs=1e-3)


def test_sqnr_of_a_kernel_without_error_is_infinite():
    _, report = quantize_model(linear(kernel_init=nnx.initializers.ones), ".*")
    assert only(report).sqnr_db == math.inf


def test_report_table():
    _, report = quantize_model(model(), [("head", None), (".*", {})])
    lines = str(report).splitlines()
    assert len(lines) == 1 + 8 + 1
    assert lines[0].split()[:3] == ["path", "kind", "shape"]
    assert lines[1].split()[:5] == ["embed", "Embed", "50x64", "12,800", "1,700"]
    assert lines[8].split() == ["head", "Linear", "64x50", "13,000", "excluded"]
    assert lines[9].startswith("5 of 8 matched modules packed; model ")
