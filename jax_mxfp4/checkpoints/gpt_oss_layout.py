"""Where each GPT-OSS parameter lives in the published checkpoint layouts.

Parameters have one canonical name each (`layers.3.mlp.gate_up`) and one canonical form: dense
matrices are [out, in], packed ones `MXFP4Array` [..., K]. A layout says which stored tensors hold
them. Two rules cover both safetensors layouts:

* a name with `{part}` stands for a pair of tensors, one with part `blocks`, one with `scales`;
* parameters of one layer that share a stored name are its rows, one after the other, in the order
  of the table (OpenAI's fused `qkv`).

Names from openai/gpt-oss `gpt_oss/torch/weights.py` and the released Hugging Face files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.reader import Reader, TensorInfo
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE

Layout = Literal["huggingface", "openai"]

_COLUMNS: tuple[Layout, ...] = ("huggingface", "openai")
_HF, _OA = "model.layers.{layer}.", "block.{layer}."
_TABLE: dict[str, tuple[str, str]] = {
    "embedding": ("model.embed_tokens.weight", "embedding.weight"),
    "layers.{layer}.attention.norm": (_HF + "input_layernorm.weight", _OA + "attn.norm.scale"),
    "layers.{layer}.attention.q.weight": (_HF + "self_attn.q_proj.weight", _OA + "attn.qkv.weight"),
    "layers.{layer}.attention.k.weight": (_HF + "self_attn.k_proj.weight", _OA + "attn.qkv.weight"),
    "layers.{layer}.attention.v.weight": (_HF + "self_attn.v_proj.weight", _OA + "attn.qkv.weight"),
    "layers.{layer}.attention.q.bias": (_HF + "self_attn.q_proj.bias", _OA + "attn.qkv.bias"),
    "layers.{layer}.attention.k.bias": (_HF + "self_attn.k_proj.bias", _OA + "attn.qkv.bias"),
    "layers.{layer}.attention.v.bias": (_HF + "self_attn.v_proj.bias", _OA + "attn.qkv.bias"),
    "layers.{layer}.attention.out.weight": (
        _HF + "self_attn.o_proj.weight",
        _OA + "attn.out.weight",
    ),
    "layers.{layer}.attention.out.bias": (_HF + "self_attn.o_proj.bias", _OA + "attn.out.bias"),
    "layers.{layer}.attention.sinks": (_HF + "self_attn.sinks", _OA + "attn.sinks"),
    "layers.{layer}.mlp.norm": (_HF + "post_attention_layernorm.weight", _OA + "mlp.norm.scale"),
    "layers.{layer}.mlp.router.weight": (_HF + "mlp.router.weight", _OA + "mlp.gate.weight"),
    "layers.{layer}.mlp.router.bias": (_HF + "mlp.router.bias", _OA + "mlp.gate.bias"),
    "layers.{layer}.mlp.gate_up": (
        _HF + "mlp.experts.gate_up_proj_{part}",
        _OA + "mlp.mlp1_weight.{part}",
    ),
    "layers.{layer}.mlp.gate_up_bias": (
        _HF + "mlp.experts.gate_up_proj_bias",
        _OA + "mlp.mlp1_bias",
    ),
    "layers.{layer}.mlp.down": (
        _HF + "mlp.experts.down_proj_{part}",
        _OA + "mlp.mlp2_weight.{part}",
    ),
    "layers.{layer}.mlp.down_bias": (_HF + "mlp.experts.down_proj_bias", _OA + "mlp.mlp2_bias"),
    "norm": ("model.norm.weight", "norm.scale"),
    "unembedding": ("lm_head.weight", "unembedding.weight"),
}
# The released files are BF16; a checkpoint saved after training may be wider.
_DENSE_DTYPES = ("BF16", "F16", "F32")
_LAYER = re.compile(r"(?<=^layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class ParameterSpec:
    """What the model needs under one canonical name.

    Attributes:
      shape: logical shape; of a packed parameter [..., K] with K elements, not bytes.
      packed: whether it is an `MXFP4Array`.
    """

    shape: tuple[int, ...]
    packed: bool = False


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a layout asks for.

    Attributes:
      name: its name in the checkpoint.
      shape: its stored shape.
      dtypes: the element types that are accepted.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where one parameter is stored.

    Attributes:
      tensors: one dense tensor, or blocks and scales.
      rows: the part of the first axis that is this parameter; None for all of it.
    """

    tensors: tuple[StoredTensor, ...]
    rows: slice | None = None


def detect_layout(reader: Reader) -> Layout:
    """Return the layout whose names the tensors of `reader` use.

    Raises:
      CheckpointError: the names are of no known layout, or of both.
    """
    hugging_face, openai = (
        any(name.startswith(prefixes) for name in reader.tensors)
        for prefixes in (("model.", "lm_head."), ("block.", "embedding.", "unembedding."))
    )
    if hugging_face != openai:
        return "huggingface" if hugging_face else "openai"
    found = "both" if hugging_face else f"neither ({_some_names(reader)})"
    raise CheckpointError(
        reader.path,
        "expected the tensor names of a GPT-OSS checkpoint, Hugging Face's (model.layers.0...) "
        f"or OpenAI's (block.0...), found {found}",
    )


def plan(layout: Layout, specs: Mapping[str, ParameterSpec]) -> dict[str, Source]:
    """Return where `layout` stores each parameter of `specs`."""
    column = _COLUMNS.index(layout)
    stored_names = {name: _stored_name(name, column) for name in specs}
    rows_of: dict[str, int] = {}
    for name, spec in specs.items():
        stored = stored_names[name]
        rows_of[stored] = rows_of.get(stored, 0) + spec.shape[0]
    sources = {}
    next_row: dict[str, int] = {}
    # In the order of the table, because that is the order of rows in a fused tensor.
    for name in sorted(specs, key=_table_position):
        spec, stored = specs[name], stored_names[name]
        total = rows_of[stored]
        start = next_row.get(stored, 0)
        next_row[stored] = start + spec.shape[0]
        tensors = _stored_tensors(stored, (total, *spec.shape[1:]), spec.packed)
        rows = None if total == spec.shape[0] else slice(start, next_row[stored])
        sources[name] = Source(tensors, rows)
    return {name: sources[name] for name in specs}


def check(reader: Reader, sources: Mapping[str, Source]) -> None:
    """Compare the tensors of `reader` with those that `sources` ask for.

    Raises:
      CheckpointError: lists every missing, unexpected, misshapen or wrongly typed tensor.
    """
    wanted = {tensor.name: tensor for source in sources.values() for tensor in source.tensors}
    problems = []
    for name, tensor in wanted.items():
        expected = f"{' or '.join(tensor.dtypes)} {list(tensor.shape)}"
        info = reader.tensors.get(name)
        if info is None:
            problems.append(f"tensor {name!r}: missing, expected {expected}")
        elif info.shape != tensor.shape or info.dtype not in tensor.dtypes:
            problems.append(f"{_describe(info)}: expected {expected}, found {_found(info)}")
    problems += [
        f"{_describe(info)}: unexpected, found {_found(info)}"
        for name, info in reader.tensors.items()
        if name not in wanted
    ]
    if problems:
        raise CheckpointError(reader.path, problems)


def _table_position(name: str) -> int:
    return list(_TABLE).index(_LAYER.sub("{layer}", name))


def _stored_name(name: str, column: int) -> str:
    template = _TABLE[_LAYER.sub("{layer}", name)][column]
    layer = _LAYER.search(name)
    return template.replace("{layer}", layer.group()) if layer else template


def _stored_tensors(name: str, shape: tuple[int, ...], packed: bool) -> tuple[StoredTensor, ...]:
    if not packed:
        return (StoredTensor(name, shape, _DENSE_DTYPES),)
    scales = (*shape[:-1], shape[-1] // BLOCK_SIZE)
    return (
        StoredTensor(name.format(part="blocks"), (*scales, BLOCK_BYTES), ("U8",)),
        StoredTensor(name.format(part="scales"), scales, ("U8",)),
    )


def _describe(info: TensorInfo) -> str:
    return f"{info.file.name}: tensor {info.name!r}"


def _found(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _some_names(reader: Reader) -> str:
    names = sorted(reader.tensors)
    return ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
