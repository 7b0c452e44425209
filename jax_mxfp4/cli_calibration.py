"""Calibration for commands: from a text to what packs a checkpoint, behind a progress bar."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from jax_mxfp4.checkpoints import Packer
    from jax_mxfp4.quantizers import GptqOptions


@dataclass(frozen=True)
class Calibration:
    """What a calibration runs on.

    Attributes:
      text: a file of UTF-8 text, never the one that the result is judged by.
      windows: how many windows are taken from it, evenly spread.
      window: tokens in each.
      checkpoint: folder to keep finished layers in, from which a killed run goes on; or None.
    """

    text: Path
    windows: int
    window: int
    checkpoint: Path | None


@contextmanager
def gptq_packer(
    source: Path, calibration: Calibration, options: "GptqOptions"
) -> "Iterator[Packer]":
    """Calibrate the checkpoint `source`, with a progress bar, and yield what packs it.

    Raises:
      CheckpointError: see `calibrated_packer`; or the checkpoint has no tokenizer.
      OSError: the text cannot be read.
      ValueError: the text is not UTF-8 or too short.
    """
    from jax_mxfp4.models.gpt_oss import load_tokenizer
    from jax_mxfp4.quantizers import calibrated_packer, calibration_windows

    text = calibration.text.read_text(encoding="utf-8")
    ids = load_tokenizer(source).encode(text, add_special_tokens=False).ids
    tokens = calibration_windows(ids, calibration.window, calibration.windows)
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("weights, {task.description}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=None)

    def report(name: str, done: int, total: int) -> None:
        bar.update(task, completed=done, total=total, description=name)
        if done == total:
            bar.stop()  # what follows has a bar of its own

    with (
        bar,
        calibrated_packer(
            source, tokens, options, checkpoint=calibration.checkpoint, progress=report
        ) as pack,
    ):
        yield pack
