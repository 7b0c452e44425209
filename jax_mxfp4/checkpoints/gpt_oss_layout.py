"""Where each GPT-OSS parameter lives in the published checkpoint layouts.

Parameters have one canonical name each (`layers.3.mlp.gate_up`) and one canonical form: dense
matrices are [out, in], packed ones `MXFP4Array` [..., K]. A layout says which stored tensors hold
them. Three rules cover the layouts:

* a name with `{part}` stands for a pair of tensors, one with part `blocks`, one with `scales`;
* a name with `{half}` stands for two tensors, `gate` and `up`, whose rows alternate in the
  parameter (axis 1, after the experts);
* parameters of one layer that share a stored name are its rows, one after the other, in the order
  of the table (OpenAI's fused `qkv`).

Names from openai/gpt-oss `gpt_oss/torch/weights.py`, the released Hugging Face files, and the
`gguf` package's tables for the architecture `gpt-oss`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.reader import Reader, TensorInfo
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE

Layout = Literal["huggingface", "openai", "gguf"]

_COLUMNS: tuple[Layout, ...] = ("huggingface", "openai", "gguf")
_PREFIXES = (
    ("model.", "lm_head."),
    ("block.", "embedding.", "unembedding."),
    ("blk.", "token_embd.", "output."),
)
# Canonical name: Hugging Face, OpenAI, GGUF. Names of a layer go without their prefix.
_LAYER_PREFIXES = ("model.layers.{layer}.", "block.{layer}.", "blk.{layer}.")
_IN_LAYER: dict[str, tuple[str, str, str]] = {
    "attention.norm": ("input_layernorm.weight", "attn.norm.scale", "attn_norm.weight"),
    "attention.q.weight": ("self_attn.q_proj.weight", "attn.qkv.weight", "attn_q.weight"),
    "attention.k.weight": ("self_attn.k_proj.weight", "attn.qkv.weight", "attn_k.weight"),
    "attention.v.weight": ("self_attn.v_proj.weight", "attn.qkv.weight", "attn_v.weight"),
    "attention.q.bias": ("self_attn.q_proj.bias", "attn.qkv.bias", "attn_q.bias"),
    "attention.k.bias": ("self_attn.k_proj.bias", "attn.qkv.bias", "attn_k.bias"),
    "attention.v.bias": ("self_attn.v_proj.bias", "attn.qkv.bias", "attn_v.bias"),
    "attention.out.weight": ("self_attn.o_proj.weight", "attn.out.weight", "attn_output.weight"),
    "attention.out.bias": ("self_attn.o_proj.bias", "attn.out.bias", "attn_output.bias"),
    "attention.sinks": ("self_attn.sinks", "attn.sinks", "attn_sinks.weight"),
    "mlp.norm": ("post_attention_layernorm.weight", "mlp.norm.scale", "post_attention_norm.weight"),
    "mlp.router.weight": ("mlp.router.weight", "mlp.gate.weight", "ffn_gate_inp.weight"),
    "mlp.router.bias": ("mlp.router.bias", "mlp.gate.bias", "ffn_gate_inp.bias"),
    "mlp.gate_up": (
        "mlp.experts.gate_up_proj_{part}",
        "mlp.mlp1_weight.{part}",
        "ffn_{half}_exps.weight",
    ),
    "mlp.gate_up_bias": ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias", "ffn_{half}_exps.bias"),
    "mlp.down": ("mlp.experts.down_proj_{part}", "mlp.mlp2_weight.{part}", "ffn_down_exps.weight"),
    "mlp.down_bias": ("mlp.experts.down_proj_bias", "mlp.mlp2_bias", "ffn_down_exps.bias"),
}
_TABLE: dict[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens.weight", "embedding.weight", "token_embd.weight"),
    **{
        f"layers.{{layer}}.{name}": tuple(map(str.__add__, _LAYER_PREFIXES, stored))
        for name, stored in _IN_LAYER.items()
    },
    "norm": ("model.norm.weight", "norm.scale", "output_norm.weight"),
    "unembedding": ("lm_head.weight", "unembedding.weight", "output.weight"),
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

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape with blocks as the unit of a packed last axis: what parts are parts of."""
        return (*self.shape[:-1], self.shape[-1] // BLOCK_SIZE) if self.packed else self.shape


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
      tensors: one tensor; or blocks and scales; or two whose rows alternate.
      rows: the part of the first axis that is this parameter; None for all of it.
    """

    tensors: tuple[StoredTensor, ...]
    rows: slice | None = None


def detect_layout(reader: Reader) -> Layout:
    """Return the layout whose names the tensors of `reader` use.

    Raises:
      CheckpointError: the names are of no known layout, or of several.
    """
    found: list[Layout] = [
        layout
        for layout, prefixes in zip(_COLUMNS, _PREFIXES, strict=True)
        if any(name.startswith(prefixes) for name in reader.tensors)
    ]
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        reader.path,
        "expected the tensor names of a GPT-OSS checkpoint, Hugging Face's (model.layers.0...), "
        "OpenAI's (block.0...) or those of a GGUF file (blk.0...), found "
        + (" and ".join(found) if found else f"none of them ({_some_names(reader)})"),
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
        shape = (total, *spec.shape[1:])
        store = _gguf_tensors if layout == "gguf" else _safetensors
        tensors = store(stored, shape, spec.packed)
        rows = None if total == spec.shape[0] else slice(start, next_row[stored])
        sources[name] = Source(tensors, rows)
    return {name: sources[name] for name in specs}


def check(reader: Reader, sources: Mapping[str, Source]) -> None:
    """Compare the tensors of `reader` with those that `sources` ask for.

    Raises:
      CheckpointError: lists every missing, unexpected, misshapen or wrongly typed tensor, and the
        `problems` of `reader`, such as tensors that are there twice.
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
    problems += reader.problems
    if problems:
        raise CheckpointError(reader.path, problems)


def _table_position(name: str) -> int:
    return list(_TABLE).index(_LAYER.sub("{layer}", name))


def _stored_name(name: str, column: int) -> str:
    template = _TABLE[_LAYER.sub("{layer}", name)][column]
    layer = _LAYER.search(name)
    return template.replace("{layer}", layer.group()) if layer else template


def _safetensors(name: str, shape: tuple[int, ...], packed: bool) -> tuple[StoredTensor, ...]:
    if not packed:
        return (StoredTensor(name, shape, _DENSE_DTYPES),)
    scales = (*shape[:-1], shape[-1] // BLOCK_SIZE)
    return (
        StoredTensor(name.format(part="blocks"), (*scales, BLOCK_BYTES), ("U8",)),
        StoredTensor(name.format(part="scales"), scales, ("U8",)),
    )


def _gguf_tensors(name: str, shape: tuple[int, ...], packed: bool) -> tuple[StoredTensor, ...]:
    dtypes = _DENSE_DTYPES
    if packed or len(shape) > 1:
        dtypes = ("MXFP4",) if packed else (*_DENSE_DTYPES, "Q8_0")
    if "{half}" not in name:
        return (StoredTensor(name, shape, dtypes),)
    half = tuple(size // 2 if axis == 1 else size for axis, size in enumerate(shape))
    return tuple(StoredTensor(name.format(half=part), half, dtypes) for part in ("gate", "up"))


def _describe(info: TensorInfo) -> str:
    return f"{info.file.name}: tensor {info.name!r}"


def _found(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _some_names(reader: Reader) -> str:
    names = sorted(reader.tensors)
    return ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
