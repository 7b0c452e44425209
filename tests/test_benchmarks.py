"""The benchmark harness, without a GPU: what is counted, chained, checked, written and refused."""

import io
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import chain  # noqa: E402
import check  # noqa: E402
import matmul  # noqa: E402
import moe  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import roofs  # noqa: E402
import run  # noqa: E402
import shapes  # noqa: E402
import timing  # noqa: E402
import unpack  # noqa: E402

from jax_mxfp4 import quantize, reference  # noqa: E402

SMALL = shapes.Shape("small", 96, 64)
ROOFS = roofs.Roofs(3000.0, 2400.0, 780.0, "")


def test_copies_fill_the_rotation():
    mib = 2**20
    for shape in shapes.SHAPES.values():
        for size in (shape.packed_bytes, shape.bf16_bytes):
            copies = shapes.copies_of(size)
            assert copies * size >= 256 * mib
            assert copies == 1 or (copies - 1) * size < 256 * mib
    assert shapes.copies_of(shapes.SHAPES["down"].packed_bytes) == 61
    assert shapes.copies_of(shapes.SHAPES["lm_head"].packed_bytes) == 1


@pytest.mark.parametrize(
    ("name", "m", "floor"), [("lm_head", 1, 100.8), ("o_proj", 16, 2.1), ("qkv", 4096, 153.8)]
)
def test_floor(name, m, floor):
    shape = shapes.SHAPES[name]
    moved = shape.n * shape.k * 17 // 32 + 2 * m * (shape.n + shape.k)
    assert shape.packed_bytes + shape.activation_bytes(m) == moved
    us = shapes.floor_us(moved, shape.flops(m), 3055, 785)
    assert us == pytest.approx(floor, abs=0.1)  # printed with rounded roofs


def test_number_of_calls():
    assert shapes.calls_of(1, 5.0) == 200
    assert shapes.calls_of(61, 5.0) == 244  # whole rotations
    assert shapes.calls_of(1, 1000.0) == 200
    assert shapes.calls_of(1, 1001.0) == 50
    assert shapes.calls_of(1, 50_000.0) == 8
    assert shapes.calls_of(2, 5000.0, at_least=3) == 4


def packed_weights(copies: int) -> list[matmul.mx.MXFP4Array]:
    return matmul.random_packed(SMALL, copies)


def x_of(m: int) -> jax.Array:
    return jax.random.normal(jax.random.key(9), (m, SMALL.k), jnp.bfloat16)


@pytest.mark.parametrize("live_bytes", [1, 600, 2**30])
def test_chain_calls_in_rotation_and_returns_a_sample_of_each(live_bytes):
    weights, x = packed_weights(3), x_of(2)
    program = jax.jit(chain.chained(matmul.ours, 7, live_bytes))
    blank = (jnp.full(7, jnp.nan, jnp.bfloat16), jnp.full((2, 96), jnp.nan, jnp.bfloat16))
    samples, last = program(blank, x, tuple(weights))
    each = [matmul.ours(x, w) for w in weights]
    np.testing.assert_array_equal(samples, [np.asarray(each[i % 3])[0, 0] for i in range(7)])
    np.testing.assert_array_equal(last, each[0])


@pytest.mark.parametrize("live_bytes", [600, 2**30])
def test_each_call_waits_for_the_one_before(live_bytes):
    """In the lowered program, what a call reads comes from a barrier on the call before it."""
    weights = [jnp.ones((96, 64), jnp.bfloat16)] * 2
    program = jax.jit(chain.chained(matmul.cublas, 6, live_bytes))
    blank = (jnp.zeros(6, jnp.bfloat16), jnp.zeros((2, 96), jnp.bfloat16))
    text = program.lower(blank, x_of(2), tuple(weights)).as_text()

    sources: dict[str, list[str]] = {}  # value -> the operation's name and operands
    for line in text.splitlines():
        if found := re.match(r"\s*(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)", line):
            name, op, rest = found.groups()
            sources[name] = [op, *re.findall(r"%\w+", rest.split(" : ")[0])]

    def calls_before(value: str) -> set[str]:
        op, *operands = sources.get(value, ["argument"])
        found = {value} if op == "stablehlo.dot_general" else set()
        return found.union(*map(calls_before, operands))

    calls = [name for name, (op, *_) in sources.items() if op == "stablehlo.dot_general"]
    assert len(calls) == 6
    for before, call in itertools.pairwise(calls):
        for operand in sources[call][1:]:
            assert sources[operand][0] == "stablehlo.optimization_barrier"
            assert before in calls_before(operand)


def test_compiled_chain_donates_its_state():
    weights, x = packed_weights(2), x_of(1)
    compiled = chain.compile_chain(matmul.ours, x, weights, 4)
    first = compiled.fresh_state()
    assert np.isnan(first[0]).all() and np.isnan(first[1]).all()
    second = compiled.run(first, x, tuple(weights))
    assert first[0].is_deleted() and first[1].is_deleted()
    assert np.isfinite(second[0]).all()
    assert compiled.one_graph is None  # nothing to say about CPUs


GRAPH = """\
001: kCommandBuffer [source | sink ] command_buffer
  001: kCustomCall [source | next=002 (1)] kCustomCall
  002: kCustomCall [prev=001 (1) | next=003 (1)] kCustomCall
  003: kCustomKernel [prev=002 (1) | sink ] loop_concatenate_fusion_1 grid: [1, 1, 1]
"""


def test_reads_thunks():
    assert chain.read_thunks(GRAPH, 2) == (True, "CustomCall")
    assert chain.read_thunks(GRAPH, 1) == (True, "CustomCall + loop_concatenate_fusion")
    assert chain.read_thunks(GRAPH, 3) == (False, "")
    assert not chain.read_thunks(GRAPH + "002: kCustomCall [prev=001 (1)] kCustomCall\n", 2)[0]
    assert not chain.read_thunks(GRAPH + GRAPH, 2)[0]
    assert not chain.read_thunks(GRAPH.replace("kCommandBuffer", "kSequential"), 2)[0]


def test_timing_counts_calls_and_not_what_a_burst_costs(monkeypatch):
    now = 0.0

    def run(state):
        nonlocal now
        now += 2e-3  # of which the host has nothing to do
        return state + 1

    def look():
        nonlocal now
        now += 0.5e-3  # starting and waiting
        return now

    monkeypatch.setattr(timing.time, "perf_counter", look)
    measured, state = timing.measure(
        run, jnp.int32(0), 10, samples=3, warm_up=2, sample_seconds=8e-3
    )
    assert measured.us == pytest.approx(200) and measured.us_max == pytest.approx(200)
    runs = 3  # of 2.5 ms, as the first one seemed
    assert (measured.runs, measured.samples) == (2 * runs, 3)
    assert state == 2 + 1 + 3 * (runs + 3 * runs)
    _, state = timing.measure(
        run, jnp.int32(0), 10, samples=3, sample_seconds=8e-3, before_sample=jnp.zeros_like
    )
    assert state == runs + 3 * runs  # of the last sample alone


def test_timing_tries_again_where_more_work_took_less_time(monkeypatch):
    good, bad = [0.0, 0.1, 1.0, 0.0, 0.1, 3.0], [0.0, 0.1, 3.0, 0.0, 0.1, 1.0]

    def clock(*samples):
        looks = iter([0.0, 1e-3, *(look for sample in samples for look in sample)])
        monkeypatch.setattr(timing.time, "perf_counter", lambda: next(looks))

    clock(bad, good, bad, good)
    measured, _ = timing.measure(lambda s: s, jnp.int32(0), 1, samples=2)
    assert measured.us_min == pytest.approx(2 / 16 * 1e6) == measured.us_max
    clock(*(4 * [bad, bad]))
    with pytest.raises(timing.Unsteady, match="of 8 bursts only 0 took longer"):
        timing.measure(lambda s: s, jnp.int32(0), 1, samples=2)


def test_timing_says_when_the_host_is_the_limit(monkeypatch):
    # Start and end of one run; per sample and burst: start, all are queued, all are done.
    burst, long = [0.0, 0.1, 1.0], [0.0, 2.95, 3.0]
    clock = iter([0.0, 1e-3] + 3 * (burst + long))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    measured, _ = timing.measure(lambda s: s, jnp.int32(0), 1, samples=3)
    assert measured.runs == 2 * 8
    assert measured.host_bound


def test_decode_agrees_with_the_definition():
    w = quantize(jax.random.normal(jax.random.key(0), (8, 64)))
    for packed in (w, matmul.mx.prepare(w)):
        np.testing.assert_array_equal(check.decode(packed), reference.dequantize(w, jnp.float32))


def test_measured_weights_are_prepared():
    """Beforehand: what is timed has no step of its own for it."""
    (w,) = packed_weights(1)
    assert w.layout == "prepared"
    (layer,) = moe.random_layers(moe.Layer(width=64, intermediate=32, experts=8), 1)
    assert [leaf.layout for leaf in layer[::2]] == ["prepared"] * 2


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 201088])
def test_spread_covers_a_dimension(size):
    points = check.spread(size)
    assert points[0] == 0 and points[-1] == size - 1
    assert len(points) == min(size, check.POINTS)
    assert np.all(np.diff(points) >= 0)


def test_check_product_finds_errors():
    x = np.asarray(x_of(4))
    w = np.asarray(x_of(5)).astype(np.float64)
    exact = x.astype(np.float64) @ w.T
    right = exact.astype(x.dtype)
    check.check_product("right", right, x, w)
    for wrong in (right * x.dtype.type(1.02), np.where(exact == exact[1, 2], np.nan, right)):
        with pytest.raises(check.WrongResult, match=r"^this: "):
            check.check_product("this", wrong, x, w)
    with pytest.raises(check.WrongResult, match="shape"):
        check.check_product("this", right[:2], x, w)


SETTINGS = matmul.Settings(samples=2, calls=3, rotation_bytes=2 * SMALL.packed_bytes)


def test_measures_both_implementations():
    said: list[str] = []
    rows = list(matmul.measure_shape(SMALL, [1, 2], ROOFS, SETTINGS, said.append))
    assert [(r["M"], r["impl"]) for r in rows] == [
        (m, impl) for m in (1, 2) for impl in ("jax_mxfp4", "cublas_bf16")
    ]
    assert rows[0]["copies"] == 2 and rows[0]["calls"] == 4
    assert rows[1]["copies"] == 1 and rows[1]["calls"] == 3
    assert all(0 < r["us_min"] <= r["us"] <= r["us_max"] for r in rows)
    assert len(said) == 1 + len(rows)


def test_reports_the_fastest_variant_of_cublas():
    rows = list(
        matmul.measure_shape(SMALL, [1], ROOFS, replace(SETTINGS, cublas="best"), lambda _: None)
    )
    assert [r["impl"] for r in rows] == ["jax_mxfp4", "cublas_bf16"]
    assert rows[1]["variant"] in ("heuristic", "autotuned")


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setattr(matmul, "ours", lambda x, w: matmul.mx.matmul(x, w).at[0, -1].multiply(1.5))
    with pytest.raises(check.WrongResult, match="jax_mxfp4 small M=1"):
        list(matmul.measure_shape(SMALL, [1], ROOFS, SETTINGS, lambda _: None))


def test_stops_at_the_time_limit():
    late = replace(SETTINGS, deadline=0.0)
    with pytest.raises(matmul.OutOfTime, match="before small, M = 1"):
        list(matmul.measure_shape(SMALL, [1], ROOFS, late, lambda _: None))


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(
        ["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_commit_of_a_checkout(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "a")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert results.commit_of(tmp_path, None, False) == head
    assert results.commit_of(tmp_path, head[:10], False) == head
    with pytest.raises(results.Refused, match="checkout is at"):
        results.commit_of(tmp_path, "1234567", False)

    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "earlier.json").write_text("{}")
    assert results.commit_of(tmp_path, None, False) == head

    (tmp_path / "a.py").write_text("2")
    with pytest.raises(results.Refused, match=r"a\.py"):
        results.commit_of(tmp_path, None, False)
    assert results.commit_of(tmp_path, None, True) == f"{head}-dirty"


def test_commit_without_git(tmp_path):
    assert results.commit_of(tmp_path, "abc", False) == "abc"
    with pytest.raises(results.Refused, match="--commit"):
        results.commit_of(tmp_path, None, True)


@pytest.mark.parametrize(
    ("kind", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("cpu", "cpu"),
    ],
)
def test_device_slug(kind, slug):
    assert results.device_slug(kind) == slug


def test_results_have_a_temporary_name_until_they_are_complete(tmp_path):
    file = results.Results(tmp_path / "new" / "r.json", {"device": "d"})
    file.add({"M": 1})
    file.add({"M": 2})
    assert [p.name for p in file.path.parent.iterdir()] == ["r.partial.json"]
    assert file.finish() == file.path
    assert [p.name for p in file.path.parent.iterdir()] == ["r.json"]
    assert json.loads(file.path.read_text()) == {"device": "d", "rows": [{"M": 1}, {"M": 2}]}


TINY = ["--quick", "--calls", "3", "--rotation-mib", "0.01", "--commit", "abc"]
TINY += ["--roof-mib", "1", "--roof-gemm", "64"]


@pytest.fixture
def without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)


@pytest.fixture
def small_shapes(monkeypatch):
    for name in ("qkv", "down"):
        monkeypatch.setitem(run.SHAPES, name, replace(SMALL, name=name))


@pytest.mark.usefixtures("without_git", "small_shapes")
def test_matmul_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    png = tmp_path / "roofline.png"
    arguments = ["matmul", "--allow-cpu", *TINY, "--shapes", "qkv", "down", "--m", "1", "2"]
    arguments += ["--out", str(tmp_path), "--plot", str(png)]
    assert run.main(arguments) == 0
    [file] = tmp_path.glob("*-cpu-matmul.json")
    written = json.loads(file.read_text())
    assert written["device"] == "cpu" and written["commit"] == "abc"
    assert written["jax"] == jax.__version__
    for roof in ("hbm_read_gbs", "hbm_copy_gbs", "bf16_tflops"):
        assert written[roof] >= 0
    assert [(r["name"], r["M"], r["impl"]) for r in written["rows"]] == [
        (name, m, impl)
        for name in ("qkv", "down")
        for m in (1, 2)
        for impl in ("jax_mxfp4", "cublas_bf16")
    ]
    for row in written["rows"]:
        assert row["op"] == "matmul" and (row["N"], row["K"]) == (96, 64)
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
    assert png.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "96 x 64" in printed.out and "wrote" in printed.err

    assert run.main(["report", str(file)]) == 0
    assert capsys.readouterr().out == printed.out


@pytest.mark.usefixtures("without_git", "small_shapes")
def test_cut_off_run_leaves_what_it_has(tmp_path, capsys):
    arguments = ["matmul", "--allow-cpu", *TINY, "--shapes", "qkv", "--m", "1", "--out"]
    assert run.main([*arguments, str(tmp_path), "--time-limit", "0"]) == 1
    assert "stopped before qkv, M = 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("*-cpu-matmul.json"))


@pytest.mark.usefixtures("without_git")
def test_unpack_command(tmp_path, monkeypatch):
    tiny = (unpack.Unpacking("all", SMALL), unpack.Unpacking("some", SMALL, 5))
    monkeypatch.setattr(run, "UNPACKINGS", tiny)
    arguments = ["unpack", "--allow-cpu", *TINY, "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    [file] = tmp_path.glob("*-cpu-unpack.json")
    rows = json.loads(file.read_text())["rows"]
    assert [(r["op"], r["name"], r["rows"]) for r in rows] == [
        ("dequantize", "all", 96),
        ("take", "some", 5),
    ]


@pytest.mark.usefixtures("without_git")
def test_refuses_to_start(capsys):
    assert run.main(["matmul"]) == 2
    assert "--commit" in capsys.readouterr().err
    if jax.default_backend() == "cpu":
        assert run.main(["unpack", "--commit", "abc"]) == 2
        assert "--allow-cpu" in capsys.readouterr().err


def test_table_warns_and_compares():
    common = {
        "op": "matmul", "name": "qkv", "N": 5120, "K": 2880, "M": 1, "one_graph": True,
        "host_bound": False, "us_min": 4.9, "us_max": 5.1, "floor_us": 2.6,
    }  # fmt: skip
    ours = {"impl": "jax_mxfp4", "us": 5.0, "gbs": 1570.0, "tflops": 5.9, "roof_fraction": 0.52}
    peer = {"impl": "cublas_bf16", "us": 12.5, "gbs": 2354.0, "tflops": 2.4, "roof_fraction": 0.8}
    found = {
        "device": "NVIDIA H100", "commit": "0123456789abcdef-dirty", "date": "2026-11-22",
        "hbm_read_gbs": 3055.0, "hbm_copy_gbs": 2428.0, "bf16_tflops": 785.0,
        "rows": [{**common, **ours}, {**common, **peer, "one_graph": False}],
    }  # fmt: skip
    console = Console(width=160, file=io.StringIO())
    console.print(report.table(found))
    text = " ".join(console.file.getvalue().split())
    for part in ("0123456789ab-dirty", "3055 GB/s", "1570 GB/s", "52%", "12.50", "2.50"):
        assert part in text
    assert "1 rows did not run in one CUDA graph" in text
    assert report.throughput({**ours, "tflops": 700.0}, found) == "700 TFLOP/s"
