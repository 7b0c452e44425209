"""Checkpoint files: readers, and the table of GPT-OSS tensor names.

Nothing here needs a GPU or knows the model. A reader lists stored tensors and reads one at a time;
`gpt_oss_layout` says which of them make up each parameter; `read_parameters` joins the two.
"""

from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.gguf_file import GgufFile
from jax_mxfp4.checkpoints.gpt_oss_layout import Layout, ParameterSpec, detect_layout
from jax_mxfp4.checkpoints.gpt_oss_loader import Progress, read_parameters
from jax_mxfp4.checkpoints.opening import is_gguf, open_checkpoint
from jax_mxfp4.checkpoints.reader import (
    Reader,
    TensorInfo,
    parse_json_object,
    read_json_object,
    require_folder,
)
from jax_mxfp4.checkpoints.safetensors_folder import SafetensorsFolder

__all__ = [
    "CheckpointError",
    "GgufFile",
    "Layout",
    "ParameterSpec",
    "Progress",
    "Reader",
    "SafetensorsFolder",
    "TensorInfo",
    "detect_layout",
    "is_gguf",
    "open_checkpoint",
    "parse_json_object",
    "read_json_object",
    "read_parameters",
    "require_folder",
]
