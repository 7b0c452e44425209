"""Writes the tiny GPT-OSS model with experts in wider types, in every layout."""

import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from safetensors.numpy import load_file, save_file

from jax_mxfp4.format import decode

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"


def write_unpacked(path: Path, layout: str, dtype: DTypeLike = ml_dtypes.bfloat16) -> Path:
    """Write `path`, a folder (experts in `dtype`) or a GGUF file (everything in float32)."""
    if layout == "gguf":
        _write_gguf(path)
        return path
    source, joint = (GOLDEN / "hf", "_") if layout == "huggingface" else (GOLDEN / "original", ".")
    stored = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(f"{joint}blocks"):
            stem = name.removesuffix(f"{joint}blocks")
            experts = decode(tensor, stored[f"{stem}{joint}scales"], dtype)
            # transformers multiplies activations from the left: [E, K, N].
            axes = (0, 2, 1) if layout == "huggingface" else (0, 1, 2)
            tensors[stem] = np.ascontiguousarray(np.asarray(experts).transpose(axes))
        elif not name.endswith(f"{joint}scales"):
            tensors[name] = tensor
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    (path / "config.json").write_text(json.dumps(config))
    return path


def _write_gguf(path: Path) -> None:
    reader = gguf.GGUFReader(GOLDEN / "tiny-mxfp4.gguf")
    writer = gguf.GGUFWriter(path, "gpt-oss")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
