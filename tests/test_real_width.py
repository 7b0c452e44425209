"""The program that compares with transformers: what of it needs neither transformers nor a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_width

from jax_mxfp4.models.gpt_oss import GptOss
from jax_mxfp4.models.gpt_oss.released import released_config
from jax_mxfp4.models.gpt_oss.saving import save_params


def test_saved_model_is_loaded_again(tmp_path):
    config = real_width.two_layers(tiny=True)
    params = real_width.random_weights(config)
    save_params(tmp_path / "checkpoint", params, config)
    model = GptOss.from_pretrained(tmp_path / "checkpoint")
    assert model.config == config
    assert jax.tree.structure(model.params) == jax.tree.structure(params)
    for found, expected in zip(*map(jax.tree.leaves, (model.params, params)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_sizes_are_those_of_gpt_oss_20b():
    config, released = real_width.two_layers(tiny=False), released_config("20b")
    assert config.layer_types == ("sliding_attention", "full_attention")
    for size in ("hidden_size", "intermediate_size", "num_experts", "vocab_size", "head_dim"):
        assert getattr(config, size) == getattr(released, size)


@pytest.mark.parametrize(
    ("off", "noise", "passed"), [(0, 0, True), (2e-3, 0, False), (0, 1, False)]
)
def test_judge(off, noise, passed):
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((2, 3, 64)).astype(np.float32)
    logits, forced = expected.copy(), np.asarray(expected.astype(jnp.bfloat16), np.float32)
    logits[1, 2, 3] += off
    forced[0, 1] += noise * rng.standard_normal(64)
    assert real_width.judge(expected, logits, forced)["passed"] is passed
