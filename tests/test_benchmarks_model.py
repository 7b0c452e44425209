"""The benchmarks of the expert layer and of whole models, in small form on the CPU."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import check  # noqa: E402
import gpt_oss  # noqa: E402
import kernel_times  # noqa: E402
import matmul  # noqa: E402
import mini_accuracy  # noqa: E402
import model_costs  # noqa: E402
import moe  # noqa: E402
import roofs  # noqa: E402
import run  # noqa: E402

from jax_mxfp4.models.gpt_oss import GptOss, GptOssConfig, abstract_params  # noqa: E402
from jax_mxfp4.models.gpt_oss.released import random_params, released_config  # noqa: E402

ROOFS = roofs.Roofs(3055.0, 2428.0, 785.0, "")
SMALL = moe.Layer(width=64, intermediate=32, experts=8)
SETTINGS = matmul.Settings(samples=2, calls=3, rotation_bytes=2 * SMALL.expert_bytes * 8)
CONFIG = GptOssConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=4,
    experts_per_token=2,
    layer_types=("full_attention",),
    sliding_window=8,
)
TINY = ["--quick", "--calls", "3", "--rotation-mib", "0.01", "--commit", "abc"]
TINY += ["--roof-mib", "1", "--roof-gemm", "64", "--allow-cpu"]


@pytest.mark.parametrize(
    ("experts", "tokens", "peers"),
    [(32, 1, 4), (32, 3, 0), (32, 8, 21), (32, 64, 32), (128, 16, 51), (128, 64, 111), (8, 5, 0)],
)
def test_routing_uses_as_many_experts_as_other_measurements(experts, tokens, peers):
    layer = moe.Layer(experts=experts)
    ids, weights = moe.routing(layer, tokens)
    active = len(np.unique(ids))
    assert active == peers if peers else 4 <= active <= 4 * tokens
    assert ids.shape == weights.shape == (tokens, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(moe.routing(layer, tokens)[0], ids)


@pytest.mark.parametrize(
    ("tokens", "active", "floor"),
    [(1, 4, 17.3), (8, 21, 91.7), (64, 32, 138.5), (4096, 32, 1038.4)],
)
def test_floor_of_the_expert_layer(tokens, active, floor):
    layer = moe.Layer()
    moved, flops = layer.moved_bytes(tokens, active), layer.flops(tokens)
    us = max(moved / 3055e3, flops / 785e6)
    # The table of other kernels counts neither biases nor activations.
    assert us == pytest.approx(floor, rel=0.02)


def test_wrong_expert_layers_are_not_timed(monkeypatch):
    right = moe.moe
    monkeypatch.setattr(moe, "moe", lambda *args: right(*args) * jnp.bfloat16(1.02))
    with pytest.raises(check.WrongResult, match="moe of 8 experts, 1 tokens: token 0"):
        list(moe.measure_layer(SMALL, [1], ROOFS, SETTINGS, lambda _: None))


def test_costs_of_gpt_oss_20b():
    config = released_config("20b")
    dense, packed = model_costs.parameter_bytes(abstract_params(config))
    assert dense + packed == 13_761_264_768  # the released checkpoint's total size
    step = model_costs.decode_cost(config, 1, 1024, None)
    assert step.bytes / 3055e6 == pytest.approx(1.23, abs=0.01)  # ms
    prefill = model_costs.prefill_cost(config, 2048)
    # 3.1e9 parameters for each token, and what attention adds; the logits of one position.
    assert prefill.flops / 2048 == pytest.approx(2 * 3.12e9 + 38e6, rel=0.01)


def test_costs_of_gpt_oss_120b():
    config = released_config("120b")
    assert sum(model_costs.parameter_bytes(abstract_params(config))) == 65_248_815_744
    step = model_costs.decode_cost(config, 1, 1024, None)
    assert step.bytes / 3055e6 == pytest.approx(1.66, abs=0.01)
    smaller = model_costs.decode_cost(config, 1, 1024, "fp8")
    assert smaller.bytes < step.bytes


def test_unknown_released_model():
    with pytest.raises(ValueError, match="model: expected 20b or 120b, found '7b'"):
        released_config("7b")


def test_random_parameters():
    params = random_params(CONFIG, seed=3)
    described = abstract_params(CONFIG)
    assert jax.tree.structure(params) == jax.tree.structure(described)
    for leaf, description in zip(*map(jax.tree.leaves, (params, described)), strict=True):
        assert (leaf.shape, leaf.dtype) == (description.shape, description.dtype)
    experts = params.layers[0].mlp
    assert np.unique(experts.gate_up.scales).tolist() == [120, 121, 122]
    assert len(np.unique(experts.gate_up.blocks)) == 256
    assert np.asarray(experts.norm == 1).all()
    other = random_params(CONFIG, seed=4)
    assert not np.array_equal(experts.gate_up.blocks, other.layers[0].mlp.gate_up.blocks)
    assert not np.array_equal(params.embedding, params.unembedding)
    logits = GptOss(params, CONFIG)(np.arange(24).reshape(2, 12))
    assert np.isfinite(logits).all()
    again = random_params(CONFIG, seed=3)
    np.testing.assert_array_equal(again.unembedding, params.unembedding)


@pytest.fixture
def tiny_models(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)  # without git
    monkeypatch.setattr(run, "released_config", lambda name: CONFIG)
    monkeypatch.setattr(run, "measure_roofs", lambda **_: ROOFS)


@pytest.mark.usefixtures("tiny_models")
def test_gpt_oss_command(tmp_path, capsys):
    arguments = ["gpt_oss", *TINY, "--out", str(tmp_path), "--kernels", "3"]
    arguments += ["--batches", "1", "2", "--contexts", "16", "--prompts", "24"]
    assert run.main([*arguments, "--random-weights", "20b"]) == 0
    [file] = tmp_path.glob("*-cpu-gpt_oss.json")
    rows = json.loads(file.read_text())["rows"]
    found = [(r["model"], r["phase"], r["batch"], r["context"]) for r in rows]
    assert found == [("20b", "prefill", 1, 24), ("20b", "decode", 1, 16), ("20b", "decode", 2, 16)]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(
            (24 if row["phase"] == "prefill" else row["batch"]) / row["ms"] * 1e3, rel=1e-3
        )
        assert row["peak_gb"] is None  # CPUs do not tell
        assert row["floor_ms"] > 0 and row["roof_fraction"] > 0
    assert "20b" in capsys.readouterr().out

    again = [*arguments[:-4], "--contexts", "--prompts", "24", "--append"]
    assert run.main([*again, "--random-weights", "120b"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [r["model"] for r in rows] == ["20b", "20b", "20b", "120b"]
    changed = ["def" if a == "abc" else a for a in again]
    assert run.main([*changed, "--random-weights", "120b"]) == 2
    assert "is of commit abc" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_decoding_step_is_one_graph():
    model = GptOss(random_params(CONFIG), CONFIG, "cuda")
    state = gpt_oss._state_at(model, 2, 16, gpt_oss.Plan())
    options = gpt_oss.Options(jax.random.split(jax.random.key(0), 2), None, None, jnp.array([0]))
    step, one_graph = gpt_oss._compile(model, state, options)
    assert one_graph
    for _ in range(3):
        state = step(model.params, state, options)
    assert np.asarray(state.cache.lengths).tolist() == [19, 19]


def test_decoding_from_a_packed_cache():
    model = GptOss(random_params(CONFIG), CONFIG)
    plan = gpt_oss.Plan([2], [16], [], "mxfp4", 0)
    (row,) = gpt_oss.measure_model("tiny", model, plan, ROOFS, SETTINGS, lambda _: None)
    assert (row["phase"], row["batch"], row["cache_format"]) == ("decode", 2, "mxfp4")


@pytest.mark.usefixtures("tiny_models")
def test_moe_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "Layer", lambda experts: dataclasses.replace(SMALL, experts=experts))
    arguments = ["moe", *TINY, "--out", str(tmp_path), "--experts", "8", "--tokens", "1", "5"]
    assert run.main(arguments) == 0
    [file] = tmp_path.glob("*-cpu-moe.json")
    one, five = json.loads(file.read_text())["rows"]
    assert (one["experts"], one["tokens"], one["impl"]) == (8, 1, "jax_mxfp4")
    assert (one["active_experts"], five["tokens"]) == (4, 5)
    for row in (one, five):
        assert row["calls"] % row["copies"] == 0
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
    printed = capsys.readouterr().out
    assert run.main(["report", str(file)]) == 0
    assert capsys.readouterr().out == printed


def event(metadata: int, microseconds: int) -> str:
    return f"events {{ metadata_id: {metadata} duration_ps: {microseconds * 10**6} }}"


def metadata(names: dict[int, str]) -> str:
    return "\n".join(
        f'event_metadata {{ key: {key} value {{ id: {key} name: "{name}" }} }}'
        for key, name in names.items()
    )


def test_a_profile_without_a_gpu_has_no_kernels():
    square = jax.jit(jnp.square)
    calls = []
    found = kernel_times.kernel_times(lambda: calls.append(0) or square(jnp.ones(4)), 2)
    assert len(calls) == 2
    if jax.default_backend() == "cpu":
        assert found == []
    else:
        assert found[0]["calls"] >= 1


def test_kernel_times_add_up_by_kind():
    names = {
        1: "loop_add_fusion_3",
        2: "loop_add_fusion",
        3: "void jax_mxfp4::gemm_tiled<64, 128>(float const*, int)",
        4: "sort_2_1",
        5: "jax_mxfp4::(anonymous namespace)::combine_kernel(float const*, int)",
    }
    text = f"""
    planes {{ name: "/device:GPU:0" {metadata(names)}
      lines {{ name: "Stream #13(Compute)" {event(1, 4)} {event(2, 6)} {event(3, 40)}
        {event(4, 2)} {event(5, 8)} }}
      lines {{ name: "XLA Modules" {event(3, 500)} }} }}
    planes {{ name: "/host:CPU" {metadata(names)} lines {{ name: "python" {event(1, 900)} }} }}
    """
    profile = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))
    assert kernel_times.summarize(profile, 2, 3) == [
        {"kernel": "gemm_tiled", "calls": 0.5, "us": 20.0},
        {"kernel": "loop_add_fusion", "calls": 1.0, "us": 5.0},
        {"kernel": "combine_kernel", "calls": 0.5, "us": 4.0},
        {"kernel": "other", "calls": 0.5, "us": 1.0},
    ]


def test_distance_of_logits():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((3, 5, 8)).astype(np.float32)
    tokens = rng.integers(0, 8, (3, 5))
    same = mini_accuracy._distance(exact, exact + 1, tokens)
    assert abs(same["kl"]) < 1e-6 and same["top1"] == 1
    p = np.exp(exact.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    chosen = np.take_along_axis(p[:, :-1], tokens[:, 1:, None], -1)
    assert same["perplexity"] == pytest.approx(np.exp(-np.log(chosen).mean()), rel=1e-4)
    uniform = mini_accuracy._distance(exact, np.zeros_like(exact), tokens)
    assert uniform["kl"] == pytest.approx((p * np.log(8 * p)).sum(-1).mean(), rel=1e-4)
    assert uniform["top1"] < 1 and uniform["perplexity"] == pytest.approx(8)


def test_accuracy_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mini_accuracy, "ROOT", tmp_path)  # without git
    logits = np.random.default_rng(1).standard_normal((2, 32, 1024)).astype(np.float32)
    monkeypatch.setattr(mini_accuracy, "decoded_logits", lambda model, tokens, form: logits[0])
    monkeypatch.setattr(mini_accuracy, "_window_logits", lambda model, windows: logits)
    monkeypatch.setattr(mini_accuracy, "WINDOW", 32)
    arguments = ["--context", "32", "--windows", "2", "--commit", "abc", "--out", str(tmp_path)]
    assert mini_accuracy.main(arguments) == 0
    [file] = tmp_path.glob("*-cpu-mini_accuracy.json")
    rows = json.loads(file.read_text())["rows"]
    cache, packing = ([r for r in rows if r["op"] == op] for op in ("cache", "packing"))
    assert [(r["name"], r["saved"]) for r in cache] == [
        ("bfloat16", 0),
        ("fp8", pytest.approx(0.484, abs=1e-3)),
        ("mxfp4", pytest.approx(0.734, abs=1e-3)),
    ]
    names = ["none", "attention", "embedding", "unembedding"]
    assert [r["name"] for r in packing] == [*names, " + ".join(names[1:])]
    assert packing[0]["bytes"] > packing[1]["bytes"] > packing[-1]["bytes"]
    assert "Packed matrices" in capsys.readouterr().out
