"""Writing the parameters of a GPT-OSS model in Hugging Face's or OpenAI's layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.gpt_oss_layout import ParameterSpec, Source, plan
from jax_mxfp4.checkpoints.gpt_oss_loader import Progress, read_parameters
from jax_mxfp4.checkpoints.original_dtypes import dense_dtypes, narrow
from jax_mxfp4.checkpoints.reader import Reader
from jax_mxfp4.checkpoints.safetensors_writer import (
    MAX_SHARD_BYTES,
    NewTensor,
    SafetensorsWriter,
)


def write_folder(
    folder: Path,
    reader: Reader,
    specs: Mapping[str, ParameterSpec],
    layout: Literal["huggingface", "openai"],
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the parameters `specs` of `reader` to safetensors files in `folder`.

    Packed parameters keep their bytes, the others their element type: that before widening, where
    `reader` is a GGUF file that records it; float32 for Q8_0.

    Args:
      folder: an existing folder.
      reader: an open checkpoint in any layout.
      specs: see `read_parameters`.
      layout: whose names to use.
      progress: see `read_parameters`.
      max_shard_bytes: of one file; OpenAI's layout always has one.

    Raises:
      CheckpointError: see `read_parameters`; or parameters that share a tensor of the layout
        differ in their element types.
    """
    dtypes = dense_dtypes(reader, specs)
    sources = plan(layout, specs)
    tensors = _new_tensors(reader, sources, dtypes)
    limit = max_shard_bytes if layout == "huggingface" else sum(t.nbytes for t in tensors.values())
    with SafetensorsWriter(folder, tensors, limit) as writer:
        for name, parameter in read_parameters(reader, specs, progress):
            source = sources[name]
            first_row = source.rows.start if source.rows else 0
            if isinstance(parameter, MXFP4Array):
                arrays = [parameter.blocks, parameter.scales]
            else:
                arrays = [narrow(np.asarray(parameter), dtypes[name], reader, name)]
            for tensor, array in zip(source.tensors, arrays, strict=True):
                writer.write(tensor.name, array, first_row)


def _new_tensors(
    reader: Reader, sources: Mapping[str, Source], dtypes: Mapping[str, str]
) -> dict[str, NewTensor]:
    tensors: dict[str, NewTensor] = {}
    problems = []
    for name, source in sources.items():
        for stored in source.tensors:
            new = NewTensor(dtypes.get(name, "U8"), stored.shape)
            if tensors.setdefault(stored.name, new) != new:
                problems.append(
                    f"tensor {stored.name!r}: expected one element type in all its parts, found "
                    f"{tensors[stored.name].dtype} and, in {name!r}, {new.dtype}"
                )
    if problems:
        raise CheckpointError(reader.path, problems)
    return tensors
