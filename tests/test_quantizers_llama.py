"""Layer by layer calibration of a `Llama`: what it gains, where it resumes, what folds."""

from operator import attrgetter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from flax import nnx

from flax_layers import MXFP4Dense, quantize_model
from jax_mxfp4.convert import convert
from jax_mxfp4.models.llama import Llama
from jax_mxfp4.quantizers import (
    GptqOptions,
    RotatedDense,
    calibrate_and_quantize,
    calibrated_packer,
    calibration_windows,
    fold_rotations,
    quantize_llama,
)

DRAW = np.random.default_rng(2)
CALIBRATION = DRAW.integers(0, tiny_llama.VOCABULARY, (40, 48), np.int32)
OPTIONS = GptqOptions(batch=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    file = tiny_llama.write_gguf(tmp_path_factory.mktemp("llama") / "tiny.gguf")
    return Llama.from_gguf(file)


def error(model: Llama, other: Llama) -> float:
    """Relative error of the logits on tokens that calibration has not seen."""
    wanted, found = (np.asarray(m(tiny_llama.TOKENS)) for m in (model, other))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_better_than_plain_rounding(model: Llama) -> None:
    plain, _ = quantize_model(model, r"layers\..*\.(q|k|v|out|gate|up|down)", scale_rule="mse")
    packed, reports = calibrate_and_quantize(model, CALIBRATION, OPTIONS)
    rotated, _ = quantize_llama(model, CALIBRATION, OPTIONS, rotate_inputs=r".*\.down")
    assert error(model, packed) < 0.7 * error(model, plain)
    assert error(model, rotated) < 0.7 * error(model, plain)
    assert [report.name for report in reports[:3]] == [
        f"layers.0.attention.{name}" for name in "qkv"
    ]
    assert len(reports) == 7 * tiny_llama.LAYERS
    assert all(15 < report.output_sqnr_db < 40 for report in reports)
    assert all(isinstance(block.mlp.down, MXFP4Dense) for block in packed.layers)
    assert all(isinstance(block.mlp.down, RotatedDense) for block in rotated.layers)
    assert all(isinstance(block.mlp.down, nnx.Linear) for block in model.layers)


def test_a_killed_run_goes_on(model: Llama, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(name: str, done: int, total: int) -> None:
        assert total == 7 * tiny_llama.LAYERS
        if name == "layers.1.attention.out":
            assert done == 11
            raise Killed

    options = GptqOptions(batch=20, scale_rule="mse")
    arguments = {"follow_original": False, "rotate_inputs": r".*\.down"}
    whole, _ = quantize_llama(model, CALIBRATION, options, **arguments)
    with pytest.raises(Killed):
        quantize_llama(
            model, CALIBRATION, options, **arguments, checkpoint=tmp_path / "run", progress=kill
        )
    resumed, reports = quantize_llama(
        model, CALIBRATION, options, **arguments, checkpoint=tmp_path / "run"
    )
    assert {report.name.split(".")[1] for report in reports} == {"1"}
    np.testing.assert_array_equal(resumed(tiny_llama.TOKENS), whole(tiny_llama.TOKENS))
    again, reports = quantize_llama(
        model, CALIBRATION, options, **arguments, checkpoint=tmp_path / "run"
    )
    assert not reports
    np.testing.assert_array_equal(again(tiny_llama.TOKENS), whole(tiny_llama.TOKENS))

    with pytest.raises(ValueError, match=r"other settings; damping: found 0\.01, now 0\.1"):
        quantize_llama(
            model,
            CALIBRATION,
            GptqOptions(batch=20, scale_rule="mse", damping=0.1),
            **arguments,
            checkpoint=tmp_path / "run",
        )


def test_a_folder_with_other_things_is_refused(model: Llama, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").touch()
    with pytest.raises(ValueError, match="expected a new or resumable folder"):
        quantize_llama(model, CALIBRATION, checkpoint=tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_folded_rotations_change_nothing_but_the_weights(tied: bool, tmp_path: Path) -> None:
    model = Llama.from_gguf(tiny_llama.write_gguf(tmp_path / "tiny.gguf", tied=tied))
    folded = fold_rotations(model)
    assert error(model, folded) < 1e-5
    before, after = (m.layers[0].attention.out.kernel[...] for m in (model, folded))
    assert np.abs(np.asarray(before) - np.asarray(after)).max() > 0.01
    np.testing.assert_allclose(jnp.linalg.norm(before), jnp.linalg.norm(after), rtol=1e-5)
    packed, _ = quantize_model(folded, r"layers\..*\.(q|k|v|out|gate|up|down)", scale_rule="mse")
    assert 0.02 < error(model, packed) < 0.5


def test_packed_models_are_refused(model: Llama) -> None:
    packed, _ = quantize_model(model, r"layers\.1\.mlp\.up")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up: expected nnx.Linear"):
        quantize_llama(packed, CALIBRATION)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up: expected a dense layer"):
        fold_rotations(packed)


def test_bad_arguments(model: Llama) -> None:
    with pytest.raises(ValueError, match="tokens: expected"):
        quantize_llama(model, CALIBRATION[0])
    with pytest.raises(ValueError, match=r"rotate_inputs: 'down' matches none of layers\.0\."):
        quantize_llama(model, CALIBRATION, rotate_inputs="down")
    with pytest.raises(ValueError, match=r"rotate_inputs: '\(' is no regular expression"):
        quantize_llama(model, CALIBRATION, rotate_inputs="(")
    with pytest.raises(TypeError, match="model: expected a Llama or a GPT-OSS model, found int"):
        calibrate_and_quantize(1, CALIBRATION)  # type: ignore[call-overload]
    for options in ({"scale_rule": "best"}, {"damping": -1.0}, {"batch": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            GptqOptions(**options)


def test_windows_are_spread_over_the_text() -> None:
    windows = calibration_windows(np.arange(1000), 10, 4)
    assert windows.shape == (4, 10) and windows.dtype == np.int32
    assert windows[0, 0] == 0 and windows[-1, -1] == 999
    np.testing.assert_array_equal(np.diff(windows), 1)
    with pytest.raises(ValueError, match="ids: expected at least 4 x 300 tokens"):
        calibration_windows(np.arange(1000), 300, 4)


def test_from_a_checkpoint(tmp_path: Path) -> None:
    """Converting with calibration gives what calibration in memory gives."""
    source = Path(__file__).parent / "golden" / "tiny-llama-mxfp4" / "bf16"
    tokens = CALIBRATION[:20] % 96
    wanted, _ = quantize_llama(Llama.from_pretrained(source), tokens, OPTIONS)
    with calibrated_packer(source, tokens, OPTIONS) as pack:
        convert(source, tmp_path / "packed", pack=pack)
        with pytest.raises(ValueError, match="lm_head: expected a weight that was calibrated"):
            pack("lm_head", np.zeros((96, 64), np.float32))
    found = Llama.from_pretrained(tmp_path / "packed")
    for left, right in zip(found.layers, wanted.layers, strict=True):
        for part in (attrgetter("attention.out"), attrgetter("mlp.gate")):
            np.testing.assert_array_equal(part(left).weight.blocks, part(right).weight.blocks)
            np.testing.assert_array_equal(part(left).weight.scales, part(right).weight.scales)
