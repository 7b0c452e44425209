"""Feed damaged checkpoints to the readers and count what happens.

    python tests/fuzz/run.py --files 20000 --output results.json
    python tests/fuzz/run.py --only gguf --first 1234 --files 1 --keep folder   # one file again

Every file is made from a valid one by a seeded mutator (mutations.py) and read completely, in a
process of its own priority, with a limit on the time for one file and on address space. A file
that loads, because the damage changed values only, and a `CheckpointError` are as they should be;
everything else is a fault of the reader, and the exit status is then 1.
"""

import argparse
import collections
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

from targets import TARGETS

import jax_mxfp4
from jax_mxfp4.checkpoints import CheckpointError

SECONDS_PER_FILE = 10
MEMORY_BYTES = 2**30
_NICENESS = 15
_LOADED, _CLEAN = "loaded", "clean error"


def main() -> int:
    """Fuzz the chosen targets one after the other and print the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=20_000, help="of each target")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--only", action="append", choices=TARGETS, help="may be given again")
    parser.add_argument("--output", type=Path, help="also write the counts to this file")
    parser.add_argument("--keep", type=Path, help="keep the last damaged checkpoint in this folder")
    arguments = parser.parse_args()
    rows = [
        _fuzz(name, arguments.first, arguments.files, arguments.keep)
        for name in arguments.only or TARGETS
    ]
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "limits": {
            "seconds_per_file": SECONDS_PER_FILE,
            "address_space_mib_above_start": MEMORY_BYTES // 2**20,
        },
        "targets": rows,
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)
    return 1 if any(row["faults"] for row in rows) else 0


def _fuzz(name: str, first: int, count: int, keep: Path | None) -> dict:
    """Run workers until all files were tried; one that dies is replaced by another."""
    # A fork need not import JAX again, and is safe as long as JAX has no threads in this process.
    processes = multiprocessing.get_context("fork")
    outcomes: collections.Counter[str] = collections.Counter()
    faults = []
    growth = 0
    start = time.monotonic()
    next_file = first
    while next_file < first + count:
        results, sender = processes.Pipe(duplex=False)
        arguments = (name, next_file, first + count - next_file, keep, sender)
        worker = processes.Process(target=_work, args=arguments)
        worker.start()
        sender.close()  # so that the pipe ends with the worker
        for kind, detail in _received(results):
            if kind == "growth":
                growth = max(growth, int(detail))
                continue
            outcomes[kind] += 1
            if kind not in (_LOADED, _CLEAN):
                faults.append({"file": next_file, "what": f"{kind}: {detail}"})
            next_file += 1
        worker.join()
        status = worker.exitcode or 0
        if status > 0:
            raise RuntimeError(f"the worker for {name} stopped at file {next_file} by itself")
        if status and next_file < first + count:
            kind = "hang" if status == -signal.SIGALRM else "crash"
            outcomes[kind] += 1
            faults.append({"file": next_file, "what": f"{kind}: signal {-status}"})
            next_file += 1
    return {
        "target": name,
        "files": count,
        "loaded": outcomes[_LOADED],
        "clean_errors": outcomes[_CLEAN],
        "other_errors": count - sum(outcomes[k] for k in (_LOADED, _CLEAN, "hang", "crash")),
        "hangs": outcomes["hang"],
        "crashes": outcomes["crash"],
        "peak_memory_growth_mib": round(growth / 1024),
        "seconds": round(time.monotonic() - start),
        "faults": faults[:20],
    }


def _received(results: Connection) -> Iterator[tuple[str, str]]:
    while True:
        try:
            yield results.recv()
        except EOFError:
            return


def _work(name: str, first: int, count: int, keep: Path | None, results: Connection) -> None:
    """Try files and send what came of each; a file that takes too long ends the process."""
    os.nice(_NICENESS)
    with tempfile.TemporaryDirectory() as scratch:
        target = TARGETS[name](Path(scratch))
        folder = Path(scratch) / "damaged"
        _limit_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(first, first + count):
            files = target.damaged(random.Random(f"{name} {number}"))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_bytes(content)
            if keep:
                shutil.copytree(folder, keep, dirs_exist_ok=True)
            # The default action of this signal ends the process, also inside compiled code.
            signal.alarm(SECONDS_PER_FILE)
            outcome = _outcome(target.load, folder / target.opened)
            signal.alarm(0)
            results.send(outcome)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        results.send(("growth", str(after - before)))


def _outcome(load, path: Path) -> tuple[str, str]:
    try:
        load(path)
    except CheckpointError as error:
        if str(path) in str(error):
            return _CLEAN, ""
        return "error that does not name the file", str(error)[:200].replace("\n", " ")
    except BaseException as error:  # panics of compiled code are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return type(error).__name__, str(error)[:200].replace("\n", " ")
    return _LOADED, ""


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    print(f"jax_mxfp4 from {Path(jax_mxfp4.__file__).parent}", file=sys.stderr)
    sys.exit(main())
