"""`Llama` against transformers, and its use with packed layers."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from flax import nnx
from safetensors.numpy import load_file

from flax_layers import MXFP4Dense, MXFP4Embed, quantize_model
from jax_mxfp4 import dequantize
from jax_mxfp4.checkpoints import CheckpointError
from jax_mxfp4.models.llama import Llama, LlamaConfig

GOLDEN = np.load(Path(__file__).parent / "golden" / "tiny_llama_gguf.npz")
# Between two float32 implementations, relative to the largest logit.
TOLERANCE = 1e-5 if jax.default_backend() == "cpu" else 1e-4


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_gguf(tmp_path_factory.mktemp("llama") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(file: Path) -> Llama:
    return Llama.from_gguf(file)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tied: bool, tmp_path: Path) -> None:
    model = Llama.from_gguf(tiny_llama.write_gguf(tmp_path / "tiny.gguf", tied=tied))
    logits = model(tiny_llama.TOKENS)
    wanted = GOLDEN["tied" if tied else "untied"]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def test_bfloat16(file: Path) -> None:
    logits = np.asarray(Llama.from_gguf(file, jnp.bfloat16)(tiny_llama.TOKENS))
    wanted = GOLDEN["tied"]
    error = np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 3e-2


def test_later_tokens_do_not_matter(model: Llama) -> None:
    tokens = tiny_llama.TOKENS.copy()
    tokens[:, 12:] = 0
    before, after = model(tiny_llama.TOKENS), model(tokens)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.all(np.any(np.asarray(before[:, 12:]) != np.asarray(after[:, 12:]), axis=-1))


def test_inside_jit(model: Llama) -> None:
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, tiny_llama.TOKENS)
    np.testing.assert_allclose(logits, model(tiny_llama.TOKENS), rtol=0, atol=1e-4)


def test_packed_layers(model: Llama) -> None:
    packed, report = quantize_model(model, r"layers\..*\.(q|k|v|out|gate|up|down)")
    assert len(report.packed) == 7 * tiny_llama.LAYERS
    assert all(isinstance(block.mlp.down, MXFP4Dense) for block in packed.layers)
    exact, rounded = model(tiny_llama.TOKENS), packed(tiny_llama.TOKENS)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0.02 < error < 0.5  # 4-bit weights in 14 layers: not exact, not noise


def test_packed_embedding(model: Llama) -> None:
    packed, report = quantize_model(model, "embedding")
    assert len(report.packed) == 1 and isinstance(packed.embedding, MXFP4Embed)
    decoded = nnx.clone(model)
    table = packed.embedding(jnp.arange(tiny_llama.VOCABULARY))
    decoded.embedding.embedding.set_value(table)
    np.testing.assert_allclose(
        packed(tiny_llama.TOKENS), decoded(tiny_llama.TOKENS), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (np.zeros(3, np.int32), ValueError),
        (np.zeros((1, 0), np.int32), ValueError),
        (np.zeros((1, 65), np.int32), ValueError),
        (np.zeros((1, 3), np.float32), TypeError),
    ],
)
def test_bad_tokens(model: Llama, tokens: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error, match="tokens: expected"):
        model(tokens)


@pytest.mark.parametrize(
    ("replace", "problem"),
    [
        ({"blk.1.ffn_down.weight": None}, "'blk.1.ffn_down.weight': missing"),
        ({"rope_freqs.weight": np.ones(16, np.float32)}, "'rope_freqs.weight': not expected"),
        (
            {"blk.0.attn_k.weight": np.ones((64, 64), np.float32)},
            r"'blk.0.attn_k.weight': expected shape \[32, 64\], found \[64, 64\]",
        ),
    ],
)
def test_bad_tensors(tmp_path: Path, replace: dict, problem: str) -> None:
    file = tiny_llama.write_gguf(tmp_path / "bad.gguf", replace=replace)
    with pytest.raises(CheckpointError, match=problem):
        Llama.from_gguf(file)


def test_other_rotary_embeddings_are_refused(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear"}
    file = tiny_llama.write_gguf(tmp_path / "bad.gguf", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.type': expected 'none'"):
        Llama.from_gguf(file)


def test_bad_dtype(file: Path) -> None:
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16"):
        Llama.from_gguf(file, jnp.int8)


def test_bad_config() -> None:
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_layers"), 32)
    with pytest.raises(ValueError, match=r"head_dim: .*even.*; num_attention_heads: .*multiple"):
        LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=2, head_dim=7)


FOLDERS = Path(__file__).parent / "golden" / "tiny-llama-mxfp4"


def test_folder_packed_by_compressed_tensors() -> None:
    """Logits are those of transformers for the weights that compressed-tensors decodes."""
    decoded = load_file(FOLDERS / "decoded.safetensors")
    model = Llama.from_pretrained(FOLDERS / "packed")
    assert isinstance(model.layers[1].mlp.down, MXFP4Dense)
    logits = model(decoded["tokens"])
    wanted = decoded["logits"]
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def test_packing_the_dense_folder_gives_the_packed_one() -> None:
    dense = Llama.from_pretrained(FOLDERS / "bf16", jnp.bfloat16)
    packed = Llama.from_pretrained(FOLDERS / "packed", jnp.bfloat16)
    ours, _ = quantize_model(dense, r"layers\..*\.(q|k|v|out|gate|up|down)")
    for left, right in zip(ours.layers, packed.layers, strict=True):
        found, wanted = (layer.attention.q.weight for layer in (left, right))
        np.testing.assert_array_equal(
            dequantize(found, jnp.float32), dequantize(wanted, jnp.float32)
        )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "qwen2"}, "'model_type': expected 'llama', found 'qwen2'"),
        ({"attention_bias": True}, "'attention_bias': expected False"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            r"'rope_parameters\.rope_type': expected 'default'",
        ),
        ({"intermediate_size": 64}, r"up_proj\.weight': expected shape \[64, 64\], found \[128"),
    ],
)
def test_bad_folders(tmp_path: Path, change: dict, problem: str) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(FOLDERS / "bf16", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=problem):
        Llama.from_pretrained(folder)
