"""The small trained models that are part of this package."""

from importlib import resources
from pathlib import Path

BUILTIN_MODELS = ("books-11m", "mini")  # the first is the default


def builtin_path(name: str = BUILTIN_MODELS[0]) -> Path:
    """Return the folder of a built-in model, a checkpoint with its tokenizer.

    The model card beside it (`README.md`) says what it is and is not.

    Args:
      name: "books-11m" has 10.8 million parameters and was trained with its experts in MXFP4;
        "mini" has 2.1 million, and its experts were rounded after training.

    Raises:
      ValueError: there is no such model.
    """
    if name not in BUILTIN_MODELS:
        raise ValueError(f"expected one of {', '.join(BUILTIN_MODELS)}, found {name!r}")
    return Path(str(resources.files("jax_mxfp4.models.gpt_oss") / name))


def mini_path() -> Path:
    """Return the folder of the built-in model "mini"."""
    return builtin_path("mini")


def find_model(model: Path | None) -> tuple[Path, str]:
    """Return where a model is, and what to call it.

    Args:
      model: a path, or if nothing is there the name of a built-in model; None for the default one.
    """
    if model is None:
        name = BUILTIN_MODELS[0]
    elif str(model) in BUILTIN_MODELS and not model.exists():
        name = str(model)
    else:
        return model, str(model)
    return builtin_path(name), f"the built-in model {name}"
