"""The commands `jax-mxfp4 eval ...`."""

import json
from pathlib import Path

import pytest
import shallow_mini

from jax_mxfp4 import cli

SHORT = ("--window", "32", "--max-tokens", "128", "--batch", "2")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The fire was low, and the old man sat by it without a word. " * 8)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow_mini.write(tmp_path_factory.mktemp("models") / "shallow")


def run(*arguments: object) -> int:
    return cli.run(["eval", *map(str, arguments)])


def test_perplexity_states_its_protocol(model: Path, text: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out.json"
    options = ("--implementation", "reference", "--against", "dense", "--json", output)
    judged = ("--model", model, "--text", text)
    assert run("perplexity", *judged, *SHORT, "--stride", 16, *options) == 0
    printed = capsys.readouterr().out
    for line in (
        "text: text.txt, as it is in the file",
        "window: 32",
        "stride: 16",
        "bos: none",
        "tokens_used: 128",
        "scored_tokens: 127",
    ):
        assert line in printed.splitlines()
    found = json.loads(output.read_text())
    assert found["text_bytes"] == text.stat().st_size
    reference, dense = found["rows"]
    assert dense["implementation"] == "dense"
    assert dense["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-5)
    assert abs(dense["relative_change"]) < 1e-5


def test_compare_writes_a_table_json_and_a_plot(
    model: Path, text: Path, tmp_path: Path, capsys
) -> None:
    output, plot = tmp_path / "out.json", tmp_path / "out.svg"
    formats = ("--formats", "bf16,mxfp6-e2m3,mxfp4-even,q4_k", "--weights", "attention")
    files = ("--json", output, "--plot", plot)
    assert run("compare", "--model", model, "--text", text, *SHORT, *formats, *files) == 0
    assert "mxfp4-even" in capsys.readouterr().out
    found = json.loads(output.read_text())
    base, bf16, mxfp6, mxfp4, q4_k = found["rows"]
    assert found["matrices"] == 4 and found["matrices_stored_as_mxfp4"] == 0
    assert bf16["sqnr_db"] is None and bf16["kl"] == 0  # bf16 is what the checkpoint holds
    assert 0 < mxfp6["kl"] < mxfp4["kl"]
    assert mxfp4["bits_per_weight"] == 4.25
    assert base["perplexity"] == bf16["perplexity"]
    assert "rows of 128" in q4_k["not_applicable"]
    assert "<svg" in plot.read_text()


def test_sensitivity_ranks(model: Path, text: Path, tmp_path: Path, capsys) -> None:
    output, plot = tmp_path / "out.json", tmp_path / "out.png"
    files = ("--json", output, "--plot", plot)
    options = ("--weights", "attention.out|router", "--by", "kind")
    judged = ("--model", model, "--text", text)
    assert run("sensitivity", *judged, *SHORT, *options, *files) == 0
    rows = json.loads(output.read_text())["rows"]
    kinds = {"layers.*.attention.out.weight", "layers.*.mlp.router.weight"}
    assert {row["part"] for row in rows} == kinds
    assert rows[0]["kl"] >= rows[1]["kl"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.index(rows[0]["part"]) > 0


def test_sqnr(tmp_path: Path, capsys) -> None:
    output = tmp_path / "out.json"
    assert run("sqnr", "--rows", 4, "--formats", "mxfp4-mse,nvfp4", "--json", output) == 0
    mse, nvfp4 = json.loads(output.read_text())["rows"]
    assert 18 < mse["gaussian"] < nvfp4["gaussian"] < 22
    assert "nvfp4" in capsys.readouterr().out


def test_divergence_exits_with_1_where_there_is_one(model: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out.json"
    short = ("--model", model, "--tokens", 32)
    assert run("divergence", *short, "--json", output) == 0
    assert json.loads(output.read_text())["first_divergence"] is None
    assert run("divergence", *short, "--tolerance", 1e-9) == 1
    assert "first_divergence: layers.0.attn_out" in capsys.readouterr().out


def test_device_reports_are_compared(tmp_path: Path, capsys) -> None:
    row = {
        "case": "c",
        "dtype": "float32",
        "implementation": "cuda",
        "sha256": "a",
        "sample": [1.0],
    }
    row |= {"relative_rms": 1e-7, "largest": 1e-6}
    files = []
    for device, digest in (("A", "x"), ("B", "x"), ("C", "y")):
        files.append(tmp_path / f"{device}.json")
        files[-1].write_text(json.dumps({"device": device, "rows": [{**row, "sha256": digest}]}))
    assert run("device-diff", files[0], files[1]) == 0
    assert "identical: 1 of 1" in capsys.readouterr().out
    assert run("device-diff", files[0], files[2]) == 1
    assert "c, float32, cuda" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["compare", "--formats", "int3"], 2, "'--formats': expected bf16, "),
        (["sensitivity", "--format", "int3"], 2, "'--format': expected bf16, "),
        (["sensitivity", "--by", "row"], 2, "'--by'"),
        (["device-report", "x", "--implementations", "tpu"], 2, "expected reference or cuda"),
        (["perplexity", "--window", "1"], 1, "window: expected at least 2"),
        (["perplexity", "--text", "/no/where"], 1, "/no/where"),
        (["perplexity", "--model", "/no/where"], 1, "/no/where"),
        (["compare", "--weights", "nothing"], 1, "'nothing' matches none"),
        (["device-diff", "/no/where", "/no/where"], 1, "/no/where"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], status: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("jax-mxfp4: error: ") and expected in line
