"""Writing GPT-OSS checkpoints in another layout, without decoding what is packed."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jax_mxfp4.checkpoints import (
    CheckpointError,
    GgufFile,
    Layout,
    Packer,
    PackingReader,
    Progress,
    SafetensorsFolder,
    detect_layout,
    has_unpacked_experts,
    open_checkpoint,
)
from jax_mxfp4.checkpoints.folder_writer import write_folder
from jax_mxfp4.checkpoints.gguf_writer import write_gguf
from jax_mxfp4.checkpoints.reader import read_small_file
from jax_mxfp4.convert.packing import round_to_nearest
from jax_mxfp4.convert.vocabulary import ggml_vocabulary, tokenizer_files
from jax_mxfp4.models.gpt_oss.config import GptOssConfig, YarnScaling
from jax_mxfp4.models.gpt_oss.config_gguf import CARRIED_CONFIG, CARRIED_GENERATION_CONFIG
from jax_mxfp4.models.gpt_oss.config_json import read_config
from jax_mxfp4.models.gpt_oss.config_writing import (
    gguf_metadata,
    hugging_face_json,
    openai_json,
)
from jax_mxfp4.models.gpt_oss.params import parameter_specs
from jax_mxfp4.models.gpt_oss.tokenizer import CARRIED_TOKENIZER, MAX_TOKENIZER_BYTES

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_CARRIED = {
    "config.json": CARRIED_CONFIG,
    "generation_config.json": CARRIED_GENERATION_CONFIG,
    **{name: f"jax_mxfp4.{name}" for name in _TOKENIZER_FILES},
    "tokenizer.json": CARRIED_TOKENIZER,
    "chat_template.jinja": "tokenizer.chat_template",  # where llama.cpp looks for it
}
_MOSTLY_MXFP4_MOE = 38  # llama.cpp's LLAMA_FTYPE_MOSTLY_MXFP4_MOE


def write_gpt_oss(
    source: Path,
    unfinished: Path,
    destination: Path,
    layout: Layout,
    pack: Packer | None,
    progress: Progress | None,
    max_shard_bytes: int,
) -> None:
    """Write the GPT-OSS checkpoint `source` to `unfinished`, which is to become `destination`.

    For the arguments and errors see `jax_mxfp4.convert.convert`.
    """
    config = read_config(source)
    specs = parameter_specs(config)
    reader = stored = open_checkpoint(source, strict=False)
    files = _files(stored, config)
    if has_unpacked_experts(stored, specs):
        reader = PackingReader(stored, specs, pack or round_to_nearest())
        files["config.json"] = _declare_packed(files["config.json"], config)
    elif pack is not None:
        raise CheckpointError(source, "the experts are packed already, nothing is left to pack")
    if layout == "gguf":
        write_gguf(unfinished, reader, specs, _metadata(config, source.name, files), progress)
        return
    if layout == "openai":
        files["config.json"] = _dump(openai_json(config))
        files.pop("generation_config.json", None)
    unfinished.mkdir()
    for name, content in files.items():
        (unfinished / name).write_bytes(content)
    _require_same(config, unfinished, destination, layout)
    write_folder(unfinished, reader, specs, layout, progress, max_shard_bytes)


def _files(reader: GgufFile | SafetensorsFolder, config: GptOssConfig) -> dict[str, bytes]:
    """Return the files that belong beside the weights in Hugging Face's layout."""
    files = {"config.json": _dump(hugging_face_json(config))}
    if isinstance(reader, GgufFile):
        for name, key in _CARRIED.items():
            if isinstance(text := reader.metadata.get(key), str):
                files[name] = text.encode()
        return files if "tokenizer.json" in files else tokenizer_files(reader) | files
    names = _TOKENIZER_FILES
    if detect_layout(reader) == "huggingface":
        names = ("config.json", "generation_config.json", *names)
    return files | {
        name: read_small_file(reader.path / name, MAX_TOKENIZER_BYTES)
        for name in names
        if os.path.lexists(reader.path / name)
    }


def _declare_packed(text: bytes, config: GptOssConfig) -> bytes:
    """Return config.json with what says that the experts are packed."""
    key = "quantization_config"
    return _dump({**json.loads(text), key: hugging_face_json(config)[key]})


def _metadata(config: GptOssConfig, name: str, files: dict[str, bytes]) -> dict[str, Any]:
    metadata = {
        "general.name": name,
        "general.file_type": _MOSTLY_MXFP4_MOE,
        **gguf_metadata(config),
        **ggml_vocabulary(config, files),
    }
    for file, content in files.items():
        try:
            metadata[_CARRIED[file]] = content.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(file, f"expected UTF-8: {error}") from error
    return metadata


def _require_same(config: GptOssConfig, written: Path, destination: Path, layout: Layout) -> None:
    """Refuse a layout that cannot express `config`, of which it made what `written` holds."""
    found = read_config(written)
    problems = [
        f"{field.name}: the layout {layout!r} cannot express {wanted!r}, but only {got!r}"
        for field in dataclasses.fields(config)
        if not _same(wanted := getattr(config, field.name), got := getattr(found, field.name))
        # OpenAI's files never name the ids that end a generation.
        and (layout, field.name) != ("openai", "eos_token_ids")
    ]
    if problems:
        raise CheckpointError(destination, problems)


def _same(wanted: object, found: object) -> bool:
    """Whether two values of a configuration are equal as far as a GGUF file can say."""
    if isinstance(wanted, float) and isinstance(found, float):
        return bool(np.float32(wanted) == np.float32(found))
    if isinstance(wanted, YarnScaling) and isinstance(found, YarnScaling):
        return all(_same(value, getattr(found, name)) for name, value in vars(wanted).items())
    return wanted == found


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
