"""The command `jax-mxfp4 convert`."""

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from jax_mxfp4.cli_calibration import Calibration, gptq_packer
from jax_mxfp4.cli_progress import byte_progress

if TYPE_CHECKING:
    from jax_mxfp4.checkpoints import Packer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(convert)


def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint folder, or a file *.gguf.", show_default=False)
    ],
    destination: Annotated[
        Path, typer.Argument(help="What to create: *.gguf, or a folder.", show_default=False)
    ],
    layout: Annotated[
        Literal["huggingface", "openai", "gguf"] | None,
        typer.Option(
            "--to", help="Layout of DESTINATION.", show_default="gguf for *.gguf, else huggingface"
        ),
    ] = None,
    scale_rule: Annotated[
        Literal["floor", "even", "rceil", "mse"] | None,
        typer.Option(
            help="How the scale of a block is chosen, where weights are packed.",
            show_default="even",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pack",
            metavar="REGEX",
            help="Which modules to pack of a model other than GPT-OSS, by their whole names, such "
            "as model.layers.0.mlp.up_proj. vLLM wants q, k and v alike, and gate and up.",
            show_default="linear layers, not embeddings and lm_head",
        ),
    ] = None,
    method: Annotated[
        Literal["nearest", "gptq"],
        typer.Option(help="nearest rounds each element; gptq compensates on calibration text."),
    ] = "nearest",
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="A file of text, for gptq.", show_default=False),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the calibration text.")] = 64,
    window: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 512,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where gptq keeps finished layers, and goes on from.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a checkpoint in another layout, or pack it.

    GPT-OSS goes from any layout to any; packed experts keep every bit, others are packed.

    Other models, such as Llama, are packed in the layout of compressed-tensors, which vLLM reads.
    """
    from jax_mxfp4 import convert as conversion

    with ExitStack() as stack:
        pack = None if scale_rule is None else conversion.round_to_nearest(scale_rule)
        if method == "gptq":
            pack = stack.enter_context(
                _gptq(source, calibration, windows, window, resume, scale_rule)
            )
        elif calibration is not None or resume is not None:
            raise typer.BadParameter("--calibration and --resume are for --method gptq")
        report = stack.enter_context(byte_progress("converting"))
        conversion.convert(source, destination, layout, pattern=pattern, pack=pack, progress=report)
    Console(stderr=True).print(
        Text(f"{source} is now also {destination}"), soft_wrap=True, highlight=False
    )


def _gptq(
    source: Path,
    text: Path | None,
    windows: int,
    window: int,
    resume: Path | None,
    scale_rule: Any,
) -> "AbstractContextManager[Packer]":
    from jax_mxfp4.quantizers import GptqOptions

    if text is None:
        raise typer.BadParameter("--method gptq needs --calibration TEXT")
    options = GptqOptions() if scale_rule is None else GptqOptions(scale_rule=scale_rule)
    return gptq_packer(source, Calibration(text, windows, window, resume), options)
