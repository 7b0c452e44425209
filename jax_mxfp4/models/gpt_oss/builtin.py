"""The small trained model that is part of this package."""

from importlib import resources
from pathlib import Path


def mini_path() -> Path:
    """Return the folder of the built-in 2.1M-parameter model, a checkpoint with its tokenizer.

    See the model card beside it (`mini/README.md`) for what it is and is not.
    """
    return Path(str(resources.files("jax_mxfp4.models.gpt_oss") / "mini"))
