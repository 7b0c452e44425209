"""Tensors that are there twice: reported with all else that is wrong, and never just used.

Files are edited by names of one length for another, which leaves everything else in its place.
"""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import tiny_llama
from unpacked import write_unpacked

from jax_mxfp4.checkpoints import (
    CheckpointError,
    SafetensorsFolder,
    WeightsFolder,
    dequantized_chunks,
    open_checkpoint,
)
from jax_mxfp4.convert import convert
from jax_mxfp4.inspection import diff, verify
from jax_mxfp4.models.gpt_oss import GptOss
from jax_mxfp4.models.llama import Llama
from jax_mxfp4.validation.gpt_oss_dense import DenseGptOss
from jax_mxfp4.validation.judges import load_judge

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny-gptoss"
PACKED_LLAMA = GOLDEN / "tiny-llama-mxfp4" / "packed"
SHARDS = [f"model-0000{number}-of-00001.safetensors" for number in (0, 1)]
ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = "BF16 or F16 or F32"


def rename(file: Path, *changes: tuple[str, str]) -> None:
    content = file.read_bytes()
    for old, new in changes:
        assert len(old) == len(new) and content.count(old.encode()) == 1, old
        content = content.replace(old.encode(), new.encode())
    file.write_bytes(content)


def swap(one: str, other: str) -> tuple[tuple[str, str], ...]:
    return (one, "?" * len(one)), (other, one), ("?" * len(one), other)


def hugging_face(tmp_path: Path) -> tuple[Path, set[str]]:
    folder = shutil.copytree(TINY / "hf", tmp_path / "hf")
    layer = "model.layers."
    norm, sinks = ".input_layernorm.weight", ".self_attn.sinks"
    rename(folder / SHARDS[0], (f"{layer}1{norm}", f"{layer}0{norm}"))
    rename(
        folder / SHARDS[1],
        (f"{layer}2{sinks}", f"{layer}0{sinks}"),
        (f"{layer}3{sinks}", f"{layer}9{sinks}"),
        *swap(f"{layer}3.self_attn.q_proj.bias", f"{layer}3.self_attn.k_proj.bias"),
        ('"model.norm.weight":{"dtype":"BF16"', '"model.norm.weight":{"dtype": "I16"'),
    )
    return folder, {
        f"{SHARDS[0]}: '{layer}0{norm}' occurs twice in the header",
        f"{SHARDS[1]}: tensor '{layer}0{sinks}' is also in {SHARDS[0]}",
        f"tensor '{layer}1{norm}': missing, expected {FLOATS} [96]",
        f"tensor '{layer}2{sinks}': missing, expected {FLOATS} [4]",
        f"tensor '{layer}3{sinks}': missing, expected {FLOATS} [4]",
        f"{SHARDS[1]}: tensor '{layer}9{sinks}': unexpected, found BF16 [4]",
        f"{SHARDS[1]}: tensor '{layer}3.self_attn.q_proj.bias': "
        f"expected {FLOATS} [128], found BF16 [64]",
        f"{SHARDS[1]}: tensor '{layer}3.self_attn.k_proj.bias': "
        f"expected {FLOATS} [64], found BF16 [128]",
        f"{SHARDS[1]}: tensor 'model.norm.weight': expected {FLOATS} [96], found I16 [96]",
    }


def with_index(tmp_path: Path) -> tuple[Path, set[str]]:
    folder, problems = hugging_face(tmp_path)
    named = "tensor 'model.layers.{}.self_attn.sinks'"
    return folder, problems | {
        "tensor 'model.layers.1.input_layernorm.weight': the index says "
        f"{SHARDS[0]}, found in none of the files",
        f"{named.format(2)}: the index says {SHARDS[1]}, found in none of the files",
        f"{named.format(3)}: the index says {SHARDS[1]}, found in none of the files",
        f"{named.format(9)} of {SHARDS[1]}: not in the index",
    }


def without_index(tmp_path: Path) -> tuple[Path, set[str]]:
    folder, problems = hugging_face(tmp_path)
    (folder / INDEX).unlink()
    return folder, problems


def openai(tmp_path: Path) -> tuple[Path, set[str]]:
    folder = shutil.copytree(TINY / "original", tmp_path / "original")
    rename(
        folder / ONE,
        ("block.1.attn.sinks", "block.0.attn.sinks"),
        ("block.2.attn.sinks", "block.9.attn.sinks"),
        *swap("block.3.attn.qkv.bias", "block.3.attn.out.bias"),
        ('"norm.scale":{"dtype":"BF16"', '"norm.scale":{"dtype": "I16"'),
    )
    return folder, {
        f"{ONE}: 'block.0.attn.sinks' occurs twice in the header",
        f"tensor 'block.1.attn.sinks': missing, expected {FLOATS} [4]",
        f"tensor 'block.2.attn.sinks': missing, expected {FLOATS} [4]",
        f"{ONE}: tensor 'block.9.attn.sinks': unexpected, found BF16 [4]",
        f"{ONE}: tensor 'block.3.attn.qkv.bias': expected {FLOATS} [256], found BF16 [96]",
        f"{ONE}: tensor 'block.3.attn.out.bias': expected {FLOATS} [96], found BF16 [256]",
        f"{ONE}: tensor 'norm.scale': expected {FLOATS} [96], found I16 [96]",
    }


def gguf(tmp_path: Path) -> tuple[Path, set[str]]:
    file = Path(shutil.copy(TINY / "tiny-mxfp4.gguf", tmp_path))
    rename(
        file,
        ("blk.1.attn_sinks.weight", "blk.0.attn_sinks.weight"),
        ("blk.2.attn_sinks.weight", "blk.9.attn_sinks.weight"),
        *swap("blk.3.attn_q.bias", "blk.3.attn_k.bias"),
    )
    return file, {
        f"{file.name}: tensor 'blk.0.attn_sinks.weight': occurs twice",
        f"tensor 'blk.1.attn_sinks.weight': missing, expected {FLOATS} [4]",
        f"tensor 'blk.2.attn_sinks.weight': missing, expected {FLOATS} [4]",
        f"{file.name}: tensor 'blk.9.attn_sinks.weight': unexpected, found F32 [4]",
        f"{file.name}: tensor 'blk.3.attn_q.bias': expected {FLOATS} [128], found F32 [64]",
        f"{file.name}: tensor 'blk.3.attn_k.bias': expected {FLOATS} [64], found F32 [128]",
    }


USES = {
    "load": lambda path, scratch: GptOss.from_pretrained(path),
    "load dense": lambda path, scratch: DenseGptOss.from_pretrained(path),
    "verify": lambda path, scratch: verify(path),
    "convert": lambda path, scratch: convert(path, scratch / "converted"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", [with_index, without_index, openai, gguf])
def test_all_that_is_wrong_is_one_error(tmp_path, make, use):
    path, problems = make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        USES[use](path, tmp_path)
    assert set(caught.value.problems) == problems
    assert len(caught.value.problems) == len(problems)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("use", ["verify", "convert"])
def test_experts_that_are_not_packed(tmp_path, use):
    folder = write_unpacked(tmp_path / "openai", "openai")
    (file,) = folder.glob("*.safetensors")
    rename(
        file,
        ("block.1.attn.sinks", "block.0.attn.sinks"),
        ("block.2.mlp.mlp1_weight", "block.9.mlp.mlp1_weight"),
    )
    with pytest.raises(CheckpointError) as caught:
        USES[use](folder, tmp_path)
    missing = ("block.1.attn.sinks", "block.2.mlp.mlp1_weight")
    assert {problem.partition(", ")[0] for problem in caught.value.problems} == {
        *(f"tensor {name!r}: missing" for name in missing),
        f"{file.name}: tensor 'block.9.mlp.mlp1_weight': unexpected",
        f"{file.name}: 'block.0.attn.sinks' occurs twice in the header",
    }


def test_two_files_of_openai(tmp_path):
    folder = shutil.copytree(TINY / "original", tmp_path / "original")
    shutil.copy(folder / ONE, folder / "model2.safetensors")
    rename(folder / ONE, ("block.1.attn.sinks", "block.9.attn.sinks"))
    rename(folder / "model2.safetensors", ("block.1.attn.sinks", "block.8.attn.sinks"))
    with pytest.raises(CheckpointError) as caught:
        GptOss.from_pretrained(folder)
    missing, *unexpected = caught.value.problems[:3]
    assert missing.startswith("tensor 'block.1.attn.sinks': missing")
    assert [problem.partition(", ")[0] for problem in unexpected] == [
        f"{ONE}: tensor 'block.9.attn.sinks': unexpected",
        "model2.safetensors: tensor 'block.8.attn.sinks': unexpected",
    ]
    duplicates = caught.value.problems[3:]
    assert len(duplicates) == len(SafetensorsFolder(TINY / "original").tensors) - 1
    assert all(problem.endswith(f"is also in {ONE}") for problem in duplicates)


@pytest.mark.parametrize(
    "use",
    [
        SafetensorsFolder,
        open_checkpoint,
        lambda path: list(dequantized_chunks(open_checkpoint(path))),
        lambda path: list(diff(path, TINY / "original")),
        lambda path: list(diff(TINY / "original", path)),
    ],
    ids=["folder", "open", "dequantize", "diff", "diff with"],
)
def test_who_compares_with_no_model_refuses_at_once(tmp_path, use):
    path, problems = openai(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        use(path)
    assert set(caught.value.problems) == {one for one in problems if "twice" in one}


@pytest.mark.parametrize("make", [with_index, without_index, openai, gguf])
def test_what_is_left_to_the_caller_is_named(tmp_path, make):
    path, problems = make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    reader = open_checkpoint(path, strict=False)
    assert tuple(reader.problems) == caught.value.problems
    assert set(reader.problems) < problems


def test_a_good_checkpoint_has_no_problems():
    for path in (TINY / "hf", TINY / "original", TINY / "tiny-mxfp4.gguf"):
        for strict in (True, False):
            assert not open_checkpoint(path, strict=strict).problems
    assert not WeightsFolder(PACKED_LLAMA, strict=False).problems


def test_damage_is_an_error_for_all_and_names_what_is_there_twice(tmp_path):
    path, problems = openai(tmp_path)
    content = (path / ONE).read_bytes()
    (path / ONE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated or damaged") as caught:
        open_checkpoint(path, strict=False)
    assert caught.value.problems[0] in problems


def test_packed_weights_that_do_not_fit_together(tmp_path):
    folder = shutil.copytree(PACKED_LLAMA, tmp_path / "packed")
    up, gate = "model.layers.{}.mlp.up_proj.{}", "model.layers.1.mlp.gate_proj.{}"
    rename(
        folder / ONE,
        (up.format(1, "weight_scale"), up.format(0, "weight_scale")),
        (gate.format("weight_scale"), gate.format("weight_shape")),
    )
    expected = {
        f"{ONE}: {up.format(0, 'weight_scale')!r} occurs twice in the header",
        *(
            f"{ONE}: tensor {name!r}: expected 'weight_scale' U8 [128, 2] beside it, found none"
            for name in (up.format(1, "weight_packed"), gate.format("weight_packed"))
        ),
        f"{ONE}: tensor {gate.format('weight_shape')!r}: unexpected, found U8 [128, 2]",
    }
    for use in (WeightsFolder, verify, Llama.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            use(folder)
        assert set(caught.value.problems) == expected


def test_a_folder_of_llama(tmp_path):
    folder = shutil.copytree(PACKED_LLAMA, tmp_path / "packed")
    norm, other = "model.layers.{}.input_layernorm.weight", "model.layers.{}.post_attention_"
    rename(
        folder / ONE,
        (norm.format(1), norm.format(0)),
        (other.format(1), other.format(9)),
    )
    twice = f"{ONE}: {norm.format(0)!r} occurs twice in the header"
    missing = [
        f"tensor {name!r}: missing"
        for name in (norm.format(1), f"{other.format(1)}layernorm.weight")
    ]
    with pytest.raises(CheckpointError) as caught:
        Llama.from_pretrained(folder)
    assert set(caught.value.problems) == {
        *missing,
        f"tensor '{other.format(9)}layernorm.weight': not expected",
        twice,
    }
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert set(caught.value.problems) == {*(f"{one}, expected [64]" for one in missing), twice}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "another"}))
    for use in (WeightsFolder, verify):
        with pytest.raises(CheckpointError) as caught:
            use(folder)
        assert caught.value.problems == (twice,)


def test_a_gguf_file_of_llama(tmp_path):
    file = tiny_llama.write_gguf(tmp_path / "llama.gguf")
    rename(
        file,
        ("blk.1.ffn_norm.weight", "blk.0.ffn_norm.weight"),
        ("blk.1.attn_norm.weight", "blk.9.attn_norm.weight"),
    )
    for use in (Llama.from_gguf, lambda file: load_judge(file, "float32", "dense")):
        with pytest.raises(CheckpointError) as caught:
            use(file)
        assert set(caught.value.problems) == {
            "tensor 'blk.1.ffn_norm.weight': missing",
            "tensor 'blk.1.attn_norm.weight': missing",
            "tensor 'blk.9.attn_norm.weight': not expected",
            "llama.gguf: tensor 'blk.0.ffn_norm.weight': occurs twice",
        }


def test_very_many_names_twice(tmp_path):
    """The message has the first thousand, and memory stays in proportion to the header."""
    count = 5000
    entry = '"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(entry % (number % count) for number in range(2 * count)) + "}"
    folder = shutil.copytree(TINY / "original", tmp_path / "original")
    (folder / "model2.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            GptOss.from_pretrained(folder)
        assert tracemalloc.get_traced_memory()[1] < 30 * len(text)
    finally:
        tracemalloc.stop()
    assert len(caught.value.problems) == 2 * count  # unexpected, and there twice
    assert str(caught.value).endswith(f"and {2 * count - 1000} more")
    assert len(str(caught.value)) < 100_000
