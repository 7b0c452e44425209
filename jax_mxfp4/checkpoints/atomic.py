"""Output that appears under its name only when it is complete."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jax_mxfp4.checkpoints.errors import CheckpointError


@contextmanager
def atomic_output(destination: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder to, which becomes `destination` at the end.

    The path lies in a hidden folder beside `destination`, on the same file system, so that the
    last step is a rename. After an error nothing is left; after a killed process only that folder
    (`.NAME.*.partial`).

    Raises:
      CheckpointError: `destination` exists already, or the folder it is to lie in does not.
    """
    require_free(destination)
    workshop = destination.parent / f".{destination.name}.{secrets.token_hex(4)}.partial"
    workshop.mkdir()
    try:
        unfinished = workshop / destination.name
        yield unfinished
        require_free(destination)
        unfinished.rename(destination)
    finally:
        shutil.rmtree(workshop)


def require_free(destination: Path) -> None:
    """Refuse a destination that exists, or that cannot be made.

    Raises:
      CheckpointError: see above.
    """
    if os.path.lexists(destination):
        raise CheckpointError(destination, "exists already, and is not overwritten")
    if not destination.parent.is_dir():
        raise CheckpointError(destination.parent, "expected a folder to write to: no such folder")
