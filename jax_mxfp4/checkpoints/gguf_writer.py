"""Writing a GGUF file of the architecture `gpt-oss`, one parameter at a time."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, GGUFWriter

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.gguf_blocks import MXFP4_BYTES, pack_mxfp4
from jax_mxfp4.checkpoints.gpt_oss_layout import ParameterSpec, StoredTensor, plan
from jax_mxfp4.checkpoints.gpt_oss_loader import Progress, read_parameters
from jax_mxfp4.checkpoints.original_dtypes import ORIGINAL_DTYPES, dense_dtypes, narrow, widen
from jax_mxfp4.checkpoints.reader import Reader

# llama.cpp's kernels take these in other types than float32; everything else must be float32.
_MATRICES = ("embedding", "unembedding", *(f".{name}.weight" for name in ("q", "k", "v", "out")))
_VALUE_TYPES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}


def write_gguf(
    file: Path,
    reader: Reader,
    specs: Mapping[str, ParameterSpec],
    metadata: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write the parameters `specs` of `reader` to `file`.

    Packed parameters are repacked without loss. Norms, biases, sinks and routers become float32,
    as llama.cpp wants them; their element type is recorded in the metadata, so that a later
    conversion restores them bit for bit.

    Args:
      file: the file to create.
      reader: an open checkpoint in any layout.
      specs: see `read_parameters`.
      metadata: keys and values (bool, int below 2**32, float, str or list of these).
      progress: see `read_parameters`.

    Raises:
      CheckpointError: see `read_parameters`.
    """
    originals = dense_dtypes(reader, specs)
    tensors = _tensors(specs, originals)
    writer = GGUFWriter(file, "gpt-oss")
    try:
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, _VALUE_TYPES[type(value)])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_string(ORIGINAL_DTYPES, json.dumps(_narrowed(specs, originals)))
        for tensor, kind in tensors:
            _announce(writer, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, parameter in read_parameters(reader, specs, progress):
            for array in _stored_arrays(reader, name, parameter, originals):
                writer.write_tensor_data(array)
        writer.flush()
        for handle in writer.fout or ():
            os.fsync(handle.fileno())
    finally:
        writer.close()


def _tensors(
    specs: Mapping[str, ParameterSpec], originals: Mapping[str, str]
) -> list[tuple[StoredTensor, GGMLQuantizationType]]:
    """Return every tensor of the file with its type, in the order in which they are written."""
    return [
        (tensor, GGMLQuantizationType[_type_name(name, specs[name], originals)])
        for name, source in plan("gguf", specs).items()
        for tensor in source.tensors
    ]


def _type_name(name: str, spec: ParameterSpec, originals: Mapping[str, str]) -> str:
    if spec.packed:
        return "MXFP4"
    return originals[name] if name.endswith(_MATRICES) else "F32"


def _narrowed(specs: Mapping[str, ParameterSpec], originals: Mapping[str, str]) -> dict[str, str]:
    return {
        name: dtype
        for name, dtype in originals.items()
        if dtype != _type_name(name, specs[name], originals)
    }


def _announce(writer: GGUFWriter, tensor: StoredTensor, kind: GGMLQuantizationType) -> None:
    if kind is GGMLQuantizationType.MXFP4:
        *rows, columns = tensor.shape
        shape, dtype = (*rows, columns // 32 * MXFP4_BYTES), np.dtype(np.uint8)
    else:
        types = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
        shape, dtype = tensor.shape, np.dtype(types[kind.name])
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    writer.add_tensor_info(tensor.name, shape, dtype, nbytes, raw_dtype=kind)


def _stored_arrays(
    reader: Reader,
    name: str,
    parameter: np.ndarray | MXFP4Array,
    originals: Mapping[str, str],
) -> Iterator[np.ndarray]:
    """Yield the parameter in the form of the file: gate and up one after the other."""
    halves = (slice(0, None, 2), slice(1, None, 2)) if ".gate_up" in name else (slice(None),)
    for half in halves:
        # Axis 1 holds the rows that alternate; other parameters may not have it.
        where = (slice(None), half) if len(halves) == 2 else ()
        if isinstance(parameter, MXFP4Array):
            yield pack_mxfp4(parameter.blocks[where], parameter.scales[where])
        else:
            values = narrow(parameter[where], originals[name], reader, name)
            stored = values if name.endswith(_MATRICES) else widen(values)
            yield np.ascontiguousarray(stored)
