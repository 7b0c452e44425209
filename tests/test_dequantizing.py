"""Dequantized checkpoints in chunks: the right values, never more than was asked for."""

import shutil
import tracemalloc
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_mxfp4.checkpoints import CheckpointError, dequantized_chunks, open_checkpoint
from jax_mxfp4.checkpoints.dequantizing import decode_blocks
from jax_mxfp4.checkpoints.logical_tensors import boxes, logical_tensors, read_packed
from jax_mxfp4.format import decode

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny-gptoss"
PATHS = [
    TINY / "hf",
    TINY / "original",
    TINY / "tiny-mxfp4.gguf",
    GOLDEN / "tiny-llama-mxfp4" / "packed",
]
FLOATS = [np.float32, ml_dtypes.bfloat16, np.float16]


def whole(reader, dtype, max_bytes):
    """Every tensor, put together from its chunks, which are checked to cover it once, in order."""
    found, covered = {}, {}
    for chunk in dequantized_chunks(reader, dtype, max_bytes):
        if chunk.name not in found:
            found[chunk.name] = np.zeros(chunk.shape, chunk.values.dtype)
            covered[chunk.name] = np.zeros(chunk.shape, np.int64)
        assert 0 < chunk.values.nbytes <= max_bytes
        assert found[chunk.name][chunk.part].shape == chunk.values.shape
        first = [one.start for one in chunk.part]
        assert np.count_nonzero(covered[chunk.name]) == np.ravel_multi_index(
            first + [0] * (len(chunk.shape) - len(first)), chunk.shape
        )
        found[chunk.name][chunk.part] = chunk.values
        covered[chunk.name][chunk.part] += 1
    assert all((cover == 1).all() for cover in covered.values())
    return found


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
def test_every_code_under_every_scale(dtype):
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8), 16)
    found = decode_blocks(blocks, scales, np.dtype(dtype)).astype(np.float64)
    expected = np.asarray(decode(blocks, scales, dtype)).astype(np.float64)
    np.testing.assert_array_equal(found, expected)
    numbers = ~np.isnan(found)
    np.testing.assert_array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("max_bytes", [128, 1000, 20_000, 2**26])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_chunks_make_up_the_tensors(path, max_bytes):
    reader = open_checkpoint(path)
    if max_bytes == 128:  # many small chunks: of a few tensors
        name = next(name for name, one in logical_tensors(reader).items() if one.dtype == "MXFP4")
        chunks = list(dequantized_chunks(reader, np.float32, max_bytes, [name]))
        assert {chunk.values.shape[-1] for chunk in chunks} == {32}
        assert len(chunks) * 32 == np.prod(chunks[0].shape)
        return
    found = whole(reader, np.float32, max_bytes)
    tensors = logical_tensors(reader)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == "MXFP4":
            expected = np.asarray(decode(*read_packed(reader, tensor), np.float32))
        else:
            expected = reader.read(name).astype(np.float32)
        np.testing.assert_array_equal(found[name], expected, strict=True)


def test_layouts_have_the_same_values():
    hugging_face, openai, ggml = (
        whole(open_checkpoint(path), np.float32, 2**20) for path in PATHS[:3]
    )
    down = hugging_face["model.layers.3.mlp.experts.down_proj"]
    np.testing.assert_array_equal(openai["block.3.mlp.mlp2_weight"], down)
    np.testing.assert_array_equal(ggml["blk.3.ffn_down_exps.weight"], down)


def test_compressed_tensors_have_the_names_of_the_weights():
    tensors = logical_tensors(open_checkpoint(PATHS[3]))
    packed = {name: one for name, one in tensors.items() if one.dtype == "MXFP4"}
    assert packed
    for name, tensor in packed.items():
        assert name.endswith("_proj.weight")
        codes, scales = tensor.stored
        assert tensor.shape == (codes.shape[0], 2 * codes.shape[1])
        assert tensor.nbytes == codes.nbytes + scales.nbytes


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=lambda dtype: np.dtype(dtype).name)
def test_other_types(dtype):
    reader = open_checkpoint(TINY / "hf")
    found = whole(reader, dtype, 5000)
    wide = whole(reader, np.float32, 5000)
    for name, values in wide.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], values.astype(dtype))


def test_what_is_no_number_of_floating_point_stays(tmp_path):
    tensors = {
        "ids": np.arange(10).reshape(2, 5),
        "mask": np.array([True, False]),
        "half": np.array([0.1, 2], np.float16),
        "scalar": np.array(3.5, np.float64),
        "a_blocks": np.zeros((2, 16), np.uint8),  # without scales
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = whole(open_checkpoint(tmp_path), np.float32, 128)
    assert set(found) == set(tensors)
    for name in ("ids", "mask", "a_blocks"):
        np.testing.assert_array_equal(found[name], tensors[name], strict=True)
    for name in ("half", "scalar"):
        np.testing.assert_array_equal(found[name], tensors[name].astype(np.float32), strict=True)


def test_q8_0(tmp_path):
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    raw = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "test")
    writer.add_tensor("w", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("v", raw.reshape(-1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    for max_bytes in (128, 300, 2**20):
        found = whole(open_checkpoint(tmp_path / "a.gguf"), np.float32, max_bytes)
        np.testing.assert_array_equal(found["w"], expected, strict=True)
        np.testing.assert_array_equal(found["v"], expected.reshape(-1), strict=True)


def test_types_that_cannot_be_decoded(tmp_path):
    raw = np.zeros((2, 144), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "test")
    writer.add_tensor("w", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError) as caught:
        dequantized_chunks(open_checkpoint(tmp_path / "a.gguf"), names=["x", "w"])
    assert caught.value.problems == ("no tensor 'x'", "tensor 'w': Q4_K cannot be decoded")


def test_bad_arguments():
    reader = open_checkpoint(TINY / "hf")
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16, found int8"):
        dequantized_chunks(reader, np.int8)
    with pytest.raises(ValueError, match=r"max_bytes: expected at least 64, .* found 63"):
        dequantized_chunks(reader, max_bytes=63)


@pytest.mark.parametrize("form", ["gpt-oss", "compressed-tensors", "dense"])
def test_memory_is_bounded(tmp_path, form):
    """Tensors of 64 MiB in float32, in chunks of 256 KiB."""
    rows, groups = 2048, 256
    scales = np.full((rows, groups), 120, np.uint8)
    blocks = np.random.default_rng(0).integers(0, 256, (rows, groups, 16), np.uint8)
    tensors = {
        "gpt-oss": {"w_blocks": blocks[None], "w_scales": scales[None]},
        "compressed-tensors": {
            "w.weight_packed": blocks.reshape(rows, -1),
            "w.weight_scale": scales,
        },
        "dense": {"w": np.zeros((1, rows, 32 * groups), ml_dtypes.bfloat16)},
    }
    save_file(tensors[form], tmp_path / "model.safetensors")
    del tensors, blocks, scales
    max_bytes, total = 2**18, 0
    reader = open_checkpoint(tmp_path)
    list(dequantized_chunks(open_checkpoint(TINY / "hf"), np.float32))  # makes tables
    tracemalloc.start()
    for chunk in dequantized_chunks(reader, np.float32, max_bytes):
        assert chunk.values.nbytes <= max_bytes
        total += chunk.values.nbytes
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 4 * rows * groups * 32
    # Two chunks (the old one lives while the next is made), what they are made of, and indices.
    assert peak < 2 * max_bytes + 4 * 2**20


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (1, 1, 9), (5, 0, 2)], ids=str)
@pytest.mark.parametrize("limit", [1, 4, 6, 1000])
def test_boxes(shape, limit):
    counts = np.zeros(shape, np.int64)
    before = -1
    for part in boxes(shape, limit):
        assert 0 < counts[part].size <= limit
        counts[part] += 1
        flat = np.flatnonzero(counts.reshape(-1))
        assert flat[-1] == len(flat) - 1 > before
        before = flat[-1]
    assert (counts == 1).all()


def test_names_that_look_packed(tmp_path):
    """Pairs whose shapes do not fit together are tensors of their own."""
    source = shutil.copytree(TINY / "original", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "block.1.mlp.mlp2_weight"
    tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:, :-1].copy()
    save_file(tensors, source / "model.safetensors")
    found = logical_tensors(open_checkpoint(source))
    assert name not in found
    assert (found[f"{name}.blocks"].dtype, found[f"{name}.scales"].dtype) == ("U8", "U8")
