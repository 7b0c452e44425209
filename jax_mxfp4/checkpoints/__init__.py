"""Checkpoint files: readers, and the table of GPT-OSS tensor names.

Nothing here needs a GPU or knows the model. A reader lists stored tensors and reads one at a time;
`gpt_oss_layout` says which of them make up each parameter; `read_parameters` joins the two. For
other models `WeightsFolder` gives the weights of a Hugging Face folder by their names.
`place_parameters` puts them on devices as they are read, and `dequantized_chunks` gives the values
of any checkpoint without ever holding a whole tensor of them.
"""

from jax_mxfp4.checkpoints.dequantizing import Chunk, dequantized_chunks
from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.gguf_file import GgufFile
from jax_mxfp4.checkpoints.gpt_oss_layout import Layout, ParameterSpec, detect_layout
from jax_mxfp4.checkpoints.gpt_oss_loader import GptOssParameters, Progress, read_parameters
from jax_mxfp4.checkpoints.opening import is_gguf, open_checkpoint
from jax_mxfp4.checkpoints.packing_reader import Packer, PackingReader, has_unpacked_experts
from jax_mxfp4.checkpoints.placement import Parameters, Placement, place_parameters
from jax_mxfp4.checkpoints.reader import (
    FileReader,
    Reader,
    TensorInfo,
    parse_json_object,
    read_json_object,
    require_folder,
)
from jax_mxfp4.checkpoints.safetensors_folder import SafetensorsFolder
from jax_mxfp4.checkpoints.unpacked_parameters import UnpackedParameters
from jax_mxfp4.checkpoints.weights_folder import WeightsFolder

__all__ = [
    "CheckpointError",
    "Chunk",
    "FileReader",
    "GgufFile",
    "GptOssParameters",
    "Layout",
    "Packer",
    "PackingReader",
    "ParameterSpec",
    "Parameters",
    "Placement",
    "Progress",
    "Reader",
    "SafetensorsFolder",
    "TensorInfo",
    "UnpackedParameters",
    "WeightsFolder",
    "dequantized_chunks",
    "detect_layout",
    "has_unpacked_experts",
    "is_gguf",
    "open_checkpoint",
    "parse_json_object",
    "place_parameters",
    "read_json_object",
    "read_parameters",
    "require_folder",
]
