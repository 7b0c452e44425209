"""Reading whole, well-formed GGUF files."""

from pathlib import Path

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import (
    CheckpointError,
    GgufFile,
    GptOssParameters,
    Reader,
    SafetensorsFolder,
    read_parameters,
)
from jax_mxfp4.checkpoints.gguf_blocks import dequantize_q8_0, pack_mxfp4, unpack_mxfp4
from jax_mxfp4.format import unpack_codes
from jax_mxfp4.models.gpt_oss import GptOss, load_tokenizer, read_config
from jax_mxfp4.models.gpt_oss.params import parameter_specs

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny-gptoss" / "tiny-mxfp4.gguf"
HF = GOLDEN / "tiny-gptoss" / "hf"


def rewrite(target: Path, convert=lambda name, data, kind: (data, kind), **changes) -> Path:
    """Write TINY again with other tensors, and with metadata changed; None takes a key away."""
    source = gguf.GGUFReader(TINY)
    writer = gguf.GGUFWriter(target, "gpt-oss")
    for key, field in source.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = changes.pop(key, field.contents())
        if value is not None:
            writer.add_key_value(key, value, field.types[0])
    for key, value in changes.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {int: "UINT32", float: "FLOAT32", str: "STRING", bool: "BOOL"}
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    for tensor in source.tensors:
        converted = convert(tensor.name, tensor.data, tensor.tensor_type)
        if converted is not None:
            data, kind = converted
            writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_the_header_agrees_with_the_gguf_package():
    reader: Reader = GgufFile(TINY)
    expected = gguf.GGUFReader(TINY)
    assert reader.path == TINY
    assert list(reader.tensors) == [tensor.name for tensor in expected.tensors]
    for tensor in expected.tensors:
        info = reader.tensors[tensor.name]
        assert info.dtype == tensor.tensor_type.name
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.nbytes == tensor.n_bytes
        assert reader.read(tensor.name).tobytes() == tensor.data.tobytes()
    metadata = GgufFile(TINY).metadata
    assert metadata == {
        key: field.contents() for key, field in expected.fields.items() if "GGUF." not in key
    }


def test_rows():
    reader = GgufFile(TINY)
    for name in ("token_embd.weight", "blk.2.ffn_up_exps.weight", "blk.0.attn_q.bias"):
        whole = reader.read(name)
        np.testing.assert_array_equal(reader.read(name, slice(3, 5)), whole[3:5], strict=True)
        np.testing.assert_array_equal(reader.read(name, slice(5, 3)), whole[5:3], strict=True)


def test_parameters_equal_those_of_the_hugging_face_folder():
    specs = parameter_specs(read_config(HF))
    expected = dict(read_parameters(SafetensorsFolder(HF), specs))
    found = dict(read_parameters(GgufFile(TINY), specs))
    assert list(found) == list(expected)
    for name, value in expected.items():
        other = found[name]
        if isinstance(value, MXFP4Array):
            np.testing.assert_array_equal(other.blocks, value.blocks, strict=True)
            np.testing.assert_array_equal(other.scales, value.scales, strict=True)
        else:
            np.testing.assert_array_equal(other, value.astype(np.float32), strict=True)


def test_golden_nibble_order():
    vectors = np.load(GOLDEN / "mxfp4_vectors.npz")
    raw = vectors["gguf_rows"].reshape(5, 7, 17)
    blocks, scales = unpack_mxfp4(raw)
    np.testing.assert_array_equal(blocks, vectors["hf_blocks"], strict=True)
    np.testing.assert_array_equal(scales, vectors["hf_scales"], strict=True)
    np.testing.assert_array_equal(pack_mxfp4(blocks, scales), raw, strict=True)


def test_every_byte_survives_repacking():
    raw = np.random.default_rng(0).integers(0, 256, (5, 7, 17), np.uint8)
    raw.flags.writeable = False
    blocks, scales = unpack_mxfp4(raw)
    codes = np.concatenate([raw[..., 1:] & 15, raw[..., 1:] >> 4], axis=-1)
    np.testing.assert_array_equal(unpack_codes(blocks), codes.reshape(5, 7 * 32), strict=True)
    np.testing.assert_array_equal(pack_mxfp4(blocks, scales), raw, strict=True)
    for part in (raw[:1, :1], raw[:, 2:3], raw[:0]):
        np.testing.assert_array_equal(pack_mxfp4(*unpack_mxfp4(part)), part, strict=True)


def test_a_file_without_a_vocabulary_has_no_tokenizer():
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; .*, found 'none' and None"):
        load_tokenizer(TINY)


def test_configuration_and_logits_are_those_of_the_hugging_face_folder():
    config = read_config(TINY)
    expected = read_config(HF)
    # Metadata is float32, and this file has no tokenizer.
    assert config.rms_norm_eps == np.float32(expected.rms_norm_eps)
    same = {"rms_norm_eps", "eos_token_ids"}
    assert {k: v for k, v in vars(config).items() if k not in same} == {
        k: v for k, v in vars(expected).items() if k not in same
    }
    assert config.eos_token_ids == ()
    assert config.rope_scaling is not None and not config.rope_scaling.truncate
    oracle = np.load(GOLDEN / "tiny-gptoss" / "hf_oracle.npz")
    model = GptOss.from_pretrained(TINY, jnp.float32, "reference")
    np.testing.assert_allclose(model(oracle["tokens"]), oracle["fp32.logits"], rtol=0, atol=1e-4)


def test_element_types_of_dense_tensors(tmp_path):
    kinds = {"attn_q.weight": Type.Q8_0, "attn_k.weight": Type.BF16, "attn_v.weight": Type.F16}

    def convert(name, data, kind):
        for suffix, other in kinds.items():
            if name.endswith(suffix):
                return gguf.quantize(data, other), other
        return data, kind

    file = rewrite(tmp_path / "mixed.gguf", convert)
    specs = parameter_specs(read_config(file))
    expected = dict(read_parameters(GgufFile(TINY), specs))
    found = dict(read_parameters(GgufFile(file), specs))
    for letter, dtype, kind in (
        ("q", np.float32, Type.Q8_0),
        ("k", ml_dtypes.bfloat16, Type.BF16),
        ("v", np.float16, Type.F16),
    ):
        name = f"layers.1.attention.{letter}.weight"
        assert found[name].dtype == dtype
        original = np.asarray(expected[name])
        rounded = gguf.dequantize(gguf.quantize(original, kind), kind)
        np.testing.assert_array_equal(found[name].astype(np.float32), rounded)
        part = (
            slice(3, 9),
            slice(5, 40),
        )  # of Q8_0 neither from the start of a block nor to an end
        read = GptOssParameters(GgufFile(file), specs).read(name, part)
        np.testing.assert_array_equal(read, found[name][part], strict=True)


def test_q8_0_against_the_gguf_package():
    raw = gguf.quantize(np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32), Type.Q8_0)
    np.testing.assert_array_equal(
        dequantize_q8_0(raw.reshape(6, 3, 34)), gguf.dequantize(raw, Type.Q8_0), strict=True
    )


def test_what_metadata_may_say_or_leave_out(tmp_path):
    config = read_config(
        rewrite(
            tmp_path / "a.gguf",
            **{
                "gpt-oss.vocab_size": None,
                "gpt-oss.expert_feed_forward_length": None,
                "gpt-oss.rope.scaling.type": "none",
                "gpt-oss.attention.sliding_window_pattern": [True, True, False, True],
                "tokenizer.ggml.tokens": ["a", "é"],
                "tokenizer.ggml.eos_token_id": 510,
                "tokenizer.ggml.eot_token_id": 509,
            },
        )
    )
    assert (config.vocab_size, config.intermediate_size) == (512, 64)
    assert config.rope_scaling is None
    assert [kind.split("_")[0] for kind in config.layer_types] == [
        *("sliding", "sliding", "full", "sliding")
    ]
    assert config.eos_token_ids == (510, 509)


def test_every_problem_with_the_metadata_is_reported_at_once(tmp_path):
    file = rewrite(
        tmp_path / "a.gguf",
        **{
            "gpt-oss.embedding_length": None,
            "gpt-oss.attention.value_length": 64,
            "gpt-oss.rope.scaling.type": "longrope",
            "gpt-oss.attention.head_count_kv": None,
        },
    )
    with pytest.raises(CheckpointError) as caught:
        read_config(file)
    assert caught.value.problems == (
        "'gpt-oss.attention.value_length': expected 32, the only supported value, found 64",
        "'gpt-oss.embedding_length': missing, expected int",
        "'gpt-oss.attention.head_count_kv': missing, expected int",
        "'gpt-oss.rope.scaling.type': expected 'yarn' or 'none', found 'longrope'",
    )


def test_every_problem_with_the_tensors_is_reported_at_once(tmp_path):
    def convert(name, data, kind):
        if name == "blk.0.attn_sinks.weight":
            return None
        if name == "blk.1.ffn_gate_exps.weight":
            return gguf.dequantize(data, kind), Type.F32
        if name == "output.weight":
            return data[:-1], kind
        return data, kind

    with pytest.raises(CheckpointError) as caught:
        GptOss.from_pretrained(rewrite(tmp_path / "a.gguf", convert))
    assert sorted(caught.value.problems) == [
        "a.gguf: tensor 'blk.1.ffn_gate_exps.weight': expected MXFP4 [8, 64, 96], "
        "found F32 [8, 64, 96]",
        "a.gguf: tensor 'output.weight': expected BF16 or F16 or F32 or Q8_0 [512, 96], "
        "found F32 [511, 96]",
        "tensor 'blk.0.attn_sinks.weight': missing, expected BF16 or F16 or F32 [4]",
    ]


def test_another_architecture(tmp_path):
    file = tmp_path / "llama.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match=r"'general\.architecture': expected 'gpt-oss', found"
    ):
        read_config(file)


def test_a_split_file(tmp_path):
    source = gguf.GGUFReader(TINY)
    half = len(source.tensors) // 2
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "gpt-oss", split_max_tensors=half + 1)
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, second = sorted(tmp_path.iterdir())
    assert first.name == "tiny-00001-of-00002.gguf"
    whole, parts = GgufFile(TINY), GgufFile(first)
    assert sorted(parts.tensors) == sorted(whole.tensors)
    for name in whole.tensors:
        np.testing.assert_array_equal(parts.read(name), whole.read(name))
    assert read_config(first) == read_config(TINY)
    with pytest.raises(CheckpointError, match="expected the first part"):
        GgufFile(second)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"tiny-00002-of-00002\.gguf: missing file"):
        GgufFile(first)
