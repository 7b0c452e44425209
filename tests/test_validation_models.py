"""Models as judges: names of weights, replacing them, formats and sensitivity."""

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jax_mxfp4 as mx
from jax_mxfp4.models.gpt_oss import GptOss
from jax_mxfp4.validation import (
    FORMATS,
    Baseline,
    FormatResult,
    NotApplicable,
    Protocol,
    compare_formats,
    replace_weights,
    select_matrices,
    sensitivities,
    split,
    weight_matrices,
)
from jax_mxfp4.validation.gpt_oss_dense import DenseGptOss, capture, has_dense_experts
from jax_mxfp4.validation.judges import load_judge
from jax_mxfp4.validation.sensitivity import group

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny-gptoss" / "hf"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    norm: jax.Array
    weight: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Toy:
    """embedding -> residual layers -> lm_head; `norm` and `bias` are two-dimensional on purpose."""

    embedding: jax.Array
    layers: tuple[Layer, ...]
    lm_head: jax.Array

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding[tokens]
        for layer in self.layers:
            x = x + jnp.tanh((x * layer.norm[0]) @ layer.weight.T + layer.bias[0])
        return x @ self.lm_head.T


@pytest.fixture(scope="module")
def toy() -> Toy:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.float32(rng.standard_normal(shape))

    # The second layer hardly matters: its input is scaled down.
    layers = tuple(
        Layer(jnp.full((1, 32), size, jnp.float32), normal(32, 32) / 4, normal(1, 32) / 9)
        for size in (1.0, 0.01)
    )
    return Toy(normal(40, 32), layers, normal(40, 32) / 2)


@pytest.fixture(scope="module")
def baseline(toy: Toy) -> Baseline:
    tokens = np.random.default_rng(1).integers(0, 40, 200)
    return Baseline(toy, split(tokens, Protocol(window=16, stride=16)))


def test_names_of_weights(toy: Toy) -> None:
    names = ["embedding", "layers.0.weight", "layers.1.weight", "lm_head"]
    assert list(weight_matrices(toy)) == names
    assert list(select_matrices(toy)) == names[1:3]
    assert list(select_matrices(toy, leave=("layers.0.weight",))) == names[2:3]
    assert list(select_matrices(toy, "embed|head", leave=("lm_head",))) == ["embedding", "lm_head"]
    with pytest.raises(ValueError, match="'up' matches none of the 4 matrices: embedding, layers"):
        select_matrices(toy, "up")
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        select_matrices(toy, "(")


def test_replacing_weights(toy: Toy) -> None:
    zero = np.zeros((32, 32), np.float16)
    changed = replace_weights(toy, {"layers.1.weight": zero})
    assert not changed.layers[1].weight.any()
    assert changed.layers[1].weight.dtype == jnp.float32
    assert changed.layers[0].weight is toy.layers[0].weight
    assert toy.layers[1].weight.any()
    with pytest.raises(ValueError, match=r"the model has no matrix 'layers\.2\.weight'"):
        replace_weights(toy, {"layers.2.weight": zero})
    with pytest.raises(ValueError, match=r"lm_head: expected shape \[40, 32\], found \[32, 32\]"):
        replace_weights(toy, {"lm_head": zero})


def test_kernels_of_flax_are_turned(toy: Toy) -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(32, 64, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layer(x)

    model = Model()
    ((name, matrix),) = weight_matrices(model).items()
    assert name == "layer.kernel"
    assert matrix.shape == (64, 32)
    changed = replace_weights(model, {name: matrix.at[5, 3].set(7)})
    expected = model.layer.kernel[...].at[3, 5].set(7)
    np.testing.assert_array_equal(changed.layer.kernel[...], expected)


def test_packed_weights_are_listed_but_not_selected() -> None:
    model = GptOss.from_pretrained(TINY, jnp.float32, "reference")
    packed = [n for n, w in weight_matrices(model).items() if isinstance(w, mx.MXFP4Array)]
    assert packed == [f"layers.{i}.mlp.{n}" for i in range(len(packed) // 2) for n in _EXPERTS]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_up is packed"):
        select_matrices(model, "gate_up")


_EXPERTS = ("gate_up", "down")


def test_comparing_formats(toy: Toy, baseline: Baseline) -> None:
    matrices = select_matrices(toy)
    formats = [FORMATS[name] for name in ("bf16", "mxfp6-e2m3", "mxfp4-even", "q4_k")]
    *results, refused = compare_formats(toy, matrices, formats, baseline)
    assert refused == NotApplicable("q4_k", "layers.0.weight: rows of 32 are not a multiple of 256")
    assert all(isinstance(result, FormatResult) for result in results)
    assert [result.bits_per_weight for result in results] == [16, 6.25, 4.25]
    for wide, narrow in itertools.pairwise(results):
        assert wide.error.sqnr_db > narrow.error.sqnr_db
        assert wide.distance.kl < narrow.distance.kl
    last = results[-1]
    assert last.error.elements == 2 * 32 * 32
    by_hand = replace_weights(toy, {n: mx.fake_quantize(m, "even") for n, m in matrices.items()})
    assert (last.likelihood, last.distance) == baseline.compare(by_hand)


def test_sensitivity_finds_the_layer_that_matters(toy: Toy, baseline: Baseline) -> None:
    rounding = FORMATS["mxfp4-even"].round
    matrices = select_matrices(toy)
    first, second = sensitivities(toy, matrices, rounding, baseline)
    assert (first.part, second.part) == ("layers.0.weight", "layers.1.weight")
    assert first.elements == second.elements == 32 * 32
    assert first.distance.kl > 100 * second.distance.kl
    (together,) = sensitivities(toy, matrices, rounding, baseline, by="kind")
    assert together.part == "layers.*.weight"
    assert together.elements == 2 * 32 * 32


def test_groups() -> None:
    names = ["embedding", "layers.0.q.weight", "layers.0.mlp.up", "layers.11.q.weight"]
    assert group(names, "tensor") == {name: [name] for name in names}
    assert group(names, "layer") == {
        "embedding": names[:1],
        "layers.0": names[1:3],
        "layers.11": names[3:],
    }
    assert group(names, "kind") == {
        "embedding": names[:1],
        "layers.*.q.weight": [names[1], names[3]],
        "layers.*.mlp.up": [names[2]],
    }


def test_the_dense_model_is_that_of_transformers() -> None:
    golden = np.load(GOLDEN / "tiny-gptoss" / "hf_oracle.npz")
    model = DenseGptOss.from_pretrained(TINY)
    found = capture(model, jnp.asarray(golden["tokens"], jnp.int32))
    np.testing.assert_allclose(found["logits"], golden["fp32.logits"], atol=1e-4)
    for name in ("attn_out", "mlp_out", "hidden", "router_logits"):
        expected = golden[f"fp32.l1.{name}"]
        actual = np.asarray(found[f"layers.1.{name}"]).reshape(expected.shape)
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert list(found)[-2:] == [f"layers.{model.config.num_layers - 1}.hidden", "logits"]


def test_dense_experts_as_hugging_face_stores_them(tmp_path: Path) -> None:
    packed = DenseGptOss.from_pretrained(TINY)
    tensors: dict[str, np.ndarray] = {}
    for file in TINY.glob("*.safetensors"):
        tensors |= {
            k: v for k, v in load_file(file).items() if not k.endswith(("blocks", "scales"))
        }
    for index, layer in enumerate(packed.params.layers):
        prefix = f"model.layers.{index}.mlp.experts"
        for name in _EXPERTS:
            matrix = np.asarray(getattr(layer.mlp, name)).swapaxes(1, 2)
            tensors[f"{prefix}.{name}_proj"] = np.ascontiguousarray(matrix)
    shutil.copy(TINY / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert has_dense_experts(tmp_path) and not has_dense_experts(TINY)
    dense = DenseGptOss.from_pretrained(tmp_path)
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(dense), strict=True):
        np.testing.assert_array_equal(one, other)

    short = {**tensors, "model.layers.0.mlp.experts.down_proj": np.zeros((1, 2, 3), np.float32)}
    save_file(short, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down: expected .*, found \[1, 3, 2\]"):
        DenseGptOss.from_pretrained(tmp_path)


def test_judges_know_what_was_packed() -> None:
    assert load_judge(None, jnp.float32, "dense").name == "the built-in model books-11m"
    mini = Path("mini")
    judge = load_judge(mini, jnp.float32, "dense")
    assert judge.name == "the built-in model mini"
    assert judge.stored_packed == tuple(f"layers.{i}.mlp.{n}" for i in range(4) for n in _EXPERTS)
    assert set(judge.stored_packed) < set(weight_matrices(judge.model))
    assert judge.encode("fire") == load_judge(mini, jnp.float32, "reference").encode("fire")


def test_config_of_the_golden_dense_model_matches() -> None:
    folder = GOLDEN / "mini-gptoss" / "bf16"
    assert has_dense_experts(folder)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4
    judge = load_judge(folder, jnp.float32, "dense")
    assert judge.stored_packed == ()
    # The built-in model mini is this one, its experts rounded by the rule `floor`.
    packed = load_judge(Path("mini"), jnp.float32, "dense")
    name = "layers.2.mlp.down"
    rounded = mx.fake_quantize(weight_matrices(judge.model)[name], "floor")
    np.testing.assert_array_equal(weight_matrices(packed.model)[name], rounded)
