"""Which reader a path needs."""

from pathlib import Path

from jax_mxfp4.checkpoints.gguf_file import GgufFile
from jax_mxfp4.checkpoints.safetensors_folder import SafetensorsFolder


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is to be read as a GGUF file: by its name, and no folder."""
    path = Path(path)
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def open_checkpoint(path: str | Path, *, strict: bool = True) -> GgufFile | SafetensorsFolder:
    """Open a GGUF file (by its suffix) or a folder of safetensors files.

    Args:
      path: the file or folder.
      strict: whether to refuse tensors that are there twice, or elsewhere than an index says. If
        not, the reader has one of two, and says so in its `problems`: that is for callers who go on
        to compare its tensors with what a model needs, to report everything at once.
        `GptOssParameters` and `PackingReader` do that.

    Raises:
      CheckpointError: `path` is neither, or what it holds is damaged; if `strict`, also
        `problems`.
    """
    reader = GgufFile if is_gguf(path) else SafetensorsFolder
    return reader(path, strict=strict)
