"""The prepared layout: its bits, the conversions, and that no operation's result depends on it."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import export
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from oracle import DTYPES, prepared_blocks, random_floats, random_integers, random_weight

import jax_mxfp4 as mx
from jax_mxfp4 import ffi
from jax_mxfp4.format import canonical_blocks, pack_codes, prepare_blocks

P = jax.P
RNG = np.random.default_rng(0)
W = random_weight(RNG, 24, 96, scales=(0, 255))


def on_devices(tree):
    return jax.tree.map(jnp.asarray, tree)


def assert_same_array(actual: mx.MXFP4Array, expected: mx.MXFP4Array) -> None:
    assert actual.layout == expected.layout
    np.testing.assert_array_equal(actual.blocks, expected.blocks, strict=True)
    np.testing.assert_array_equal(actual.scales, expected.scales, strict=True)


def slowly_prepared(w: mx.MXFP4Array) -> mx.MXFP4Array:
    return mx.MXFP4Array(prepared_blocks(np.asarray(w.blocks)), np.asarray(w.scales), "prepared")


# Bits --------------------------------------------------------------------------------------------


def every_code_everywhere() -> np.ndarray:
    """Blocks [32 * 16, 16]: each code at each position, with others around it."""
    codes = RNG.integers(0, 16, (32, 16, 32), np.uint8)
    for position in range(32):
        codes[position, :, position] = np.arange(16)
    return pack_codes(codes.reshape(-1, 32)).reshape(-1, 16)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_every_code_at_every_position(kind):
    blocks = every_code_everywhere()
    prepared = prepare_blocks(kind(blocks))
    assert isinstance(prepared, type(kind(blocks)))
    np.testing.assert_array_equal(prepared, prepared_blocks(blocks), strict=True)
    back = canonical_blocks(prepared)
    assert isinstance(back, type(kind(blocks)))
    np.testing.assert_array_equal(back, blocks, strict=True)


def test_each_bit_has_its_own_place():
    """One bit of a canonical block moves one bit, or two where e1 ^ m is stored; all are used."""
    bits = np.packbits(np.eye(128, dtype=bool), axis=-1)
    moved = np.unpackbits(prepare_blocks(bits), axis=-1).astype(int)
    assert sorted(moved.sum(axis=1)) == [1] * 120 + [2] * 8  # the m of elements 24 to 31
    assert round(abs(np.linalg.det(moved))) == 1
    # The map is linear over bits, so that this makes it a bijection.
    a, b = RNG.integers(0, 256, (2, 1000, 16), np.uint8)
    np.testing.assert_array_equal(prepare_blocks(a ^ b), prepare_blocks(a) ^ prepare_blocks(b))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 3), st.integers(1, 3), st.just(16))))
def test_conversions_are_inverse(blocks):
    np.testing.assert_array_equal(prepare_blocks(blocks), prepared_blocks(blocks), strict=True)
    np.testing.assert_array_equal(canonical_blocks(prepare_blocks(blocks)), blocks, strict=True)
    np.testing.assert_array_equal(prepare_blocks(canonical_blocks(blocks)), blocks, strict=True)


@pytest.mark.parametrize("conversion", [prepare_blocks, canonical_blocks])
def test_conversions_are_one_loop(conversion):
    """Nothing is gathered or kept on the way: XLA makes one elementwise fusion of it."""
    lowered = jax.jit(conversion).lower(jax.ShapeDtypeStruct((64, 90, 16), np.uint8))
    operations = lowered.as_text()
    for unwanted in ("gather", "concatenate", "transpose", "reduce"):
        assert f"stablehlo.{unwanted}" not in operations
    if jax.default_backend() == "cpu":
        assert lowered.compile().as_text().count(" fusion(") == 1


# prepare and canonical ---------------------------------------------------------------------------


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("kind", [np.asarray, jnp.array], ids=["numpy", "jax"])
def test_trees(kind, donate):
    w, other = (jax.tree.map(kind, random_weight(RNG, *shape)) for shape in ((4, 64), (2, 3, 32)))
    dense, expected = kind(np.ones(3)), [slowly_prepared(w), slowly_prepared(other)]
    originals = [jax.tree.map(np.array, w), jax.tree.map(np.array, other)]
    tree = {"w": w, "rest": (dense, None, "text"), "other": [other, w]}
    found = mx.prepare(tree, donate=donate)
    assert_same_array(found["w"], expected[0])
    assert_same_array(found["other"][0], expected[1])
    assert isinstance(found["w"].blocks, type(w.blocks))
    # What is tied stays tied, and everything else is what it was.
    assert found["other"][1].blocks is found["w"].blocks
    assert found["w"].scales is w.scales
    assert found["rest"][0] is dense
    assert found["rest"][1:] == (None, "text")
    assert mx.prepare(found["w"]) is found["w"]
    back = mx.canonical(found, donate=donate)
    assert_same_array(back["w"], originals[0])
    assert_same_array(back["other"][0], originals[1])
    assert mx.canonical(back["w"]) is back["w"]
    if kind is jnp.array:
        assert w.blocks.is_deleted() == other.blocks.is_deleted() == donate
        assert not w.scales.is_deleted()


def test_inside_jit():
    w = on_devices(W)
    prepared = jax.jit(mx.prepare)(w)
    assert_same_array(prepared, slowly_prepared(W))
    assert_same_array(jax.jit(lambda w: mx.canonical(w, donate=True))(prepared), W)


def test_conversion_is_compiled_once():
    w, again = (on_devices(random_weight(RNG, 5, 7, 224)) for _ in range(2))
    mx.prepare(w)
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        mx.prepare(again)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not any("compile" in name for name in events)


@pytest.mark.parametrize("conversion", [mx.prepare, mx.canonical])
def test_described_arrays(conversion):
    for layout in ("canonical", "prepared"):
        described = mx.MXFP4Array.shape_dtype((3, 64), layout)
        found = conversion(described)
        assert found.layout == ("prepared" if conversion is mx.prepare else "canonical")
        assert jax.tree.leaves(found) == jax.tree.leaves(described)
        assert isinstance(found.blocks, jax.ShapeDtypeStruct)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_arrays_keep_their_sharding(axis_type):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(axis_type,))
    w = jax.device_put(W, NamedSharding(mesh, P("x")))
    prepared = mx.prepare(w)
    assert_same_array(prepared, slowly_prepared(W))
    assert prepared.blocks.sharding.is_equivalent_to(w.blocks.sharding, 3)


def test_single_arrays_stay_uncommitted():
    w = on_devices(W)
    assert not mx.prepare(w).blocks.committed
    assert mx.prepare(jax.device_put(w, jax.devices()[0])).blocks.committed


# prepare_on_cuda ---------------------------------------------------------------------------------


def test_nothing_is_prepared_elsewhere(kernels_registered):
    if jax.default_backend() != "gpu":
        w = on_devices(W)
        assert mx.prepare_on_cuda(w) is w


def test_nothing_is_prepared_without_kernels(like_cuda, no_kernels):
    w = on_devices(W)
    assert mx.prepare_on_cuda(w) is w


def test_arrays_on_cuda_are_prepared(like_cuda):
    w = on_devices(W)
    expected = slowly_prepared(W)
    tree = mx.prepare_on_cuda({"w": w, "numpy": W}, donate=True)
    assert_same_array(tree["w"], expected)
    assert tree["numpy"] is W
    assert w.blocks.is_deleted()
    assert_same_array(jax.jit(lambda w: mx.prepare_on_cuda(w))(W), expected)
    assert jax.eval_shape(lambda w: mx.prepare_on_cuda(w), W).layout == "prepared"
    assert mx.prepare_on_cuda(mx.MXFP4Array.shape_dtype((3, 64))).layout == "prepared"
    assert mx.prepare_on_cuda(tree["w"]) is tree["w"]


@pytest.mark.parametrize("default", [None, "cpu", "device"])
def test_tracers_count_as_on_the_default_device(monkeypatch, like_cuda, default):
    device = jax.devices("cpu")[0] if default == "device" else default
    with jax.default_device(device):
        assert jax.eval_shape(lambda w: mx.prepare_on_cuda(w), W).layout == "prepared"
        monkeypatch.setattr(ffi, "compute_capability", lambda device: None)
        assert jax.eval_shape(lambda w: mx.prepare_on_cuda(w), W).layout == "canonical"


def test_offloaded_arrays_stay_as_they_are(like_cuda):
    device = jax.devices()[0]
    w = jax.device_put(W, SingleDeviceSharding(device, memory_kind="pinned_host"))
    assert mx.prepare_on_cuda(w) is w


def test_a_sharding_without_devices_says_nothing(like_cuda):
    mesh = jax.sharding.AbstractMesh((2,), ("x",))
    described = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P())
        ),
        mx.MXFP4Array.shape_dtype((3, 64)),
    )
    assert mx.prepare_on_cuda(described).layout == "prepared"


# The array ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["Prepared", "", None, 1, b"prepared"])
def test_unknown_layouts_are_refused(layout):
    message = 'layout must be "canonical" or "prepared", got '
    with pytest.raises(ValueError, match=message + repr(layout)):
        mx.MXFP4Array(W.blocks, W.scales, layout)
    with pytest.raises(ValueError, match=message + repr(layout)):
        mx.MXFP4Array.shape_dtype((3, 64), layout)


def test_layout_is_part_of_the_structure():
    prepared = mx.prepare(W)
    assert W.layout == "canonical"
    assert jax.tree.structure(prepared) != jax.tree.structure(W)
    assert jax.tree.map(lambda leaf: leaf, prepared).layout == "prepared"
    with pytest.raises(ValueError):
        jax.tree.map(lambda a, b: a, W, prepared)
    traces = []
    jitted = jax.jit(lambda w: traces.append(w.layout))
    for w in (W, prepared, W):
        jitted(w)
    assert traces == ["canonical", "prepared"]


def test_paths_tell_the_layout():
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path((W, mx.prepare(W)))
    ]
    assert paths == ["[0].blocks", "[0].scales", "[1].prepared_blocks", "[1].scales"]


def test_array_with_layout():
    prepared = mx.prepare(W)
    assert (prepared.shape, prepared.ndim, prepared.nbytes) == (W.shape, W.ndim, W.nbytes)
    assert repr(prepared) == "MXFP4Array(shape=(24, 96), leaves=ndarray, layout='prepared')"
    assert "layout" not in repr(W)
    assert "'prepared'" in repr(jax.tree.map(lambda leaf: None, prepared))
    for index in (3, slice(4, 9), [0, 5], None, ...):
        index = np.array(index) if isinstance(index, list) else index
        assert_same_array(mx.canonical(prepared[index]), W[index])
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert_same_array(other, prepared)


def test_arrays_pickled_before_there_were_layouts():
    old = copy.copy(W)
    del vars(old)["layout"]
    assert_same_array(pickle.loads(pickle.dumps(old)), W)


def test_exported_programs_keep_the_layout():
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    prepared = mx.prepare(W)
    exported = export.export(jax.jit(lambda w: (mx.dequantize(w), w[1], mx.canonical(w[2]))))
    again = export.deserialize(exported(prepared).serialize())
    values, row, canonical_row = again.call(prepared)
    np.testing.assert_array_equal(values, mx.dequantize(W))
    assert_same_array(row, prepared[1])
    assert_same_array(canonical_row, W[2])
    with pytest.raises(ValueError, match="pytree"):
        again.call(W)


def test_exported_programs_from_before_there_were_layouts():
    """They were serialized without auxiliary data."""
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    serialized = export.export(jax.jit(lambda w: w))(W).serialize()
    assert b"canonical" not in bytes(serialized)
    assert_same_array(export.deserialize(serialized).call(W), W)


# Operations --------------------------------------------------------------------------------------

X = random_floats(RNG, 2, 5, 96, dtype=DTYPES[0])
IDS = RNG.integers(-26, 26, (2, 7), np.int32)
BIAS = random_floats(RNG, 24, dtype=DTYPES[1])
FINITE = random_weight(RNG, 24, 96)
E, TOP_K, I = 4, 2, 64  # noqa: E741
GATE_UP, DOWN = random_weight(RNG, E, 2 * I, 96), random_weight(RNG, E, 96, I)
EXPERT_IDS = RNG.integers(-1, E + 1, (2, 5, TOP_K), np.int32)
SHARES = RNG.random((2, 5, TOP_K), np.float32)

OPS = {
    "dequantize": (mx.dequantize, (W,)),
    "take": (mx.take, (W, IDS)),
    "matmul": (lambda x, w, bias, **kw: mx.matmul(x, w, bias=bias, **kw), (X, FINITE, BIAS)),
    "moe": (mx.moe, (X, EXPERT_IDS, SHARES, GATE_UP, None, DOWN, None)),
}


def assert_same_bits(actual, expected) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_results_do_not_depend_on_the_layout(implementation, name, transform):
    op, args = OPS[name]
    call = transform(lambda *args: op(*args, implementation=implementation))
    assert_same_bits(call(*mx.prepare(args)), call(*args))


def test_one_expert_weight_of_each_layout(implementation):
    def moe(gate_up, down):
        args = (X, EXPERT_IDS, SHARES, gate_up, None, down, None)
        return mx.moe(*args, implementation=implementation)

    expected = moe(GATE_UP, DOWN)
    assert_same_bits(moe(mx.prepare(GATE_UP), DOWN), expected)
    assert_same_bits(moe(GATE_UP, mx.prepare(DOWN)), expected)


@pytest.mark.parametrize("name", ["dequantize", "take"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoded_values_in_every_dtype(implementation, name, dtype):
    op, args = OPS[name]
    decoded = [op(*a, dtype=dtype, implementation=implementation) for a in (args, mx.prepare(args))]
    assert_same_bits(*decoded)


@pytest.mark.parametrize("name", OPS)
def test_vmap_over_prepared_weights(implementation, name):
    op, args = OPS[name]
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), args)
    call = jax.vmap(lambda *args: op(*args, implementation=implementation))
    assert_same_bits(call(*mx.prepare(many)), call(*many))


@pytest.mark.parametrize("name", ["matmul", "moe"])
def test_gradients_of_prepared_weights(implementation, name):
    op, args = OPS[name]

    def loss(x, args):
        return jnp.sum(jnp.sin(op(x, *args, implementation=implementation)))

    gradients = [jax.grad(loss)(args[0], a[1:]) for a in (args, mx.prepare(args))]
    assert np.any(gradients[0])
    assert_same_bits(*gradients)


def test_prepared_weights_are_constants_under_grad(implementation):
    def loss(w):
        return jnp.sum(mx.matmul(X, w, implementation=implementation))

    gradient = jax.grad(loss, allow_int=True)(mx.prepare(FINITE))
    assert gradient.layout == "prepared"
    assert gradient.blocks.dtype == jax.dtypes.float0


def test_gradient_of_scan_over_prepared_layers(implementation):
    layers = random_weight(RNG, 3, 96, 96, scales=(118, 120))

    def loss(x, layers):
        def step(x, w):
            return jnp.tanh(mx.matmul(x, w, implementation=implementation)), None

        return jax.lax.scan(step, x, layers)[0].sum()

    assert_same_bits(*(jax.grad(loss)(X, w) for w in (layers, mx.prepare(layers))))


def test_shard_map(implementation):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    x = random_integers(RNG, 4, 96, dtype=DTYPES[0])

    def product(w):
        return jax.shard_map(
            lambda x, w: mx.matmul(x, w, implementation=implementation),
            mesh=mesh,
            in_specs=(P(), P("x")),
            out_specs=P(None, "x"),
        )(x, w)

    assert_same_bits(jax.jit(product)(mx.prepare(FINITE)), jax.jit(product)(FINITE))
    local = jax.shard_map(mx.prepare, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    assert_same_array(jax.jit(local)(FINITE), slowly_prepared(FINITE))
