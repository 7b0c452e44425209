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
    """The machinery itself: what raises, takes memory, dies or hangs is told from what is good."""
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "tests" / "fuzz"), *(path for path in sys.path if path)])},
    )  # fmt: skip
    row = json.loads(done.stdout)
    assert [(fault["file"], fault["what"].split()[0]) for fault in row["faults"]] == [
        *((0, "KeyError:"), (1, "MemoryError:"), (2, "error"), (3, "crash:"), (4, "hang:"))
    ]
    counts = ("files", "loaded", "clean_errors", "other_errors", "crashes", "hangs")
    assert [row[name] for name in counts] == [7, 1, 1, 3, 1, 1]


BROKEN = """
import json, os, random, time
import run
from jax_mxfp4.checkpoints import CheckpointError

def key(path): {}["a"]
def memory(path): bytearray(2 * run.MEMORY_BYTES)
def elsewhere(path): raise CheckpointError("another file", "wrong")
def die(path): os.kill(os.getpid(), 9)
def hang(path): time.sleep(60)
def clean(path): raise CheckpointError(path, "wrong")
def load(path): pass

READERS = (key, memory, elsewhere, die, hang, clean, load)
NUMBERS = {random.Random(f"broken {i}").random(): i for i in range(len(READERS))}

class Broken:
    opened = "number"
    def __init__(self, scratch): pass
    def damaged(self, rng): return {"number": b"%d" % NUMBERS[rng.random()]}
    def load(self, path): READERS[int(path.read_bytes())](path)

run.TARGETS["broken"] = Broken
run.SECONDS_PER_FILE = 1
print(json.dumps(run._fuzz("broken", 0, len(READERS), None)))
"""
