"""One model in three layouts: the same packed arrays and the same logits, bit for bit."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_mxfp4.convert import convert
from jax_mxfp4.models.gpt_oss import GptOss, GptOssConfig, mini_path

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
TOKENS = np.arange(24).reshape(2, 12)


@pytest.fixture(params=["golden", "written", "mini"])
def layouts(request, tmp_path) -> list[Path]:
    """Hugging Face's layout, OpenAI's and GGUF; files of other programs, or written by this one."""
    if request.param == "golden":
        return [GOLDEN / "hf", GOLDEN / "original", GOLDEN / "tiny-mxfp4.gguf"]
    source = GOLDEN / "hf" if request.param == "written" else mini_path()
    convert(source, tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "openai", "openai")
    convert(tmp_path / "openai", tmp_path / "hf")
    return [source, tmp_path / "hf", tmp_path / "openai", tmp_path / "a.gguf"]


def comparable(config: GptOssConfig) -> GptOssConfig:
    """What computes the logits: OpenAI's files have no ids of end tokens, GGUF has float32."""
    return replace(config, eos_token_ids=(), rms_norm_eps=float(np.float32(config.rms_norm_eps)))


def test_same_parameters_and_logits(layouts):
    first, *others = (GptOss.from_pretrained(path, np.float32, "reference") for path in layouts)
    expected = first(TOKENS)
    leaves, structure = jax.tree.flatten(first.params)
    assert len(leaves) > 50
    for other in others:
        found, same_structure = jax.tree.flatten(other.params)
        assert same_structure == structure
        for one, two in zip(leaves, found, strict=True):
            np.testing.assert_array_equal(two, one, strict=True)
        assert comparable(other.config) == comparable(first.config)
        # The same configuration, so that it is compiled once.
        same = replace(other, config=first.config)
        np.testing.assert_array_equal(same(TOKENS), expected, strict=True)
