"""The parameters of a checkpoint of any model."""

from pathlib import Path

from jax_mxfp4.checkpoints import (
    GptOssParameters,
    Parameters,
    Reader,
    UnpackedParameters,
    WeightsFolder,
    has_unpacked_experts,
    is_gguf,
    read_json_object,
    require_folder,
)
from jax_mxfp4.models.gpt_oss.config_json import read_config
from jax_mxfp4.models.gpt_oss.params import parameter_specs


def open_parameters(path: str | Path, reader: Reader) -> Parameters:
    """Return the parameters of the checkpoint `path`.

    Of GPT-OSS those that its configuration asks for, by canonical name, with experts packed or not;
    of another model in Hugging Face's layout every weight by its name.

    If `reader` was not opened strictly, its `problems` are reported with what is wrong with
    GPT-OSS; of another model they are left in those of the `WeightsFolder`.

    Args:
      path: a folder, or a file `*.gguf` of GPT-OSS.
      reader: the same, open.

    Raises:
      CheckpointError: the configuration is damaged; of GPT-OSS, tensors are missing, unexpected,
        misshapen, of a wrong type or there twice; of others, those of packed weights do not fit
        together.
    """
    if not is_gpt_oss(path):
        return WeightsFolder(path, strict=False)
    specs = parameter_specs(read_config(path))
    if has_unpacked_experts(reader, specs):
        return UnpackedParameters(reader, specs)
    return GptOssParameters(reader, specs)


def is_gpt_oss(path: str | Path) -> bool:
    """Whether `path` is to be read as GPT-OSS, which every GGUF file and OpenAI's folders are.

    Raises:
      CheckpointError: the configuration cannot be read.
    """
    if is_gguf(path):
        return True
    require_folder(Path(path))
    config = read_json_object(Path(path) / "config.json")
    return config.get("model_type", "gpt_oss") == "gpt_oss"
