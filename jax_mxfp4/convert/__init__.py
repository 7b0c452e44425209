"""Converting checkpoints: from layout to layout, and from wider element types to MXFP4."""

from pathlib import Path

from jax_mxfp4.checkpoints import (
    CheckpointError,
    Layout,
    Packer,
    Progress,
    is_gguf,
    read_json_object,
)
from jax_mxfp4.checkpoints.atomic import atomic_output, require_free
from jax_mxfp4.checkpoints.safetensors_writer import MAX_SHARD_BYTES
from jax_mxfp4.convert.gpt_oss import write_gpt_oss
from jax_mxfp4.convert.modules import DEFAULT_PATTERN, pack_modules
from jax_mxfp4.convert.packing import round_to_nearest

__all__ = ["DEFAULT_PATTERN", "convert", "round_to_nearest"]


def convert(
    source: str | Path,
    destination: str | Path,
    layout: Layout | None = None,
    *,
    pattern: str | None = None,
    pack: Packer | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint `source` to `destination`, packed as MXFP4.

    GPT-OSS is written in any of its layouts. Packed experts keep every bit, and so does everything
    else: where GGUF needs float32, the file records the element type that a later conversion
    restores. Experts in bfloat16, float16 or float32 are packed. The tokenizer and the generation
    configuration go along; OpenAI's layout has no place for the latter.

    Of other models, folders in Hugging Face's layout, the weights of linear layers are packed in
    the layout of compressed-tensors, which vLLM and transformers read; see
    `jax_mxfp4.convert.modules`. All else is copied.

    One tensor is in memory at a time. The result appears under its name when it is complete.

    Args:
      source: a folder, or a file `*.gguf` of GPT-OSS.
      destination: what to create; it must not exist.
      layout: of the destination, by default "gguf" for a name `*.gguf`, else "huggingface"; models
        other than GPT-OSS have the latter only.
      pattern: which modules to pack of a model other than GPT-OSS: a regular expression that
        matches the whole name, such as "model.layers.0.mlp.up_proj"; by default `DEFAULT_PATTERN`.
      pack: (name, float32, bfloat16 or float16 [N, K]) -> `MXFP4Array` [N, K], called for each
        module that is packed, and for each expert under the name of its tensor and its number; by
        default `round_to_nearest()`.
      progress: called after each tensor with (name, bytes read so far, bytes of all).
      max_shard_bytes: of one safetensors file in Hugging Face's layout.

    Raises:
      CheckpointError: `source` is damaged, `destination` exists, or the layout cannot express the
        configuration; `pack` or `pattern` is given where nothing is left to pack; or `pattern`
        matches nothing, or weights (all are listed) that cannot be packed.
      ValueError: `pattern` is no regular expression, or is given for GPT-OSS.
    """
    source, destination = Path(source), Path(destination)
    if layout is None:
        layout = "gguf" if destination.suffix.lower() == ".gguf" else "huggingface"
    if (layout == "gguf") != (destination.suffix.lower() == ".gguf"):
        raise CheckpointError(
            destination, f"expected a name that fits the layout {layout!r}: only GGUF is *.gguf"
        )
    require_free(destination)
    config = {} if is_gguf(source) else read_json_object(source / "config.json")
    model_type = config.get("model_type", "gpt_oss")
    if model_type == "gpt_oss":
        if pattern is not None:
            raise ValueError(
                f'"{pattern}" was given as what to pack, but of GPT-OSS that is always the experts'
            )
        with atomic_output(destination) as unfinished:
            write_gpt_oss(source, unfinished, destination, layout, pack, progress, max_shard_bytes)
        return
    if layout != "huggingface":
        raise CheckpointError(
            destination,
            f"expected the layout 'huggingface' for a model of type {model_type!r}, "
            f"found {layout!r}, which is of GPT-OSS only",
        )
    with atomic_output(destination) as unfinished:
        pack_modules(
            source,
            unfinished,
            config,
            DEFAULT_PATTERN if pattern is None else pattern,
            round_to_nearest() if pack is None else pack,
            progress,
            max_shard_bytes,
        )
