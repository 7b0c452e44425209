"""Models on CUDA hold prepared weights; their files are canonical all the same.

Devices that run the kernels are simulated (`like_cuda`), and what is computed is the reference.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mxfp4 as mx
from flax_layers import MXFP4Dense, with_layout
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import ParameterSpec, place_parameters
from jax_mxfp4.convert import convert, round_to_nearest
from jax_mxfp4.models.gpt_oss import GptOss, abstract_params, load_params, mini_path, read_config
from jax_mxfp4.models.gpt_oss.packing import pack_dense
from jax_mxfp4.models.gpt_oss.released import random_params
from jax_mxfp4.models.gpt_oss.saving import save_params
from jax_mxfp4.models.gpt_oss.training import TrainableGptOss
from jax_mxfp4.models.llama import Llama
from jax_mxfp4.quantizers.store import LayerStore, load_layer

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny-gptoss"
LLAMA = GOLDEN / "tiny-llama-mxfp4"
CONFIG = read_config(TINY / "hf")
TOKENS = np.arange(12).reshape(1, 12)


def packed_of(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, MXFP4Array))
    return [leaf for leaf in leaves if isinstance(leaf, MXFP4Array)]


def assert_prepared(tree, count):
    assert [w.layout for w in packed_of(tree)] == ["prepared"] * count


def assert_same(actual, expected):
    """Equal trees, of the same layouts."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other, strict=True)


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def canonical_model():
    model = GptOss.from_pretrained(TINY / "hf", jnp.float32, "reference")
    return replace(model, params=mx.canonical(model.params))


@pytest.fixture(scope="module")
def canonical_logits(canonical_model):
    return canonical_model(TOKENS)


@pytest.mark.parametrize("file", ["hf", "original", "tiny-mxfp4.gguf"])
def test_loaded_models_are_prepared(like_cuda, canonical_model, canonical_logits, file):
    model = GptOss.from_pretrained(TINY / file, jnp.float32, "reference")
    assert_prepared(model, 2 * CONFIG.num_layers)
    assert_same(mx.canonical(model.params), canonical_model.params)
    same = replace(model, config=canonical_model.config)  # OpenAI's files have no end tokens
    np.testing.assert_array_equal(same(TOKENS), canonical_logits)


def test_described_parameters_are_those_that_are_loaded(like_cuda, canonical_model):
    params = load_params(TINY / "hf", CONFIG, jnp.float32)
    described = abstract_params(CONFIG, jnp.float32)
    assert jax.tree.structure(described) == jax.tree.structure(params)
    assert jax.tree.structure(described) != jax.tree.structure(canonical_model.params)


def test_dense_matrices_are_packed_and_prepared(like_cuda, canonical_model):
    parts = ("attention", "embedding", "unembedding")
    model = GptOss.from_pretrained(TINY / "hf", jnp.float32, "reference", pack=parts)
    assert_prepared(model, 4 * CONFIG.num_layers + 2)
    expected = mx.canonical(pack_dense(canonical_model.params, parts))
    assert_same(mx.canonical(model.params), expected)
    expected = replace(canonical_model, params=expected)
    np.testing.assert_array_equal(model(TOKENS), expected(TOKENS))


def test_made_up_models_are_prepared(no_kernels, request):
    expected = random_params(CONFIG, seed=1)
    request.getfixturevalue("like_cuda")
    params = random_params(CONFIG, seed=1)
    assert_prepared(params, 2 * CONFIG.num_layers)
    assert_same(mx.canonical(params), expected)


def test_trained_models_are_prepared(no_kernels, request):
    config = read_config(mini_path())
    config = replace(config, layer_types=config.layer_types[:1])
    trainable = TrainableGptOss.init(config, jax.random.key(0), jnp.float32)
    expected = trainable.packed()
    request.getfixturevalue("like_cuda")
    params = trainable.packed()
    assert_prepared(params, 2)
    assert_same(mx.canonical(params), expected)
    assert_same(trainable.packed(), params)  # the first call consumed nothing


def test_saved_files_do_not_depend_on_the_layout(canonical_model, tmp_path):
    narrow = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, canonical_model.params
    )
    prepared = mx.prepare(narrow)
    assert_prepared(prepared, 2 * CONFIG.num_layers)
    for name, params in (("canonical", narrow), ("prepared", prepared)):
        save_params(tmp_path / name, params, CONFIG, tokenizer="{}")
    assert files_of(tmp_path / "prepared") == files_of(tmp_path / "canonical")
    loaded = mx.canonical(load_params(tmp_path / "prepared", CONFIG, jnp.bfloat16))
    assert_same(loaded, narrow)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(prepared))


def test_packers_may_return_prepared_arrays(tmp_path):
    def pack(name, matrix):
        return mx.prepare(round_to_nearest()(name, matrix))

    convert(LLAMA / "bf16", tmp_path / "canonical")
    convert(LLAMA / "bf16", tmp_path / "prepared", pack=pack)
    assert files_of(tmp_path / "prepared") == files_of(tmp_path / "canonical")


def test_calibrated_layers_are_kept_canonical(tmp_path):
    w = mx.quantize(jnp.linspace(-1, 1, 4 * 64).reshape(4, 64))
    LayerStore(tmp_path, {}).save(0, {"w": mx.prepare(w)})
    assert_same(load_layer(tmp_path, 0)["w"], mx.canonical(w))


def test_packed_llamas_are_prepared(no_kernels, request):
    expected = Llama.from_pretrained(LLAMA / "packed")
    request.getfixturevalue("like_cuda")
    model = Llama.from_pretrained(LLAMA / "packed")

    def layouts(model):
        blocks = (block for block in model.layers)
        return {block.mlp.up.weight.layout for block in blocks}

    assert isinstance(model.layers[0].mlp.up, MXFP4Dense)
    assert (layouts(expected), layouts(model)) == ({"canonical"}, {"prepared"})
    assert layouts(with_layout(model, "canonical")) == {"canonical"}
    np.testing.assert_array_equal(model(TOKENS), expected(TOKENS))


class Made:
    """Packed parameters that are made up; `place_parameters` reads them."""

    def __init__(self, arrays):
        self._arrays = arrays
        self.specs = {name: ParameterSpec(w.shape, packed=True) for name, w in arrays.items()}

    def read(self, name, part=()):
        assert not part
        return self._arrays[name]

    def stored_bytes(self, name):
        return self._arrays[name].nbytes


def test_placed_parameters_are_converted_one_after_the_other():
    rng = np.random.default_rng(0)
    arrays = {
        name: MXFP4Array(rng.integers(0, 256, (5, 2, 16), np.uint8), np.zeros((5, 2), np.uint8))
        for name in "abc"
    }
    given = []

    def prepare(w):
        given.append(w)
        return mx.prepare(w, donate=True)

    for count, (name, w) in enumerate(place_parameters(Made(arrays), prepare=prepare), 1):
        assert_same(jax.tree.map(np.asarray, w), mx.prepare(arrays[name]))
        assert len(given) == count
        assert given[-1].blocks.is_deleted()
