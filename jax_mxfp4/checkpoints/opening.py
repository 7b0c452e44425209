"""Which reader a path needs."""

from pathlib import Path

from jax_mxfp4.checkpoints.gguf_file import GgufFile
from jax_mxfp4.checkpoints.safetensors_folder import SafetensorsFolder


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is to be read as a GGUF file: by its name, and no folder."""
    path = Path(path)
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def open_checkpoint(path: str | Path) -> GgufFile | SafetensorsFolder:
    """Open a GGUF file (by its suffix) or a folder of safetensors files.

    Raises:
      CheckpointError: `path` is neither, or what it holds is damaged.
    """
    return GgufFile(path) if is_gguf(path) else SafetensorsFolder(path)
