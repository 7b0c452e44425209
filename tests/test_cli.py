"""The `jax-mxfp4` command: its output and its errors."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jax_mxfp4
from jax_mxfp4 import cli, cli_models, doctor
from jax_mxfp4.models.gpt_oss.builtin import BUILTIN_MODELS, mini_path

GOLDEN = Path(__file__).parent / "golden"
# Of the model mini, which is quicker, and of the one that is the default; no tie is near.
CONTINUATION = "Once upon a time, and the fire of the fire"
DEFAULT_CONTINUATION = "Once upon a time, I was in the habit of"
MINI = ("--model", "mini")
SHORT = ("--max-new-tokens", "9")


def test_main_job_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(jax_mxfp4.__file__).parents[1]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process may hold most of a GPU
    }
    process = subprocess.run(
        [sys.executable, "-m", "jax_mxfp4", "generate", "Once upon a time", *SHORT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == DEFAULT_CONTINUATION + "\n"
    loaded = "loaded the built-in model books-11m (10,803,924 parameters, float32)"
    assert loaded in process.stderr
    assert "9 tokens: " in process.stderr
    assert "tokens/s" in process.stderr


def test_a_model_is_a_built_in_name_or_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(model: str) -> str:
        assert cli.run(["generate", "Once upon a time", *SHORT, "--model", model]) == 0
        captured = capsys.readouterr()
        assert captured.out == CONTINUATION + "\n"
        return captured.err.partition("loaded ")[2].partition(" (")[0]

    assert cli_models.BUILTIN == BUILTIN_MODELS
    monkeypatch.chdir(tmp_path)
    assert loaded("mini") == "the built-in model mini"
    assert loaded(str(mini_path())) == str(mini_path())
    shutil.copytree(mini_path(), "mini")
    assert loaded("mini") == "mini"  # what is there comes first


def test_text_appears_on_a_terminal_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            writes.append(text)
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.run(["generate", "Once upon a time", *SHORT, *MINI]) == 0
    assert len(writes) == 10  # one for each token, and the end of the line
    assert writes[0].startswith("Once upon a time")
    assert "".join(writes) == CONTINUATION + "\n"


def test_seed_decides_sampled_text(capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: str) -> str:
        drawn = ["--temperature", "1", "--seed", seed]
        assert cli.run(["generate", "The", *SHORT, *MINI, *drawn]) == 0
        return capsys.readouterr().out

    assert sample("1") == sample("1")
    assert sample("1") != sample("2")


def test_more_of_the_model_can_be_packed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cache-format", "fp8", "--pack", "embedding", "--pack", "unembedding"]
    assert cli.run(["generate", "Once upon a time", "--max-new-tokens", "2", *MINI, *options]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate"], "Missing argument"),
        (["generate", ""], "'PROMPT': expected text, found an empty string"),
        (["generate", "\udcff"], r"'PROMPT': expected text in UTF-8, found '\udcff'"),
        (["generate", "x", "--max-new-tokens", "0"], "expected at least 1, found 0"),
        (["generate", "x", "--temperature", "-1"], "expected 0 or a positive number, found -1.0"),
        (["generate", "x", "--temperature", "nan"], "expected 0 or a positive number, found nan"),
        (["generate", "x", "--temperature", "warm"], "'--temperature'"),
        (["generate", "x", "--top-p", "0"], "expected above 0 and at most 1, found 0.0"),
        (["generate", "x", "--top-p", "1.5"], "expected above 0 and at most 1, found 1.5"),
        (["generate", "x", "--seed", "-1"], "expected 0 to 4294967295, found -1"),
        (["generate", "x", "--dtype", "int8"], "'--dtype'"),
        (["generate", "x", "--implementation", "tpu"], "'--implementation'"),
        (["generate", "x", "--cache-format", "int8"], "'--cache-format'"),
        (
            ["generate", "x", "--pack", "router"],
            "expected attention, embedding, unembedding, found",
        ),
        (
            ["generate", "x", "--model", "/no/where"],
            "expected a checkpoint, books-11m or mini, found nothing at /no/where",
        ),
        (["generate", "x", "--tokenizer", __file__], "expected a folder, found a file at /"),
        (["generate", "x", "--tokenizer", "/no/where"], "found nothing at /no/where"),
        (["generate", "x", "--unknown"], "--unknown"),
        (["unknown"], "unknown"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("jax-mxfp4: error: ")
    assert expected in line


def _without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def _without_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json"


def _truncated(folder: Path) -> str:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    return file.name


def _empty_config(folder: Path) -> str:
    (folder / "config.json").write_text("{}")
    return "config.json"


@pytest.mark.parametrize("damage", [_without_config, _without_tokenizer, _truncated, _empty_config])
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(
    damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(mini_path(), folder)
    name = damage(folder)
    assert cli.run(["generate", "x", "--model", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if not line.startswith("loaded ")]
    assert len(errors) == 1
    assert errors[0].startswith("jax-mxfp4: error: ")
    assert name in errors[0]


def test_more_tokens_than_the_model_supports(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "x", "--max-new-tokens", "131072", *MINI]) == 1
    assert "the model supports 131072" in capsys.readouterr().err.splitlines()[-1]


def test_traceback_on_request() -> None:
    folder = str(GOLDEN)  # a folder, but no checkpoint
    with pytest.raises(ValueError, match=r"config\.json"):
        cli.run(["--traceback", "generate", "x", "--model", folder])


def test_cuda_is_refused_before_loading_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "default_implementation", lambda: "reference")
    monkeypatch.setattr(doctor, "lacking", lambda _: ["No CUDA kernels: built without them."])
    assert cli.run(["generate", "x", "--implementation", "cuda"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--implementation cuda: No CUDA kernels: built without them." in line


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["generate", "--help"], ["doctor", "--help"]]
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 0
    assert "Usage: jax-mxfp4" in capsys.readouterr().out
