"""What the compiled model contains: our custom calls, and never all experts decoded."""

import importlib
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jax_mxfp4.ffi import DISABLE_EXPORT_CHECKS
from jax_mxfp4.models.gpt_oss import (
    GptOss,
    GptOssConfig,
    abstract_params,
    attention,
    cudnn,
    mini_path,
)
from jax_mxfp4.models.gpt_oss.forward import decode_step, prefill

LAYERS, EXPERTS, HIDDEN, INNER = 2, 32, 192, 96
# Sizes chosen so that nothing but all experts together is as large as all experts.
CONFIG = GptOssConfig(
    vocab_size=512,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=EXPERTS,
    experts_per_token=4,
    layer_types=("sliding_attention", "full_attention"),
    sliding_window=8,
)
ALL_EXPERTS = EXPERTS * INNER * HIDDEN  # elements of `down`; `gate_up` has twice as many
TOKENS = jax.ShapeDtypeStruct((1, 16), jnp.int32)
# An array type in StableHLO (tensor<2x3xbf16>) or in HLO (bf16[2,3]).
STABLEHLO_TYPE = re.compile(r"tensor<((?:\d+x)*)(bf16|f16|f32|f64)>")
HLO_TYPE = re.compile(r"\b(bf16|f16|f32|f64)\[([\d,]*)\]")


def float_sizes(text: str) -> set[int]:
    """Returns the number of elements of every floating-point array in a program."""
    dimensions = [match[1].split("x")[:-1] for match in STABLEHLO_TYPE.finditer(text)]
    dimensions += [match[2].split(",") for match in HLO_TYPE.finditer(text)]
    return {math.prod(int(size) for size in sizes if size) for sizes in dimensions}


def abstract_model(dtype, implementation: str) -> GptOss:
    return GptOss(abstract_params(CONFIG, dtype), CONFIG, implementation)


def test_float_sizes_finds_arrays_of_both_dialects():
    assert float_sizes("tensor<2x3x4xbf16> tensor<f32> tensor<7xi32> f32[5,6]{1,0} u8[9]") == {
        24,
        1,
        30,
    }


@pytest.mark.usefixtures("kernels_registered")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cuda_program(dtype):
    exported = jax.export.export(
        jax.jit(lambda model, tokens: model(tokens)),
        platforms=["cuda"],
        disabled_checks=DISABLE_EXPORT_CHECKS,
    )(abstract_model(dtype, "cuda"), TOKENS)
    text = exported.mlir_module()
    assert len(re.findall(r"custom_call @jax_mxfp4_moe\b", text)) == LAYERS
    sizes = float_sizes(text)
    assert CONFIG.vocab_size * HIDDEN in sizes
    assert max(sizes) < ALL_EXPERTS


@pytest.mark.usefixtures("kernels_registered")
def test_cuda_programs_of_generation():
    model = abstract_model(jnp.bfloat16, "cuda")
    cache = jax.eval_shape(lambda: model.init_cache(1, 64))
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    start = jax.ShapeDtypeStruct((), jnp.int32)
    logits = jax.ShapeDtypeStruct((1, CONFIG.vocab_size), jnp.float32)
    static = {"config": CONFIG, "implementation": "cuda"}
    for function, args, options in (
        (prefill, (model.params, TOKENS, lengths, cache, start, None), static | {"context": 0}),
        (prefill, (model.params, TOKENS, lengths, cache, start, logits), static | {"context": 32}),
        (decode_step, (model.params, lengths, cache), static),
    ):
        text = jax.jit(function, static_argnames=tuple(options)).trace(*args, **options)
        text = text.lower(lowering_platforms=("cuda",)).as_text()
        assert len(re.findall(r"custom_call @jax_mxfp4_moe\b", text)) == LAYERS
        assert max(float_sizes(text)) < ALL_EXPERTS


@pytest.mark.usefixtures("kernels_registered")
@pytest.mark.parametrize(
    ("batch", "dots", "scatters"),
    [
        # Scores and values; products with one row are sums, and caches of one row are sliced.
        (1, 2 * LAYERS, 0),
        # Besides, qkv, out and the logits. Routers of few rows stay sums.
        (64, 4 * LAYERS + 1, 2 * LAYERS),
    ],
)
def test_a_decoding_step_does_no_more_than_it_must(batch, dots, scatters):
    """Each of these is a kernel or several, and a step is little else than its kernels."""
    model = abstract_model(jnp.bfloat16, "cuda")
    cache = jax.eval_shape(lambda: model.init_cache(batch, 64))
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = partial(decode_step, config=CONFIG, implementation="cuda")
    text = jax.jit(step).trace(model.params, tokens, cache)
    text = text.lower(lowering_platforms=("cuda",)).as_text()

    def count(operation: str) -> int:
        return len(re.findall(rf'= "?{operation}\b', text))

    assert count("stablehlo.dot_general") == dots
    assert count("stablehlo.scatter") == scatters
    assert count("stablehlo.dynamic_update_slice") == 2 * LAYERS - scatters
    assert count("stablehlo.sort") == count("chlo.top_k") == 0
    assert count("stablehlo.gather") == 1  # the embedding
    assert count("stablehlo.custom_call") == LAYERS
    # Halves that rotate; indices of scatters.
    assert count("stablehlo.concatenate") == 2 * LAYERS + scatters


@pytest.mark.usefixtures("kernels_registered")
def test_cuda_prefill_uses_flash_attention(monkeypatch):
    """As on a machine with a GPU: cuDNN itself is not asked before the program is compiled."""
    stablehlo = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(cudnn, "is_usable", lambda dtype, head_dim: True)
    monkeypatch.setattr(attention, "_FLASH_QUERIES", TOKENS.shape[1])
    model = abstract_model(jnp.bfloat16, "cuda")
    cache = jax.eval_shape(lambda: model.init_cache(1, 64))
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    start = jax.ShapeDtypeStruct((), jnp.int32)
    logits = jax.ShapeDtypeStruct((1, CONFIG.vocab_size), jnp.float32)
    # A function of its own: traces of `prefill` itself are kept from earlier tests.
    chunk = partial(prefill, context=32, config=CONFIG, implementation="cuda")
    jitted = jax.jit(lambda *args: chunk(*args))
    text = jitted.trace(model.params, TOKENS, lengths, cache, start, logits)
    text = text.lower(lowering_platforms=("cuda",)).as_text()
    # The full layer: the chunk itself, and what came before it.
    assert text.count("custom_call @__cudnn$fmhaSoftmax") == 2
    jitted = jax.jit(
        lambda *args: prefill(*args, None, context=0, config=CONFIG, implementation="cuda")
    )
    text = jitted.trace(model.params, TOKENS, lengths, cache, start)
    text = text.lower(lowering_platforms=("cuda",)).as_text()
    # The first chunk: both layers, one with a window.
    assert text.count("custom_call @__cudnn$fmhaSoftmax") == 2
    assert "sliding_window_length" in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cpu_program(dtype):
    lowered = jax.jit(lambda model, tokens: model(tokens)).lower(
        abstract_model(dtype, "reference"), TOKENS
    )
    assert max(float_sizes(lowered.as_text())) < ALL_EXPERTS
    # The compiler could still move the decoding out of the loop over experts.
    compiled = lowered.compile().as_text()
    assert max(float_sizes(compiled)) < ALL_EXPERTS
    assert "u8[32,192,6,16]" in compiled


def test_without_kernels_cuda_is_refused_before_loading(no_kernels):
    progress = []
    with pytest.raises(RuntimeError, match=no_kernels):
        GptOss.from_pretrained(
            mini_path(), implementation="cuda", progress=lambda *call: progress.append(call)
        )
    assert not progress


def test_unknown_implementation():
    with pytest.raises(ValueError, match="implementation must be"):
        GptOss.from_pretrained(mini_path(), implementation="triton")
