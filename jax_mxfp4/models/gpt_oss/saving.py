"""Writing a model's parameters as a checkpoint."""

import json
from pathlib import Path

import jax
import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.block_layouts import canonical
from jax_mxfp4.checkpoints.atomic import atomic_output
from jax_mxfp4.checkpoints.gpt_oss_layout import plan
from jax_mxfp4.checkpoints.safetensors_writer import NewTensor, SafetensorsWriter
from jax_mxfp4.models.gpt_oss.config import GptOssConfig
from jax_mxfp4.models.gpt_oss.config_writing import hugging_face_json
from jax_mxfp4.models.gpt_oss.params import (
    Params,
    abstract_params,
    named_parameters,
    parameter_specs,
)

_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8"}


def save_params(
    path: str | Path, params: Params, config: GptOssConfig, tokenizer: str | None = None
) -> None:
    """Write `params` to the folder `path` in Hugging Face's layout, bit for bit.

    What `load_params` reads from it is equal to `params`; files are canonical, whatever the layout
    of packed arrays. The folder appears when it is complete.

    Args:
      path: what to create; it must not exist.
      params: packed experts; everything else bfloat16 as in released models, float16 or float32.
      config: its hyperparameters.
      tokenizer: content of tokenizer.json, which text needs; None writes none.

    Raises:
      CheckpointError: `path` exists, or the folder it is to lie in does not.
      ValueError: a parameter is missing, or has another shape or dtype than it should have.
    """
    _check(params, config)
    specs, leaves = parameter_specs(config), named_parameters(params, config)
    arrays: dict[str, np.ndarray] = {}
    for name, source in plan("huggingface", specs).items():
        leaf = canonical(leaves[name])
        parts = (leaf.blocks, leaf.scales) if isinstance(leaf, MXFP4Array) else (leaf,)
        for tensor, part in zip(source.tensors, parts, strict=True):
            if part.dtype.name not in _STORED:
                raise ValueError(f"{name}: expected a float of 16 or 32 bits, found {part.dtype}")
            arrays[tensor.name] = np.asarray(part)
    tensors = {name: NewTensor(_STORED[a.dtype.name], a.shape) for name, a in arrays.items()}
    with atomic_output(Path(path)) as folder:
        folder.mkdir()
        text = json.dumps(hugging_face_json(config), indent=2) + "\n"
        (folder / "config.json").write_text(text)
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer)
        with SafetensorsWriter(folder, tensors) as writer:
            for name, array in arrays.items():
                writer.write(name, array)


def _check(params: Params, config: GptOssConfig) -> None:
    """Compare the shapes of `params`, and what is packed, with what `config` asks for."""
    wanted, found = _shapes(abstract_params(config)), _shapes(params)
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise ValueError(f"{name}: expected {wanted.get(name)}, found {found.get(name)}")


def _shapes(params: Params) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, MXFP4Array)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{'packed' if isinstance(leaf, MXFP4Array) else 'dense'} {list(leaf.shape)}"
        )
        for path, leaf in leaves
    }
