"""The kernels run inside CUDA graphs (XLA's command buffers)."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jax_mxfp4.ffi import TARGETS

# Eight dependent products, then one of each other kernel: more than the five consecutive thunks
# that XLA asks for (xla_gpu_graph_min_graph_size).
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import jax_mxfp4 as mx

rng = np.random.default_rng(0)
w = mx.quantize(jnp.asarray(rng.standard_normal((256, 256)), jnp.float32))
gate_up = mx.quantize(jnp.asarray(rng.standard_normal((4, 128, 256)), jnp.float32))
down = mx.quantize(jnp.asarray(rng.standard_normal((4, 256, 64)), jnp.float32))

@jax.jit
def program(ids, experts, shares, w, gate_up, down):
    x = mx.take(w, ids, implementation="cuda")
    for _ in range(8):
        x = mx.matmul(x, w, implementation="cuda")
    x = mx.moe(x, experts, shares, gate_up, None, down, None, implementation="cuda")
    return x, mx.dequantize(w, implementation="cuda")

ids = jnp.arange(4)
experts = jnp.array([[0, 1], [1, 2], [2, 3], [3, 0]])
shares = jnp.full((4, 2), 0.5)
args = (ids, experts, shares, w, gate_up, down)
first = jax.device_get(program(*args))
for _ in range(3):  # from the second run on, a graph may be replayed
    for a, b in zip(first, jax.device_get(program(*args))):
        np.testing.assert_array_equal(a, b)
"""


def graph_section(dump: str) -> str:
    """The thunks nested under command buffers: the lines indented deeper than theirs."""
    inside, depth, lines = False, 0, []
    for line in dump.splitlines():
        indent = len(line) - len(line.lstrip())
        if inside and line.strip() and indent <= depth:
            inside = False
        if not inside and re.search(r"command_?buffer", line, re.IGNORECASE):
            inside, depth = True, indent
        elif inside:
            lines.append(line)
    return "\n".join(lines)


def custom_calls(hlo: str) -> Counter[str]:
    """How often an HLO module calls each target."""
    return Counter(re.findall(r'custom_call_target="([^"]+)"', hlo))


def read_all(folder: Path, pattern: str) -> str:
    files = sorted(folder.rglob(pattern))
    assert files, f"XLA dumped no {pattern}, only {sorted(p.name for p in folder.rglob('*'))}"
    return "\n".join(path.read_text() for path in files)


@pytest.mark.gpu
def test_kernels_are_captured(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        # This process may hold most of the GPU's memory already.
        env=os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls = custom_calls(read_all(tmp_path, "*jit_program*after_optimizations.txt"))
    assert calls == dict.fromkeys(TARGETS, 1) | {"jax_mxfp4_matmul": 8}
    # The dump names kinds of thunks, not targets; all custom calls of the program are ours.
    thunks = read_all(tmp_path, "*jit_program*thunk_sequence*after_thunk_passes*.txt")
    captured = graph_section(thunks).count(": kCustomCall ")
    assert captured == calls.total(), f"not all calls are in a command buffer:\n{thunks}"


def test_graph_section_sees_nesting():
    dump = "000: kCopy x\n001: kCommandBuffer y\n  000: kCustomCall a\n  001: kCopy\n002: kCall b"
    assert graph_section(dump) == "  000: kCustomCall a\n  001: kCopy"


def test_custom_calls():
    hlo = 'ROOT %ffi_call.3 = (bf16[4]{0}) custom-call(%x), custom_call_target="jax_mxfp4_take"'
    assert custom_calls(2 * hlo) == {"jax_mxfp4_take": 2}
