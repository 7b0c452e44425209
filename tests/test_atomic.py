"""Output that is whole or absent, also after a process was killed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jax_mxfp4.checkpoints import CheckpointError
from jax_mxfp4.checkpoints.atomic import atomic_output


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(destination: Path, text: str = "whole") -> None:
    with atomic_output(destination) as path:
        path.write_text(text)


def test_output_appears_at_the_end(tmp_path):
    with atomic_output(tmp_path / "file") as path:
        path.write_text("whole")
        assert not (tmp_path / "file").exists()
    assert names(tmp_path) == ["file", "file.sha256"]
    assert (tmp_path / "file").read_text() == "whole"


def test_output_vanishes_after_an_error(tmp_path):
    with pytest.raises(OSError, match="disk full"), atomic_output(tmp_path / "folder") as path:
        path.mkdir()
        (path / "part").write_text("half")
        raise OSError("disk full")
    assert names(tmp_path) == []


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    def write():
        with atomic_output(tmp_path / "file") as path:
            path.write_text("ours")
            (tmp_path / "file").write_text("theirs")

    with pytest.raises(CheckpointError, match="exists already"):
        write()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "theirs"


def test_an_old_record_is_replaced(tmp_path):
    write(tmp_path / "file", "first")
    first = (tmp_path / "file.sha256").read_text()
    (tmp_path / "file").unlink()
    write(tmp_path / "file", "second")
    assert (tmp_path / "file.sha256").read_text() != first


@pytest.fixture
def writing(tmp_path):
    """A process that is in the middle of writing `tmp_path / "out"`."""
    program = f"""
import time
from pathlib import Path
from jax_mxfp4.checkpoints.atomic import atomic_output
with atomic_output(Path({str(tmp_path / "out")!r})) as path:
    path.mkdir()
    (path / "part").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_what_a_killed_process_left_is_removed(tmp_path, writing):
    (leftover,) = tmp_path.iterdir()
    assert (leftover / "out" / "part").exists()

    # While it lives, another one does not touch its folder.
    with atomic_output(tmp_path / "out") as path:
        path.write_text("other")
        assert leftover.exists()
        path.unlink()
        path.mkdir()
    assert (leftover / "out" / "part").exists()
    (tmp_path / "out" / "SHA256SUMS").unlink()
    (tmp_path / "out").rmdir()

    writing.send_signal(signal.SIGKILL)
    writing.wait()
    assert leftover.exists()
    write(tmp_path / "out")
    assert names(tmp_path) == ["out", "out.sha256"]


def test_nothing_else_is_removed(tmp_path):
    for name in (".other.0123abcd.partial", ".out.partial", ".out.0123abcd.partial.x"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.0123abcd.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".out.00000000.partial").write_text("a file")
    before = names(tmp_path)
    write(tmp_path / "out")
    assert names(tmp_path) == sorted([*before, "out", "out.sha256"])


def test_two_processes_write_to_one_name(tmp_path):
    with atomic_output(tmp_path / "out") as ours:
        with atomic_output(tmp_path / "out") as theirs:
            ours.write_text("ours")
            theirs.write_text("theirs")
        assert (tmp_path / "out").read_text() == "theirs"
        (tmp_path / "out").unlink()
    assert (tmp_path / "out").read_text() == "ours"
