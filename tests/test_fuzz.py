"""A few hundred damaged files for each reader; `tests/fuzz/run.py` tries as many as it is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = 100
TARGETS = {
    *("huggingface", "openai", "gguf", "compressed-tensors", "config", "tokenizer", "checksums"),
}


def fuzz(*arguments: str) -> tuple[int, dict]:
    # The modules under test are those that this process imports.
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz" / "run.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_damaged_files_are_clean_errors_or_load(tmp_path):
    status, report = fuzz("--files", str(FILES), "--output", str(tmp_path / "report.json"))
    assert {row["target"] for row in report["targets"]} == TARGETS
    for row in report["targets"]:
        assert row["faults"] == []
        # A mutator that only made rubbish, or nothing of note, would find nothing.
        assert row["loaded"] > 0
        assert row["clean_errors"] > FILES // 4
        assert row["loaded"] + row["clean_errors"] == FILES
    assert status == 0
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_faults_are_found(tmp_path):
    """The machinery itself: readers that raise and that take memory are told from good ones."""
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "tests" / "fuzz"), *(path for path in sys.path if path)])},
    )  # fmt: skip
    assert done.stdout.split() == ["KeyError", "MemoryError", "error", "clean", "loaded"]


BROKEN = """
from pathlib import Path
import run
from jax_mxfp4.checkpoints import CheckpointError

def key(path): {}["a"]
def memory(path): bytearray(2 * run.MEMORY_BYTES)
def elsewhere(path): raise CheckpointError("another file", "wrong")
def clean(path): raise CheckpointError(path, "wrong")
def load(path): pass

run._limit_memory()
for reader in (key, memory, elsewhere, clean, load):
    print(run._outcome(reader, Path("here"))[0].split()[0])
"""
