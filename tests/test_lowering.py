"""What the operations become in StableHLO, checked without a GPU and without compiled kernels."""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from oracle import random_integers, random_weight

import jax_mxfp4 as mx
from jax_mxfp4.ffi import TARGETS, moe_schedule_size

RNG = np.random.default_rng(0)
V = N = 24
K, M, P = 64, 5, 3
W = random_weight(RNG, N, K, scales=(125, 128))
X = random_integers(RNG, M, K, dtype=np.dtype(np.float32))
IDS = RNG.integers(0, V, P, np.int32)
E, TOP_K, I = 4, 2, 32  # noqa: E741
GATE_UP, DOWN = random_weight(RNG, E, 2 * I, K), random_weight(RNG, E, K, I)
EXPERT_IDS = RNG.integers(0, E, (M, TOP_K), np.int32)
SHARES = RNG.random((M, TOP_K), np.float32)
GATE_UP_BIAS = jnp.ones((E, 2 * I), jnp.bfloat16)

OPS = {
    "dequantize": (mx.dequantize, (W,)),
    "take": (mx.take, (W, IDS)),
    "matmul": (mx.matmul, (X, W)),
    "moe": (mx.moe, (X, EXPERT_IDS, SHARES, GATE_UP, GATE_UP_BIAS, DOWN, None)),
}


@pytest.fixture(autouse=True)
def on_cpu():
    """Everything here is about lowering; what runs at all runs on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@dataclass(frozen=True)
class CustomCall:
    """One custom call of a module, types written as StableHLO does ("24x2x16xui8")."""

    target: str
    attributes: str
    operands: list[str]
    results: list[str]


def exported(f, *args, platforms=("cuda",)) -> export.Exported:
    # A new function each time: jax.jit would remember how another test traced the old one.
    jitted = jax.jit(lambda *args: f(*args))
    checks = mx.DISABLE_EXPORT_CHECKS
    return export.export(jitted, platforms=platforms, disabled_checks=checks)(*args)


def custom_calls(module: str) -> list[CustomCall]:
    pattern = (
        r"stablehlo\.custom_call @(jax_mxfp4_\w+)\(.*?mhlo\.backend_config = \{(.*?)\}.*?\}"
        r" : \((.*?)\) -> (.*?)(?: loc\(.*)?$"
    )
    return [
        CustomCall(
            target,
            attributes,
            re.findall(r"tensor<(.*?)>", ins),
            re.findall(r"tensor<(.*?)>", outs),
        )
        for target, attributes, ins, outs in re.findall(pattern, module, re.MULTILINE)
    ]


def calls_of(f, *args) -> list[CustomCall]:
    return custom_calls(exported(f, *args).mlir_module())


# The contract with the handlers ------------------------------------------------------------------


def test_dequantize_call(kernels_registered):
    [call] = calls_of(lambda w: mx.dequantize(w, jnp.float16), W)
    assert call == CustomCall(
        "jax_mxfp4_dequantize", "prepared = false", ["24x2x16xui8", "24x2xui8"], ["24x64xf16"]
    )


def test_take_call(kernels_registered):
    for ids in (IDS, IDS.astype(np.uint8), IDS.astype(np.uint32), IDS[None, :, None]):
        [call] = calls_of(mx.take, W, ids)
        assert call == CustomCall(
            "jax_mxfp4_take",
            "prepared = false",
            ["24x2x16xui8", "24x2xui8", "3xi32"],
            ["3x64xbf16"],
        )


def test_matmul_call(kernels_registered):
    packed = ["24x2x16xui8", "24x2xui8"]
    [call] = calls_of(mx.matmul, X.astype(jnp.bfloat16), W)
    assert call == CustomCall(
        "jax_mxfp4_matmul", "", ["5x64xbf16", *packed, "0xf32"], ["5x24xbf16"]
    )
    bias = jnp.ones(N, jnp.float16)
    [call] = calls_of(
        lambda x, w: mx.matmul(x, w, bias=bias, out_dtype=jnp.bfloat16), X[None, :, None], W
    )
    assert call == CustomCall(
        "jax_mxfp4_matmul", "", ["5x64xf32", *packed, "24xf16"], ["5x24xbf16"]
    )
    [call] = calls_of(mx.matmul, X[0], W)
    assert call.operands[0] == "1x64xf32"


def test_moe_call(kernels_registered):
    moe, args = OPS["moe"]
    [call] = calls_of(
        lambda *args: moe(*args, alpha=1.5, limit=6, out_dtype=jnp.float32),
        args[0].astype(jnp.bfloat16),
        *args[1:],
    )
    assert call == CustomCall(
        "jax_mxfp4_moe",
        "alpha = 1.500000e+00 : f32, limit = 6.000000e+00 : f32",
        [
            *("5x64xbf16", "5x2xi32", "5x2xf32"),
            *("4x64x2x16xui8", "4x64x2xui8", "4x64xbf16"),
            *("4x64x1x16xui8", "4x64x1xui8", "0xf32"),
        ],
        ["5x64xf32", "10x32xbf16", "10x64xf32", f"{moe_schedule_size(10, 4)}xi32"],
    )


def test_layouts_are_row_major(kernels_registered):
    moe, args = OPS["moe"]
    module = exported(moe, *args).mlir_module()
    [layouts] = re.findall(r"operand_layouts = \[(.*?)\], result_layouts = \[(.*?)\]\}", module)
    for layout in re.findall(r"dense<(.*?)>", ", ".join(layouts)):
        order = [int(axis) for axis in re.findall(r"\d+", layout)]
        assert order == sorted(order, reverse=True)


# Layouts of packed weights -----------------------------------------------------------------------

# What `format.prepare_blocks` is made of, and `canonical_blocks`.
_BIT_OPERATIONS = ("stablehlo.shift", "stablehlo.and", "stablehlo.or", "stablehlo.xor")


@pytest.mark.parametrize("name", ["dequantize", "take"])
def test_row_kernels_are_told_the_layout(kernels_registered, name):
    op, args = OPS[name]
    of_canonical, of_prepared = exported(op, *args), exported(op, *mx.prepare(args))
    [canonical_call], [prepared_call] = map(
        custom_calls, (of_canonical.mlir_module(), of_prepared.mlir_module())
    )
    assert prepared_call == replace(canonical_call, attributes="prepared = true")
    for module in (of_canonical, of_prepared):
        assert not any(operation in module.mlir_module() for operation in _BIT_OPERATIONS)


@pytest.mark.parametrize("name", ["matmul", "moe"])
def test_product_kernels_read_prepared_weights(kernels_registered, name):
    """The calls are the same; of canonical weights the program prepares the blocks before."""
    op, args = OPS[name]
    of_canonical = exported(op, *args).mlir_module()
    of_prepared = exported(op, *mx.prepare(args)).mlir_module()
    assert custom_calls(of_prepared) == custom_calls(of_canonical)
    for operation in _BIT_OPERATIONS:
        assert operation in of_canonical
        assert operation not in of_prepared
    assert_weights_are_not_copied(of_prepared)


@pytest.mark.parametrize("name", OPS)
def test_other_platforms_decode_prepared_weights(kernels_registered, name):
    op, args = OPS[name]
    module = exported(op, *mx.prepare(args), platforms=["cpu", "cuda", "rocm", "tpu"])
    [call] = custom_calls(module.mlir_module())
    assert call.target == f"jax_mxfp4_{name}"
    expected = op(*args, implementation="reference")
    np.testing.assert_array_equal(module.call(*mx.prepare(args)), expected)


# Platforms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_other_platforms_see_no_custom_call(kernels_registered, name):
    op, args = OPS[name]
    for platform in ("cpu", "tpu", "rocm"):
        assert "jax_mxfp4_" not in exported(op, *args, platforms=[platform]).mlir_module()


@pytest.mark.parametrize("name", OPS)
def test_one_module_for_all_platforms(kernels_registered, name):
    op, args = OPS[name]
    module = exported(op, *args, platforms=["cpu", "cuda", "rocm", "tpu"])
    [call] = custom_calls(module.mlir_module())
    assert call.target == f"jax_mxfp4_{name}"
    np.testing.assert_array_equal(module.call(*args), op(*args, implementation="reference"))


@pytest.mark.parametrize("name", OPS)
def test_without_kernels_there_is_no_cuda_branch(no_kernels, name):
    op, args = OPS[name]
    module = exported(op, *args, platforms=["cuda"]).mlir_module()
    assert "jax_mxfp4_" not in module
    assert "stablehlo.case" not in module or name == "moe"


@pytest.mark.parametrize("name", OPS)
def test_named_implementations(kernels_registered, name):
    op, args = OPS[name]

    def named(implementation):
        return lambda *args: op(*args, implementation=implementation)

    assert not calls_of(named("reference"), *args)
    assert [c.target for c in calls_of(named("cuda"), *args)] == [f"jax_mxfp4_{name}"]
    for platforms in (["cpu"], ["tpu"], ["cuda", "cpu"]):
        with pytest.raises(RuntimeError, match=f'"cuda" needs .* for {", ".join(platforms)};'):
            exported(named("cuda"), *args, platforms=platforms)


def test_export_needs_the_disabled_checks(kernels_registered):
    assert len(mx.DISABLE_EXPORT_CHECKS) == len(TARGETS)
    with pytest.raises(ValueError, match="jax_mxfp4_matmul"):
        export.export(jax.jit(lambda x: mx.matmul(x, W)), platforms=["cuda"])(X)


@pytest.mark.parametrize("name", OPS)
def test_serialized_module(kernels_registered, name):
    """Serialization keeps the calls, and a machine without a GPU runs its own branch."""
    op, args = OPS[name]
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    # MXFP4Array itself has no serialized form; an exported function takes its leaves.
    flat, tree = jax.tree.flatten(args)

    def on_leaves(*leaves):
        return op(*jax.tree.unflatten(tree, leaves))

    module = exported(on_leaves, *flat, platforms=["cpu", "cuda"])
    again = export.deserialize(module.serialize())
    assert custom_calls(again.mlir_module()) == custom_calls(module.mlir_module())
    np.testing.assert_array_equal(again.call(*flat), op(*args, implementation="reference"))


def test_symbolic_batch(kernels_registered):
    [batch] = export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, 3, K), jnp.float32)
    bias = jnp.ones(N, jnp.float32)
    for f in (
        lambda x: mx.matmul(x, W, bias=bias),
        jax.vmap(lambda x: mx.matmul(x, W, bias=bias)),
        jax.grad(lambda x: mx.matmul(x, W, bias=bias).sum()),
    ):
        module = exported(f, spec, platforms=["cpu", "cuda"])
        assert custom_calls(module.mlir_module())
        for size in (1, 4):
            x = np.broadcast_to(X[:3], (size, 3, K))
            np.testing.assert_array_equal(module.call(x), f(x))
    ids = jax.ShapeDtypeStruct((batch, 2), jnp.int32)
    module = exported(lambda ids: mx.take(W, ids), ids, platforms=["cpu", "cuda"])
    assert [c.target for c in custom_calls(module.mlir_module())] == ["jax_mxfp4_take"]
    np.testing.assert_array_equal(module.call(IDS[:2][None]), mx.take(W, IDS[:2][None]))


def test_symbolic_tokens_of_moe(kernels_registered):
    [tokens] = export.symbolic_shape("tokens")
    specs = (
        jax.ShapeDtypeStruct((tokens, width), dtype)
        for width, dtype in ((K, jnp.float32), (TOP_K, jnp.int32), (TOP_K, jnp.float32))
    )
    moe, (*routed, gate_up, gate_up_bias, down, _) = OPS["moe"]

    def f(x, ids, shares):
        return moe(x, ids, shares, gate_up, gate_up_bias, down, None)

    module = exported(f, *specs, platforms=["cpu", "cuda"])
    assert [c.target for c in custom_calls(module.mlir_module())] == ["jax_mxfp4_moe"]
    for count in (1, M):
        some = [a[:count] for a in routed]
        np.testing.assert_allclose(module.call(*some), f(*some), rtol=1e-4, atol=1e-5)


# Transformations ---------------------------------------------------------------------------------


def assert_weights_are_not_copied(module: str) -> None:
    """No broadcast, gather, slice or concatenation makes new packed data."""
    made = re.findall(r"= (stablehlo\.\w+).*-> tensor<[\dx]+xui8>", module)
    assert not made, made


def test_copied_weights_would_be_seen():
    module = exported(lambda w: jnp.broadcast_to(w.blocks, (7, *w.blocks.shape)), W).mlir_module()
    with pytest.raises(AssertionError, match="broadcast_in_dim"):
        assert_weights_are_not_copied(module)


def test_vmap_is_one_call_with_one_weight(kernels_registered):
    moe, moe_args = OPS["moe"]
    batch = (np.stack([a] * 7) for a in (X, IDS, EXPERT_IDS))
    xs, ids, expert_ids = batch
    shares = np.stack([SHARES] * 7)
    routing, experts = moe_args[1:3], mx.prepare(moe_args[3:])
    w = mx.prepare(W)
    for f, args, shape in [
        (jax.vmap(mx.matmul, (0, None)), (xs, w), "35x64xf32"),
        (jax.vmap(jax.vmap(mx.matmul, (0, None)), (0, None)), (xs, w), "35x64xf32"),
        (jax.vmap(mx.take, (None, 0)), (W, ids), "24x2x16xui8"),
        (jax.vmap(lambda *a: moe(*a, *experts)), (xs, expert_ids, shares), "35x64xf32"),
        (jax.vmap(lambda x: moe(x, *routing, *experts)), (xs,), "35x64xf32"),
    ]:
        module = exported(f, *args).mlir_module()
        [call] = custom_calls(module)
        assert call.operands[0] == shape
        assert_weights_are_not_copied(module)


def test_vmap_of_dequantize_is_one_call(kernels_registered):
    many = jax.tree.map(lambda leaf: np.stack([leaf] * 7), W)
    [call] = calls_of(jax.vmap(mx.dequantize), many)
    assert call.operands == ["7x24x2x16xui8", "7x24x2xui8"]


def test_vmap_over_weights_is_a_loop_of_calls(kernels_registered):
    many = jax.tree.map(lambda leaf: np.stack([leaf] * 7), W)
    module = exported(jax.vmap(mx.matmul, (None, 0)), X, many).mlir_module()
    [call] = custom_calls(module)
    assert call.operands[:2] == ["5x64xf32", "24x2x16xui8"]
    assert "stablehlo.while" in module


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_grad_of_scan_over_layers(kernels_registered, remat):
    layers = random_weight(RNG, 3, K, K)

    def loss(x):
        def step(x, w):
            return jnp.tanh(mx.matmul(x, w)), None

        step = jax.checkpoint(step) if remat else step
        return jax.lax.scan(step, x, layers)[0].sum()

    targets = [call.target for call in calls_of(jax.grad(loss), X)]
    # Forward in the first loop; backward (and the repeated forward of remat) in the second.
    forward, backward = "jax_mxfp4_matmul", "jax_mxfp4_dequantize"
    assert sorted(targets) == sorted([forward, *([forward] if remat else []), backward])


def test_grad_of_matmul_decodes_once(kernels_registered):
    """The forward product is not needed for the gradient of a linear function."""
    [call] = calls_of(jax.grad(lambda x: mx.matmul(x.astype(jnp.bfloat16), W).sum()), X)
    assert call.target == "jax_mxfp4_dequantize"
    assert call.results == ["24x64xbf16"]


def test_grad_of_moe_keeps_the_forward_call(kernels_registered):
    moe, args = OPS["moe"]
    calls = calls_of(lambda x: jax.vjp(lambda x: moe(x, *args[1:]), x)[0], X)
    assert [call.target for call in calls] == ["jax_mxfp4_moe"]


def test_cond_and_while(kernels_registered):
    def f(x, w, flag):
        x = jax.lax.cond(flag, lambda: mx.matmul(x, w), lambda: jnp.zeros((M, N)))
        return jax.lax.fori_loop(0, 3, lambda _, y: y + mx.matmul(X, w), x)

    assert [call.target for call in calls_of(f, X, W, True)] == ["jax_mxfp4_matmul"] * 2


@pytest.mark.parametrize("implementation", [None, "cuda"])
def test_shard_map_is_one_local_call(kernels_registered, implementation):
    """The branches of the platform choice agree in the mesh axes that their results vary over."""
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("devices",), axis_types=automatic)
    split, whole = jax.P("devices"), jax.P()
    sharded = jax.shard_map(
        lambda x, w: mx.matmul(x, w, implementation=implementation),
        mesh=mesh,
        in_specs=(split, whole),
        out_specs=split,
    )
    jaxpr = jax.make_jaxpr(sharded)(np.repeat(X, 2, axis=0), W)
    assert str(jaxpr).count("target_name=jax_mxfp4_matmul") == 1
    assert f"f32[{M},{N}]" in str(jaxpr)
