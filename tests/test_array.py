"""MXFP4Array: its invariants, its errors, and that it behaves as a pytree everywhere."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_mxfp4 import reference
from jax_mxfp4.array import MXFP4Array


def make(*leading: int, groups: int = 2, seed: int = 0) -> MXFP4Array:
    rng = np.random.default_rng(seed)
    shape = (*leading, groups)
    return MXFP4Array(
        jnp.asarray(rng.integers(0, 256, (*shape, 16), dtype=np.uint8)),
        jnp.asarray(rng.integers(100, 150, shape, dtype=np.uint8)),
    )


def decoded(w: MXFP4Array) -> np.ndarray:
    return np.asarray(reference.dequantize(w, jnp.float32))


def test_sizes_describe_the_logical_array():
    w = make(3, 5, groups=4)
    assert w.shape == decoded(w).shape == (3, 5, 128)
    assert w.ndim == 3
    assert w.size == 3 * 5 * 128
    assert w.num_blocks == 60
    assert w.nbytes == w.blocks.nbytes + w.scales.nbytes == 60 * 17
    assert repr(w).startswith("MXFP4Array(shape=(3, 5, 128)")


def test_empty_leading_axis():
    w = make(0)
    assert (w.shape, w.size, w.nbytes) == ((0, 64), 0, 0)
    assert decoded(w).shape == (0, 64)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, jax.ShapeDtypeStruct])
def test_leaves_of_every_array_kind(kind):
    def leaf(*shape):
        if kind is jax.ShapeDtypeStruct:
            return kind(shape, jnp.uint8)
        return kind(np.zeros(shape, np.uint8))

    w = MXFP4Array(leaf(7, 2, 16), leaf(7, 2))
    assert (w.shape, w.ndim, w.size, w.nbytes) == ((7, 64), 2, 448, 238)


@pytest.mark.parametrize(
    ("blocks", "scales", "error", "message"),
    [
        (np.zeros((2, 16), np.int8), np.zeros(2, np.uint8), TypeError, "blocks .* int8"),
        (np.zeros((2, 16), np.uint8), np.zeros(2), TypeError, "scales .* float64"),
        ([[0] * 16], np.zeros(1, np.uint8), TypeError, "blocks .* list"),
        (np.zeros((2, 16), np.uint8), None, TypeError, "scales .* NoneType"),
        (np.zeros((2, 8), np.uint8), np.zeros(2, np.uint8), ValueError, r"blocks .* \(2, 8\)"),
        (np.zeros(16, np.uint8), np.zeros((), np.uint8), ValueError, r"blocks .* \(16,\)"),
        (np.zeros((2, 16), np.uint8), np.zeros(3, np.uint8), ValueError, r"scales .* \(3,\)"),
        (np.zeros((2, 16), np.uint8), np.zeros((1, 2), np.uint8), ValueError, r"scales .* \(2,\)"),
    ],
)
def test_bad_leaves_are_refused(blocks, scales, error, message):
    with pytest.raises(error, match=message):
        MXFP4Array(blocks, scales)


def test_it_is_frozen():
    w = make(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        w.scales = w.scales  # pyright: ignore[reportAttributeAccessIssue]


def test_shape_dtype_describes_what_quantized_arrays_look_like():
    w = make(3, 5)
    described = MXFP4Array.shape_dtype((3, 5, 64))
    assert jax.tree.structure(described) == jax.tree.structure(w)
    assert described.blocks == jax.ShapeDtypeStruct(w.blocks.shape, w.blocks.dtype)
    assert described.scales == jax.ShapeDtypeStruct(w.scales.shape, w.scales.dtype)
    assert "ShapeDtypeStruct" in repr(described)


@pytest.mark.parametrize("shape", [(), (33,), (32, 31)])
def test_shape_dtype_refuses_shapes_without_blocks(shape):
    with pytest.raises(ValueError, match="multiple of 32"):
        MXFP4Array.shape_dtype(shape)


@pytest.mark.parametrize(
    "index",
    [
        1,
        -1,
        np.int64(2),
        slice(1, 3),
        (1, 2),
        (slice(None), 3),
        (..., 0),
        (0, ...),
        ...,
        None,
        (None, 1),
        True,
        np.array([2, 0, 2]),
        (np.array([0, 1]), np.array([4, 0])),
        (np.array([1, 0]), slice(None)),
        np.array([True, False, True, False]),
        np.eye(4, 5, dtype=bool),
    ],
    ids=repr,
)
def test_indexing_leading_axes_matches_the_decoded_array(index):
    w = make(4, 5)
    # The last axis of w never takes part, so an Ellipsis stands for leading axes only.
    leading = index if isinstance(index, tuple) else (index,)
    expected = decoded(w)[(*leading, slice(None))]
    np.testing.assert_array_equal(decoded(w[index]), expected)


@pytest.mark.parametrize("index", [(0, 0, 0), (0, 0, slice(None)), (..., 0, 0, 0), 4, (0, -6)])
def test_the_packed_axis_and_missing_rows_cannot_be_indexed(index):
    with pytest.raises(IndexError):
        make(4, 5)[index]


def test_two_ellipses_are_refused():
    with pytest.raises(IndexError, match="Ellipsis"):
        make(4, 5)[..., ...]


def test_a_vector_has_no_leading_axis():
    with pytest.raises(IndexError, match="0 leading axes"):
        make()[0]


def test_iteration_ends():
    w = make(3)
    np.testing.assert_array_equal(np.stack([decoded(row) for row in w]), decoded(w))


def test_traced_index():
    w = make(4)
    row = jax.jit(lambda w, i: w[i])(w, 2)
    np.testing.assert_array_equal(decoded(row), decoded(w)[2])


def test_leaves_have_names():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(make(1))]
    assert paths == [".blocks", ".scales"]


@pytest.mark.parametrize("leaf", [None, 0, "spec", object(), np.zeros((), jax.dtypes.float0)])
def test_unflatten_takes_any_leaf(leaf):
    w = jax.tree.map(lambda _: leaf, make(2), is_leaf=lambda x: x is None)
    assert isinstance(w, MXFP4Array)
    assert w.blocks is leaf
    assert w.scales is leaf
    assert repr(w)


def test_transformations_carry_it():
    w = make(4, 3)
    expected = decoded(w)
    same = jax.jit(lambda w: w)(w)
    assert isinstance(same, MXFP4Array)
    np.testing.assert_array_equal(decoded(same), expected)
    mapped = jax.vmap(lambda w: reference.dequantize(w, jnp.float32))(w)
    np.testing.assert_array_equal(mapped, expected)
    _, scanned = jax.lax.scan(lambda c, w: (c, reference.dequantize(w, jnp.float32)), None, w)
    np.testing.assert_array_equal(scanned, expected)
    described = jax.eval_shape(lambda w: w[0], w)
    assert (described.shape, type(described.blocks)) == ((3, 64), jax.ShapeDtypeStruct)


def test_it_is_a_constant_under_grad():
    w = make(3)
    total = jax.grad(lambda w: jnp.sum(reference.dequantize(w, jnp.float32)), allow_int=True)
    gradient = total(w)
    assert isinstance(gradient, MXFP4Array)
    assert gradient.blocks.dtype == jax.dtypes.float0


def test_copies_and_pickles():
    w = make(3)
    for other in (copy.copy(w), copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        np.testing.assert_array_equal(decoded(other), decoded(w))


def test_exported_programs_take_it_as_an_argument():
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    w = make(3)
    exported = export.export(jax.jit(lambda w: (w[1], reference.dequantize(w, jnp.float32))))(w)
    row, values = export.deserialize(exported.serialize()).call(w)
    np.testing.assert_array_equal(decoded(row), decoded(w)[1])
    np.testing.assert_array_equal(values, decoded(w))
