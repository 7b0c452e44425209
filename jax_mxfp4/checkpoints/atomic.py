"""Output that appears under its name only when it is complete, and then with its checksums."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from jax_mxfp4.checkpoints.checksums import SUFFIX, record_checksums
from jax_mxfp4.checkpoints.errors import CheckpointError


@contextlib.contextmanager
def atomic_output(destination: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder to, which becomes `destination` at the end.

    The path lies in a hidden folder beside `destination`, on the same file system, so that the
    last step is a rename. After an error nothing is left; after a killed process only that folder
    (`.NAME.*.partial`), which the next call for the same destination removes. A folder that another
    process still writes to is left alone.

    What was written is read once more for its checksums; see `record_checksums`.

    Raises:
      CheckpointError: `destination` exists already, or the folder it is to lie in does not.
    """
    require_free(destination)
    _remove_leftovers(destination)
    with _workshop(destination) as workshop:
        unfinished = workshop / destination.name
        yield unfinished
        record_checksums(unfinished)
        require_free(destination)
        unfinished.rename(destination)
        record = workshop / f"{destination.name}{SUFFIX}"
        if record.exists():
            # After the file that it is about: one without a record is complete, too. What it
            # replaces can only be of a file that is gone.
            record.replace(destination.with_name(record.name))


def require_free(destination: Path) -> None:
    """Refuse a destination that exists, or that cannot be made.

    Raises:
      CheckpointError: see above.
    """
    if os.path.lexists(destination):
        raise CheckpointError(destination, "exists already, and is not overwritten")
    if not destination.parent.is_dir():
        raise CheckpointError(destination.parent, "expected a folder to write to: no such folder")


@contextlib.contextmanager
def _workshop(destination: Path) -> Iterator[Path]:
    """Make a folder that is locked for as long as this process lives, and remove it at the end."""
    while True:
        folder = destination.parent / f".{destination.name}.{secrets.token_hex(4)}.partial"
        folder.mkdir()
        with _locked(folder) as is_ours:
            # Another process may have taken it for a leftover before it was locked.
            if is_ours is False or not folder.exists():
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder)
            return


def _remove_leftovers(destination: Path) -> None:
    """Remove the folders of killed processes that wrote to `destination`."""
    name = re.compile(rf"\.{re.escape(destination.name)}\.[0-9a-f]{{8}}\.partial")
    for folder in destination.parent.iterdir():
        if name.fullmatch(folder.name):
            with _locked(folder) as is_ours:
                if is_ours:
                    shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Lock `folder`, and say whether that was possible: not if a living process has done so.

    The kernel undoes the lock when a process ends, however it does. None is for a file system
    without locks, or what is no folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
