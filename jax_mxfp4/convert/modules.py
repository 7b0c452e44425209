"""Packing the weights of models other than GPT-OSS, such as Llama.

The result has the layout of compressed-tensors, format `mxfp4-pack-quantized`, which vLLM and
transformers read. vLLM fuses q, k and v, and gate and up: it wants all of them packed, or none.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_mxfp4.block_layouts import canonical
from jax_mxfp4.checkpoints import (
    CheckpointError,
    Packer,
    Progress,
    Reader,
    SafetensorsFolder,
    TensorInfo,
)
from jax_mxfp4.checkpoints.compressed_tensors import PACKED, SCALE, quantization_config
from jax_mxfp4.checkpoints.errors import shorten
from jax_mxfp4.checkpoints.safetensors_writer import (
    ITEM_BYTES,
    NewTensor,
    SafetensorsWriter,
)
from jax_mxfp4.format import BLOCK_SIZE

DEFAULT_PATTERN = r".*\.layers\.\d+\..*_proj"
"""The linear layers of Llama and its relatives; not embeddings, norms and lm_head."""

_WEIGHT = ".weight"
_HEAD = "lm_head"
_LAYER = re.compile(r"\.layers\.\d+\.")
_FLOATS = ("BF16", "F16", "F32")
# Bytes of a tensor that are copied at a time.
_CHUNK_BYTES = 2**26
# What lies beside weights: configurations, tokenizers, the model's own code, its card and licence.
_COPIED = re.compile(
    r"(?!.*\.index\.json)[^.].*\.(json|jinja|model|tiktoken|txt|py|md)|LICEN[CS]E.*|NOTICE.*"
)


def pack_modules(
    source: Path,
    destination: Path,
    config: Mapping[str, Any],
    pattern: str,
    pack: Packer,
    progress: Progress | None,
    max_shard_bytes: int,
) -> None:
    """Write the folder `source` to the new folder `destination` with weights packed.

    Args:
      source: a Hugging Face folder of safetensors files.
      destination: the folder to create.
      config: the content of its config.json.
      pattern: regular expression; a module X with X.weight is packed if it matches all of X.
      pack: packs one weight [N, K] of module X, which it is given the name of.
      progress: called after each tensor with (name, bytes read so far, bytes of all).
      max_shard_bytes: of one safetensors file.

    Raises:
      CheckpointError: `source` is damaged or quantized already, `pattern` matches no weight, or
        (all listed at once) it matches what cannot be packed.
    """
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            raise CheckpointError(
                source / "config.json", f"{key!r}: the weights are packed already"
            )
    reader = SafetensorsFolder(source)
    modules = _choose(reader, pattern)
    destination.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and _COPIED.fullmatch(file.name):
            shutil.copyfile(file, destination / file.name)
    quantization = quantization_config(_targets(modules), _ignored(reader, modules))
    text = json.dumps({**config, "quantization_config": quantization}, indent=2)
    (destination / "config.json").write_text(text + "\n")

    total = sum(info.nbytes for info in reader.tensors.values())
    done = 0
    with SafetensorsWriter(destination, _new_tensors(reader, modules), max_shard_bytes) as writer:
        for name, info in reader.tensors.items():
            module = name.removesuffix(_WEIGHT)
            if module in modules:
                packed = canonical(pack(module, reader.read(name)))
                codes = np.asarray(packed.blocks).reshape(info.shape[0], info.shape[1] // 2)
                writer.write(f"{module}.{PACKED}", codes)
                writer.write(f"{module}.{SCALE}", np.asarray(packed.scales))
            else:
                _copy(reader, info, writer)
            if progress is not None:
                done += info.nbytes
                progress(name, done, total)


def _choose(reader: Reader, pattern: str) -> set[str]:
    """Return the modules to pack."""
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(f'"{pattern}" is not a regular expression: {error}') from error
    problems = [
        f"{info.file.name}: tensor {name!r}: cannot be copied, {info.dtype} is not supported"
        for name, info in reader.tensors.items()
        if info.dtype not in ITEM_BYTES
    ]
    modules = set()
    for name, info in reader.tensors.items():
        module = name.removesuffix(_WEIGHT)
        if module == name or not matches(module):
            continue
        modules.add(module)
        columns = info.shape[-1] if len(info.shape) == 2 else 0
        if columns == 0 or columns % BLOCK_SIZE or info.dtype not in _FLOATS:
            problems.append(
                f'{info.file.name}: tensor {name!r}: matches "{pattern}", but cannot be packed: '
                f"expected {' or '.join(_FLOATS)} [N, K] with K a multiple of {BLOCK_SIZE}, "
                f"found {info.dtype} {list(info.shape)}"
            )
    if problems:
        raise CheckpointError(reader.path, problems)
    if not modules:
        names = [name.removesuffix(_WEIGHT) for name in reader.tensors if name.endswith(_WEIGHT)]
        raise CheckpointError(
            reader.path,
            f'"{pattern}" matches the name of no module with a weight, which are '
            + ", ".join(map(shorten, names[:8]))
            + (", ..." if len(names) > 8 else ""),
        )
    return modules


def _targets(modules: set[str]) -> list[str]:
    # Outside of the layers there are embeddings, and readers differ in whether a head is "Linear".
    return ["Linear", *sorted(module for module in modules if not _LAYER.search(module))]


def _ignored(reader: Reader, modules: set[str]) -> list[str]:
    """Return what may be a linear layer by its weight but is not packed, in the order of files."""
    ignored = [
        name.removesuffix(_WEIGHT)
        for name, info in reader.tensors.items()
        if name.endswith(_WEIGHT) and len(info.shape) == 2
    ]
    if f"{_HEAD}{_WEIGHT}" not in reader.tensors:
        ignored.append(_HEAD)  # a linear layer too, which shares the weight of the embedding
    return [module for module in ignored if module not in modules]


def _new_tensors(reader: Reader, modules: set[str]) -> dict[str, NewTensor]:
    tensors = {}
    for name, info in reader.tensors.items():
        module = name.removesuffix(_WEIGHT)
        if module in modules:
            rows, columns = info.shape
            tensors[f"{module}.{PACKED}"] = NewTensor("U8", (rows, columns // 2))
            tensors[f"{module}.{SCALE}"] = NewTensor("U8", (rows, columns // BLOCK_SIZE))
        else:
            tensors[name] = NewTensor(info.dtype, info.shape)
    return tensors


def _copy(reader: Reader, info: TensorInfo, writer: SafetensorsWriter) -> None:
    """Copy a tensor, in parts if it is large."""
    if info.nbytes <= _CHUNK_BYTES:
        writer.write(info.name, reader.read(info.name))
        return
    rows = info.shape[0]
    step = max(1, rows * _CHUNK_BYTES // info.nbytes)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        writer.write(info.name, reader.read(info.name, part), first)
