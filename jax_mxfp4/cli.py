"""The `jax-mxfp4` command.

Results go to stdout; progress, figures and errors to stderr. What is wrong with the input is one
line and a non-zero exit status: 2 for the command line itself, 1 for what it refers to.

The model and its packages are imported inside the commands, so that `--help` and mistakes in the
command line are answered soon.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jax_mxfp4 import cli_checkpoints, cli_convert, cli_eval
from jax_mxfp4.cli_models import BUILTIN, DEFAULT, NAMES
from jax_mxfp4.cli_progress import byte_progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jax_mxfp4.models.gpt_oss import GptOss

_NAME = "jax-mxfp4"
_MAX_SEED = 2**32 - 1
_DENSE_PARTS = ("attention", "embedding", "unembedding")  # models.gpt_oss.packing.DensePart


@dataclass
class _Options:
    """Options that come before the command."""

    traceback: bool = False


app = typer.Typer(name=_NAME, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _global_options(
    context: typer.Context,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """4-bit (OCP MXFP4) weights in JAX."""
    if isinstance(context.obj, _Options):
        context.obj.traceback = traceback


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False)],
    model: Annotated[
        Path | None,
        typer.Option(
            help="A GPT-OSS checkpoint: a folder in Hugging Face's or OpenAI's layout, or *.gguf; "
            f"or the name of a built-in model: {NAMES}.",
            show_default=DEFAULT,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder with tokenizer.json.", show_default="the model's folder"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 100,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token every time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the most likely tokens with this probability.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Of the draws at a temperature above 0, at least 0.")
    ] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of everything that is not packed. float32 is full float32."),
    ] = "float32",
    implementation: Annotated[
        Literal["cuda", "reference"] | None,
        typer.Option(help="Of the packed operations.", show_default="by platform"),
    ] = None,
    cache_format: Annotated[
        Literal["fp8", "mxfp4"] | None,
        typer.Option(help="Of keys and values, in fewer bits.", show_default="as --dtype"),
    ] = None,
    pack: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Also round these matrices to MXFP4: {', '.join(_DENSE_PARTS)}; can be repeated.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Continue PROMPT with a GPT-OSS model; prints the prompt and its continuation."""
    _check_prompt(prompt)
    _check("--max-new-tokens", max_new_tokens >= 1, "at least 1", max_new_tokens)
    _check("--temperature", 0 <= temperature < math.inf, "0 or a positive number", temperature)
    _check("--top-p", 0 < top_p <= 1, "above 0 and at most 1", top_p)
    _check("--seed", 0 <= seed <= _MAX_SEED, f"0 to {_MAX_SEED}", seed)
    for part in pack or ():
        _check("--pack", part in _DENSE_PARTS, ", ".join(_DENSE_PARTS), part)
    if model is not None and str(model) not in BUILTIN:
        _check("--model", model.exists(), f"a checkpoint, {NAMES}", f"nothing at {model}")
    if tokenizer is not None:
        found = f"{'a file' if tokenizer.exists() else 'nothing'} at {tokenizer}"
        _check("--tokenizer", tokenizer.is_dir(), "a folder", found)

    import jax

    from jax_mxfp4.doctor import collect, default_implementation, lacking
    from jax_mxfp4.models.gpt_oss import GptOss
    from jax_mxfp4.models.gpt_oss.builtin import find_model
    from jax_mxfp4.models.gpt_oss.generate import generate as generate_tokens
    from jax_mxfp4.models.gpt_oss.tokenizer import load_tokenizer

    # Known before the weights are read, which can take minutes.
    if implementation == "cuda" and default_implementation() != "cuda":
        raise RuntimeError(f"--implementation cuda: {' '.join(lacking(collect()))}")
    path, name = find_model(model)
    console = Console(stderr=True, highlight=False)
    started = time.perf_counter()
    with byte_progress("loading") as report:
        weights = GptOss.from_pretrained(
            path,
            dtype=dtype,
            implementation=implementation,
            pack=cast(Sequence[Any], pack or ()),
            progress=report,
        )
    encoder = load_tokenizer(path if tokenizer is None else tokenizer)
    console.print(
        f"loaded {name} "
        f"({_parameters(weights):,} parameters, {dtype}) in {time.perf_counter() - started:.1f} s; "
        f"{implementation or default_implementation()} implementation on "
        f"{jax.devices()[0].device_kind}",
        soft_wrap=True,
        markup=False,
    )
    continue_tokens = partial(
        generate_tokens,
        weights,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
        cache_format=cache_format,
    )
    clock = _continue(prompt, encoder, continue_tokens, max_new_tokens, console)
    console.print(clock.summary(), soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say which device, versions and kernels are in use, and what is lacking."""
    from jax_mxfp4.doctor import collect, render

    typer.echo(render(collect()))


cli_convert.register(app)
cli_checkpoints.register(app)
cli_eval.register(app)


@dataclass
class _Clock:
    """When the tokens came, in seconds of `time.perf_counter`."""

    started: float = field(default_factory=time.perf_counter)
    tokens: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.tokens.append(time.perf_counter())

    def summary(self) -> str:
        """How many tokens came, and how fast once both programs were compiled.

        One program reads the prompt and makes the first token, another makes each further one.
        """
        count, compiled = len(self.tokens), min(len(self.tokens), 2)
        text = (
            f"{count} tokens: {compiled} in {self.tokens[compiled - 1] - self.started:.2f} s with "
            "compilation"
        )
        if count > compiled:
            seconds = self.tokens[-1] - self.tokens[compiled - 1]
            text += f", then {(count - compiled) / seconds:.1f} tokens/s"
        return text


def _check(option: str, is_valid: bool, expected: str, found: object) -> None:
    if not is_valid:
        raise typer.BadParameter(f"expected {expected}, found {found}", param_hint=f"'{option}'")


def _check_prompt(prompt: str) -> None:
    _check("PROMPT", bool(prompt), "text", "an empty string")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no text
        _check("PROMPT", False, "text in UTF-8", repr(error.object[error.start : error.end]))


def _continue(
    prompt: str,
    tokenizer: "Tokenizer",
    continue_tokens: Callable[..., object],
    max_new_tokens: int,
    console: Console,
) -> _Clock:
    """Write the prompt and its continuation: to a terminal as it comes, else at the end."""
    from jax_mxfp4.streaming import TextStream

    clock = _Clock()
    text = TextStream(tokenizer)
    live = sys.stdout.isatty()
    pieces = [prompt]
    with _bar(console) as bar:
        task = bar.add_task("compiling", total=max_new_tokens)

        def step(new: list[int | None]) -> None:
            clock.tick()
            if live and len(clock.tokens) == 1:
                bar.stop()  # the text itself shows progress from here on
            pieces.extend(text.push(token) for token in new if token is not None)
            bar.update(task, advance=1, description="generating")
            if live:
                _write(pieces)

        continue_tokens(tokenizer.encode(prompt).ids, stream=step)
    pieces += [text.finish(), "\n"]
    _write(pieces)
    return clock


def _write(pieces: list[str]) -> None:
    sys.stdout.write("".join(pieces))
    sys.stdout.flush()
    pieces.clear()


def _bar(console: Console) -> Progress:
    """A bar that counts tokens, on terminals only, where it leaves nothing behind."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _parameters(model: "GptOss") -> int:
    import jax

    from jax_mxfp4.array import MXFP4Array

    leaves = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, MXFP4Array))
    return sum(leaf.size for leaf in leaves)


def run(arguments: Sequence[str]) -> int:
    """Run the command with `arguments` and return its exit status."""
    options = _Options()
    try:
        result = app(
            list(arguments) or ["--help"], prog_name=_NAME, standalone_mode=False, obj=options
        )
    except typer.TyperException as error:
        return _fail(error.format_message(), error.exit_code)
    # Checkpoint errors are ValueErrors; missing kernels and JAX's own failures RuntimeErrors.
    except (OSError, ValueError, RuntimeError) as error:
        if options.traceback:
            raise
        return _fail(str(error), 1)
    return result or 0


def _fail(message: str, status: int) -> int:
    print(f"{_NAME}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def main() -> None:
    """Entry point of the `jax-mxfp4` command."""
    sys.exit(run(sys.argv[1:]))
