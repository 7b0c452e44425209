"""What is fuzzed: small valid checkpoints, how they are damaged, and how they are read."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
from mutations import damage_bytes, damage_json, damage_safetensors
from safetensors.numpy import save

from jax_mxfp4.checkpoints import WeightsFolder, open_checkpoint, read_parameters
from jax_mxfp4.checkpoints.checksums import SUFFIX, SUMS, check_files, record_checksums
from jax_mxfp4.checkpoints.gpt_oss_layout import plan
from jax_mxfp4.checkpoints.original_dtypes import dense_dtypes
from jax_mxfp4.checkpoints.statistics import summarize
from jax_mxfp4.convert import convert
from jax_mxfp4.models.gpt_oss import GptOssConfig, load_tokenizer, mini_path, read_config
from jax_mxfp4.models.gpt_oss.config_writing import hugging_face_json
from jax_mxfp4.models.gpt_oss.params import parameter_specs

Files = dict[str, bytes]

_CONFIG = GptOssConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=2,
    experts_per_token=1,
    layer_types=("sliding_attention", "full_attention"),
    sliding_window=8,
    eos_token_ids=(3,),
)


@dataclass(frozen=True)
class Target:
    """One reader under test.

    Attributes:
      variants: valid checkpoints, each as names and contents of its files.
      opened: the name of the file to open, "" for the folder.
      load: reads all there is to read.
      spoiled: which files are damaged, one at a time; empty for all.
    """

    variants: tuple[Files, ...]
    opened: str
    load: Callable[[Path], None]
    spoiled: tuple[str, ...] = ()

    def damaged(self, rng: random.Random) -> Files:
        """Return one of the variants with one of its files damaged."""
        files = dict(rng.choice(self.variants))
        name = rng.choice(sorted(self.spoiled or files))
        files[name] = _DAMAGE[name.rpartition(".")[2]](files[name], rng)
        return files


def _hugging_face_target(scratch: Path) -> Target:
    source = _write(scratch / "hf", _hugging_face())
    convert(source, scratch / "sharded", max_shard_bytes=8000)
    sharded = _files(scratch / "sharded")
    # The names that the released files have: counted from zero.
    zero_based = {_count_from_zero(name): content for name, content in sharded.items()}
    index = "model.safetensors.index.json"
    zero_based[index] = _count_from_zero(zero_based[index].decode()).encode()
    unindexed = {name: content for name, content in zero_based.items() if name != index}
    return Target((_hugging_face(), sharded, zero_based, unindexed), "", _load)


def _openai_files(scratch: Path) -> Files:
    convert(_write(scratch / "hf", _hugging_face()), scratch / "openai", "openai")
    return _files(scratch / "openai")


def _openai_target(scratch: Path) -> Target:
    return Target((_openai_files(scratch),), "", _load)


def _gguf_target(scratch: Path) -> Target:
    convert(_write(scratch / "hf", _hugging_face()), scratch / "a.gguf")
    return Target(({"a.gguf": (scratch / "a.gguf").read_bytes()},), "a.gguf", _load)


def _compressed_tensors_target(scratch: Path) -> Target:
    source = _write(scratch / "llama", _llama())
    convert(source, scratch / "packed")
    convert(source, scratch / "sharded", max_shard_bytes=4000)
    return Target((_files(scratch / "packed"), _files(scratch / "sharded")), "", _load_weights)


def _config_target(scratch: Path) -> Target:
    variants = tuple(
        {name: content for name, content in files.items() if name.endswith("config.json")}
        for files in (_hugging_face(), _openai_files(scratch))
    )
    return Target(variants, "", _load_config)


def _tokenizer_target(scratch: Path) -> Target:
    del scratch
    name = "tokenizer.json"
    return Target(({name: (mini_path() / name).read_bytes()},), "", _load_tokenizer)


def _checksums_target(scratch: Path) -> Target:
    files = {f"{letter}.json": letter.encode() for letter in "ab"}
    folder = _write(scratch / "files", files)
    record_checksums(folder)
    record_checksums(folder / "a.json")
    names = (SUMS, f"a.json{SUFFIX}")
    records = {name: (folder / name).read_bytes() for name in names}
    return Target((files | records,), "", _check, names)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "huggingface": _hugging_face_target,
    "openai": _openai_target,
    "gguf": _gguf_target,
    "compressed-tensors": _compressed_tensors_target,
    "config": _config_target,
    "tokenizer": _tokenizer_target,
    "checksums": _checksums_target,
}
"""Every target by name; each makes its files in an empty folder."""


def _load(path: Path) -> None:
    """Do what `inspect`, `convert` and loading do with a checkpoint."""
    # Not strictly, so that what is there twice does not hide the rest from being tried.
    reader = open_checkpoint(path, strict=False)
    for _ in summarize(reader):
        pass
    specs = parameter_specs(read_config(path))
    dense_dtypes(reader, specs)
    for _ in read_parameters(reader, specs):
        pass


def _load_weights(path: Path) -> None:
    for _ in summarize(open_checkpoint(path, strict=False)):
        pass
    for _ in WeightsFolder(path).items():
        pass


def _check(path: Path) -> None:
    for checksum in check_files(path, [path / "a.json"]):
        assert isinstance(checksum.problems, list)


def _load_config(path: Path) -> None:
    parameter_specs(read_config(path))


def _load_tokenizer(path: Path) -> None:
    load_tokenizer(path)


def _hugging_face() -> Files:
    rng = np.random.default_rng(0)
    tensors = {}
    for source in plan("huggingface", parameter_specs(_CONFIG)).values():
        for tensor in source.tensors:
            values = rng.integers(100, 130, tensor.shape, np.uint8)
            is_packed = tensor.dtypes == ("U8",)
            tensors[tensor.name] = values if is_packed else values.astype(ml_dtypes.bfloat16)
    without_ids = hugging_face_json(replace(_CONFIG, eos_token_ids=()))
    return {
        "config.json": json.dumps(without_ids).encode(),
        "generation_config.json": b'{"eos_token_id": [3], "transformers_version": "5"}',
        "model.safetensors": save(tensors, {"format": "pt"}),
    }


def _llama() -> Files:
    rng = np.random.default_rng(1)
    tensors = {
        f"model.layers.{layer}.self_attn.{letter}_proj.weight": rng.normal(size=(32, 64))
        for layer in (0, 1)
        for letter in "qkvo"
    }
    tensors["model.norm.weight"] = np.ones(64)
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    return {"config.json": b'{"model_type": "llama"}', "model.safetensors": save(arrays)}


def _count_from_zero(text: str) -> str:
    for number in range(1, 100):
        text = text.replace(f"model-{number:05}-of-", f"model-{number - 1:05}-of-")
    count = text.rpartition("-of-")[2][:5]
    return text.replace(f"-of-{count}", f"-of-{int(count) - 1:05}") if count.isdigit() else text


def _damage_gguf(data: bytes, rng: random.Random) -> bytes:
    # Names, sizes and metadata come first and are less than a fifth of the file.
    return damage_bytes(data, rng, len(data) // 5)


def _damage_text(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return damage_bytes(data, rng, len(data))
    words = data.split(b" ")
    words[rng.randrange(len(words))] = rng.choice(_WORDS)
    return b" ".join(words)


_WORDS = (b"../a.json", b"/etc/passwd", b"a" * 5000, b"a/" * 5000, b".", b"b.json", b"\n", b"\0\n")
_DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": damage_json,
    "safetensors": damage_safetensors,
    "gguf": _damage_gguf,
    SUMS: _damage_text,
    SUFFIX[1:]: _damage_text,
}


def _files(folder: Path) -> Files:
    """Return what readers look at; checksums are a target of their own."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SUMS}


def _write(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
