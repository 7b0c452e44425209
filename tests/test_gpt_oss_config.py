"""`config.json` in its dialects, and the rotary frequencies that follow from it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jax_mxfp4.checkpoints import CheckpointError
from jax_mxfp4.models.gpt_oss import GptOssConfig, YarnScaling, mini_path, read_config
from jax_mxfp4.models.gpt_oss.layers import rope_frequencies

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
TINY = GptOssConfig(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=8,
    experts_per_token=4,
    layer_types=("sliding_attention", "full_attention") * 2,
    sliding_window=8,
)


def changed(tmp_path: Path, layout: str, changes: dict, remove: tuple[str, ...] = ()) -> Path:
    """Writes a tiny config.json with `changes` applied and returns its folder."""
    data = json.loads((GOLDEN / layout / "config.json").read_text())
    data = {key: value for key, value in (data | changes).items() if key not in remove}
    (tmp_path / "config.json").write_text(json.dumps(data))
    return tmp_path


def test_both_dialects_describe_the_same_model():
    assert read_config(GOLDEN / "hf") == dataclasses.replace(TINY, eos_token_ids=(510, 511))
    assert read_config(GOLDEN / "original") == TINY


def test_mini():
    config = read_config(mini_path())
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (4, 128, 1024)
    assert config.rope_scaling == YarnScaling()
    assert config.eos_token_ids == (0,)


def test_transformers_5_rope_parameters(tmp_path):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 16,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
    }
    folder = changed(
        tmp_path, "hf", {"rope_parameters": rope, "swiglu_alpha": 2}, ("rope_scaling", "rope_theta")
    )
    config = read_config(folder)
    assert config.rope_theta == 10000.0
    assert config.swiglu_alpha == 2.0
    # transformers truncates where the key is absent.
    assert config.rope_scaling == YarnScaling(
        factor=8.0,
        original_max_position_embeddings=2048,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=True,
        attention_factor=1.5,
    )


@pytest.mark.parametrize("rope", [None, {"rope_type": "default"}])
def test_plain_rotary_embedding(tmp_path, rope):
    config = read_config(changed(tmp_path, "hf", {"rope_scaling": rope}))
    assert config.rope_scaling is None
    frequencies, scale = rope_frequencies(config)
    assert scale == 1.0
    np.testing.assert_allclose(frequencies, 150000.0 ** (-np.arange(16) / 16), rtol=1e-6)


def test_layer_types_default_to_the_released_pattern(tmp_path):
    folder = changed(tmp_path, "hf", {"num_hidden_layers": 3}, ("layer_types",))
    assert read_config(folder).layer_types == (
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    )


def test_harmony_vocabulary_implies_its_stop_tokens(tmp_path):
    folder = changed(tmp_path, "original", {"vocab_size": 201088})
    assert read_config(folder).eos_token_ids == (200002, 199999, 200012)


def test_openai_without_scaling(tmp_path):
    config = read_config(changed(tmp_path, "original", {"rope_scaling_factor": 1.0}))
    assert config.rope_scaling is None
    assert config.max_position_embeddings == 4096


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 0, -1.0])
def test_openai_factor_that_is_none(tmp_path, factor):
    folder = changed(tmp_path, "original", {"rope_scaling_factor": factor})
    with pytest.raises(CheckpointError, match="'rope_scaling_factor': expected a number above 0"):
        read_config(folder)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_every_bad_key_is_reported_at_once(tmp_path, layout):
    folder = changed(
        tmp_path,
        layout,
        {"vocab_size": "512", "hidden_size": 96.0, "head_dim": True, "sliding_window": 10**20},
        ("intermediate_size", "num_attention_heads"),
    )
    with pytest.raises(CheckpointError) as caught:
        read_config(folder)
    assert caught.value.where == str(folder / "config.json")
    assert set(caught.value.problems) == {
        "'vocab_size': expected int, found '512'",
        "'hidden_size': expected int, found 96.0",
        "'head_dim': expected int, found True",
        f"'sliding_window': expected at most {2**31 - 1}, found {10**20}",
        "'intermediate_size': missing, expected int",
        "'num_attention_heads': missing, expected int",
    }


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "llama"}, "'model_type': expected 'gpt_oss'"),
        ({"hidden_act": "gelu"}, "'hidden_act': expected 'silu'"),
        ({"attention_bias": False}, "'attention_bias': expected True"),
        ({"tie_word_embeddings": True}, "'tie_word_embeddings': expected False"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method': expected 'mxfp4'"),
        ({"quantization_config": 4}, "'quantization_config': expected dict"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type': expected 'yarn' or 'default'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'rope_scaling.factor': missing"),
        ({"layer_types": ["full_attention"]}, "'layer_types': expected 4 entries, found 1"),
        ({"layer_types": [1, 2, 3, 4]}, "'layer_types': expected a list of strings"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types: expected sliding_attention or"),
        ({"num_hidden_layers": 10**6, "layer_types": None}, "'num_hidden_layers': expected 1 to"),
        ({"hidden_size": 100}, "hidden_size: expected a multiple of 32, found 100"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads"),
        ({"experts_per_token": 9, "num_experts_per_tok": None}, "expected at most num_experts (8)"),
        ({"head_dim": 33}, "head_dim: expected an even number, found 33"),
        ({"sliding_window": 0}, "sliding_window: expected a number above 0, found 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number above 0, found nan"),
        ({"rope_theta": 1}, "rope_theta: expected a number above 1"),
        ({"eos_token_id": "a"}, "'eos_token_id': expected int or a list of int"),
        ({"eos_token_id": 512}, "eos_token_ids: expected ids below vocab_size (512)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_value(tmp_path, changes, problem):
    with pytest.raises(CheckpointError) as caught:
        read_config(changed(tmp_path, "hf", changes))
    assert problem in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_bad_generation_config(tmp_path):
    changed(tmp_path, "hf", {})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2.5]}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: 'eos_token_id'"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1', "\ufeff{}"])
def test_unusable_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        read_config(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        read_config(tmp_path)


def test_config_of_another_model(tmp_path):
    (tmp_path / "config.json").write_text('{"n_layer": 12}')
    with pytest.raises(CheckpointError, match="expected the keys of a GPT-OSS model"):
        read_config(tmp_path)


def test_frequencies_equal_those_of_transformers():
    oracle = np.load(GOLDEN / "hf_oracle.npz")
    frequencies, scale = rope_frequencies(TINY)
    np.testing.assert_allclose(frequencies, oracle["inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(scale, oracle["rope_attention_scaling"], rtol=1e-6)


def test_frequencies_of_the_released_models():
    config = dataclasses.replace(TINY, head_dim=64)
    frequencies, scale = rope_frequencies(config)
    plain = 150000.0 ** (-np.arange(32) / 32)
    # The ramp runs from 8.0928 to 17.3980 (derived by hand from the published constants).
    ramp = np.clip((np.arange(32) - 8.0928) / (17.3980 - 8.0928), 0, 1)
    np.testing.assert_allclose(frequencies, plain * (1 - ramp + ramp / 32), rtol=1e-4)
    np.testing.assert_allclose(scale, 1.3465736, rtol=1e-7)


def test_truncation_widens_the_ramp_to_whole_dimensions():
    config = dataclasses.replace(TINY, head_dim=64, rope_scaling=YarnScaling(truncate=True))
    frequencies, _ = rope_frequencies(config)
    plain = 150000.0 ** (-np.arange(32) / 32)
    ramp = np.clip((np.arange(32) - 8) / (18 - 8), 0, 1)
    np.testing.assert_allclose(frequencies, plain * (1 - ramp + ramp / 32), rtol=1e-6)
