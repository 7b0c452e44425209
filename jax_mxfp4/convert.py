"""Converting GPT-OSS checkpoints between layouts, without decoding what is packed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jax_mxfp4.checkpoints import (
    CheckpointError,
    GgufFile,
    Layout,
    Progress,
    SafetensorsFolder,
    detect_layout,
    open_checkpoint,
)
from jax_mxfp4.checkpoints.atomic import atomic_output, require_free
from jax_mxfp4.checkpoints.folder_writer import write_folder
from jax_mxfp4.checkpoints.gguf_writer import write_gguf
from jax_mxfp4.checkpoints.safetensors_writer import MAX_SHARD_BYTES
from jax_mxfp4.models.gpt_oss.config import GptOssConfig
from jax_mxfp4.models.gpt_oss.config_gguf import CARRIED_CONFIG, CARRIED_GENERATION_CONFIG
from jax_mxfp4.models.gpt_oss.config_json import read_config
from jax_mxfp4.models.gpt_oss.config_writing import (
    gguf_metadata,
    hugging_face_json,
    openai_json,
)
from jax_mxfp4.models.gpt_oss.params import parameter_specs
from jax_mxfp4.models.gpt_oss.tokenizer import CARRIED_TOKENIZER

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
}
_MOSTLY_MXFP4_MOE = 38  # llama.cpp's LLAMA_FTYPE_MOSTLY_MXFP4_MOE


def convert(
    source: str | Path,
    destination: str | Path,
    layout: Layout | None = None,
    *,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint `source` to `destination` in another layout, or in the same.

    Packed experts keep every bit, and so does everything else: where GGUF needs float32, the file
    records the element type that a later conversion restores. The tokenizer and the generation
    configuration go along; OpenAI's layout has no place for the latter.

    The result appears under its name when it is complete.

    Args:
      source: a folder, or a file `*.gguf`.
      destination: what to create; it must not exist.
      layout: of the destination; by default "gguf" for a name `*.gguf`, else "huggingface".
      progress: called after each parameter with (name, bytes read so far, bytes of all).
      max_shard_bytes: of one safetensors file in Hugging Face's layout.

    Raises:
      CheckpointError: `source` is damaged, `destination` exists, or the layout cannot express the
        configuration.
    """
    source, destination = Path(source), Path(destination)
    if layout is None:
        layout = "gguf" if destination.suffix.lower() == ".gguf" else "huggingface"
    if (layout == "gguf") != (destination.suffix.lower() == ".gguf"):
        raise CheckpointError(
            destination, f"expected a name that fits the layout {layout!r}: only GGUF is *.gguf"
        )
    require_free(destination)
    config = read_config(source)
    reader = open_checkpoint(source)
    specs = parameter_specs(config)
    files = _files(reader, config)
    with atomic_output(destination) as unfinished:
        if layout == "gguf":
            write_gguf(unfinished, reader, specs, _metadata(config, source.name, files), progress)
        else:
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
        return files
    names = _TOKENIZER_FILES
    if detect_layout(reader) == "huggingface":
        names = ("config.json", "generation_config.json", *names)
    return files | {
        name: (reader.path / name).read_bytes() for name in names if (reader.path / name).is_file()
    }


def _metadata(config: GptOssConfig, name: str, files: dict[str, bytes]) -> dict[str, Any]:
    # llama.cpp loads a file without a vocabulary only if it is told that there is none.
    metadata = {
        "general.name": name,
        "general.file_type": _MOSTLY_MXFP4_MOE,
        "tokenizer.ggml.model": "none",
        **gguf_metadata(config),
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
        if (wanted := getattr(config, field.name)) != (got := getattr(found, field.name))
        # OpenAI's files never name the ids that end a generation.
        and (layout, field.name) != ("openai", "eos_token_ids")
    ]
    if problems:
        raise CheckpointError(destination, problems)


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
