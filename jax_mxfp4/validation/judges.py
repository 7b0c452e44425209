"""Loading the models that judge: a checkpoint, its tokenizer, and what it had packed already."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jax.typing import DTypeLike

from jax_mxfp4.checkpoints import GgufFile, is_gguf
from jax_mxfp4.models.gpt_oss import GptOss, load_tokenizer
from jax_mxfp4.models.gpt_oss.builtin import find_model
from jax_mxfp4.models.gpt_oss.params import parameter_specs
from jax_mxfp4.validation.gpt_oss_dense import DenseGptOss, has_dense_experts
from jax_mxfp4.validation.models import LanguageModel

Implementation = Literal["cuda", "reference", "dense"]


@dataclass(frozen=True)
class Judge:
    """A model and what belongs to it.

    Attributes:
      name: the checkpoint, for people: a folder as it was given, the name of a file, or the
        built-in model that it is.
      model: the model.
      encode: text -> token ids, without special tokens.
      stored_packed: names of dense matrices that the checkpoint stores as MXFP4. Storing them as
        MXFP4 once more changes nothing, which would flatter that format.
    """

    name: str
    model: LanguageModel
    encode: Callable[[str], list[int]]
    stored_packed: tuple[str, ...]


def load_judge(path: Path | None, dtype: DTypeLike, implementation: Implementation | None) -> Judge:
    """Load a checkpoint with its tokenizer.

    Args:
      path: a GPT-OSS checkpoint whose experts are packed, or dense in Hugging Face's layout; a
        GGUF file of a Llama model; or the name of a built-in model. None for the default one.
      dtype: float32, bfloat16 or float16, of everything that is not packed.
      implementation: "dense" for a model without packed weights; "cuda", "reference" or None (by
        platform) for one that computes with the packed ones.

    Raises:
      CheckpointError: the checkpoint or its tokenizer cannot be read.
      ValueError: it has no packed weights and `implementation` is not "dense".
    """
    source, name = find_model(path)
    if source.is_file():
        name = source.name
    if (
        is_gguf(source)
        and GgufFile(source, strict=False).metadata.get("general.architecture") == "llama"
    ):
        return _load_llama(name, source, dtype, implementation)
    tokenizer = load_tokenizer(source)
    packed: tuple[str, ...] = ()
    model: LanguageModel
    if implementation == "dense":
        model = DenseGptOss.from_pretrained(source, dtype)
        if not has_dense_experts(source):
            packed = tuple(n for n, spec in parameter_specs(model.config).items() if spec.packed)
    else:
        model = GptOss.from_pretrained(source, dtype, implementation)
    return Judge(name, model, _encoder(tokenizer), packed)


def _load_llama(
    name: str, path: Path, dtype: DTypeLike, implementation: Implementation | None
) -> Judge:
    from jax_mxfp4.models.llama import Llama, load_tokenizer

    if implementation != "dense":
        raise ValueError(f"{path} has no packed weights: expected the implementation 'dense'")
    return Judge(name, Llama.from_gguf(path, dtype), _encoder(load_tokenizer(path)), ())


def _encoder(tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
