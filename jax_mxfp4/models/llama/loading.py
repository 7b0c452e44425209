"""Filling a `Llama` from a GGUF file or from a folder in Hugging Face's layout."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from jax.typing import DTypeLike

from flax_layers import MXFP4Dense
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import CheckpointError, GgufFile, WeightsFolder
from jax_mxfp4.models.llama.config import LlamaConfig
from jax_mxfp4.models.llama.config_files import config_from_folder, config_from_gguf
from jax_mxfp4.models.llama.modeling import Llama
from jax_mxfp4.models.llama.names import Layout, output_name, stored_names

Model = TypeVar("Model", bound=Llama)
Read = Callable[[str], np.ndarray | MXFP4Array]


def load_gguf(cls: type[Model], path: Path, dtype: DTypeLike) -> Model:
    """Returns the model in the GGUF file `path`; see `Llama.from_gguf`."""
    file = GgufFile(path, strict=False)
    tied = output_name("gguf") not in file.tensors
    config = config_from_gguf(path, file.metadata, tie_embeddings=tied)

    def read(name: str) -> np.ndarray:
        array = _decoded(file, name)
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            array = _unpermuted(array, config.head_dim)
        return array

    shapes = {name: info.shape for name, info in file.tensors.items()}
    return _filled(cls, config, path, "gguf", shapes, file.problems, read, dtype)


def load_folder(cls: type[Model], path: Path, dtype: DTypeLike) -> Model:
    """Returns the model in the folder `path`; see `Llama.from_pretrained`."""
    folder = WeightsFolder(path, strict=False)
    config = config_from_folder(path, folder.config)
    shapes = {name: spec.shape for name, spec in folder.specs.items()}
    if config.tie_embeddings:
        shapes.pop(output_name("huggingface"), None)  # the embedding once more
    return _filled(cls, config, path, "huggingface", shapes, folder.problems, folder.read, dtype)


def _filled(
    cls: type[Model],
    config: LlamaConfig,
    path: Path,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    problems: Sequence[str],
    read: Read,
    dtype: DTypeLike,
) -> Model:
    """Returns a model whose parameters are what `read` gives for the names of `shapes`.

    Raises:
      CheckpointError: lists `problems`, and every missing, misshapen or unexpected tensor.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, found {dtype}")
    model = nnx.eval_shape(lambda: cls(config, dtype=dtype, rngs=nnx.Rngs(0)))
    names = stored_names(config, layout)
    _check(path, model, names, shapes, problems)
    for our_path, name in names.items():
        module_path, _, attribute = our_path.rpartition(".")
        module = _at(model, module_path)
        array = read(name)
        if isinstance(array, MXFP4Array):
            if not isinstance(module, nnx.Linear):
                raise CheckpointError(path, f"{name!r}: only linear layers can be packed")
            weight = jax.tree.map(jnp.asarray, array)
            parent_path, _, linear_name = module_path.rpartition(".")
            dense = MXFP4Dense.from_packed(weight, dtype=module.dtype)
            setattr(_at(model, parent_path), linear_name, dense)
            continue
        array = np.ascontiguousarray(array.T if attribute == "kernel" else array)
        getattr(module, attribute).set_value(jax.device_put(array.astype(jnp.dtype(dtype))))
    return model


def _check(
    path: Path,
    model: Llama,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    known: Sequence[str],
) -> None:
    expected = set(names.values())
    problems = [f"tensor {name!r}: not expected" for name in shapes if name not in expected]
    for our_path, name in names.items():
        shape = _at(model, our_path).shape
        shape = shape[::-1] if our_path.endswith(".kernel") else shape
        if name not in shapes:
            problems.append(f"tensor {name!r}: missing")
        elif shapes[name] != shape:
            found = list(shapes[name])
            problems.append(f"tensor {name!r}: expected shape {list(shape)}, found {found}")
    problems += known
    if problems:
        raise CheckpointError(path, problems)


def _at(model: Llama, path: str) -> Any:
    """Returns what the attributes and indices of a dotted path lead to."""
    node: Any = model
    for part in filter(None, path.split(".")):
        node = node[int(part)] if part.isdecimal() else getattr(node, part)
    return node


def _decoded(file: GgufFile, name: str) -> np.ndarray:
    """Returns a tensor in a floating-point dtype, in its logical shape."""
    info = file.tensors[name]
    stored = file.read(name)
    if stored.dtype != np.uint8:
        return stored
    try:
        decoded = dequantize(stored, GGMLQuantizationType[info.dtype])
    except NotImplementedError as error:
        raise CheckpointError(
            file.path, f"tensor {name!r}: element type {info.dtype} cannot be decoded"
        ) from error
    return decoded.reshape(info.shape)


def _unpermuted(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns the rows of a query or key projection in the order of two halves per head.

    llama.cpp rotates neighbouring dimensions 2i and 2i + 1 of a head, and its files hold the rows
    in that order (`LlamaModel.permute` in its convert_hf_to_gguf.py); here, as in transformers,
    dimensions i and i + head_dim / 2 are rotated.
    """
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
