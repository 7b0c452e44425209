"""Checksums of checkpoint files: what is recorded where, and what verify makes of it."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from jax_mxfp4.checkpoints import CheckpointError
from jax_mxfp4.checkpoints.checksums import record_checksums
from jax_mxfp4.convert import convert
from jax_mxfp4.inspection import verify

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
HF, GGUF = GOLDEN / "hf", GOLDEN / "tiny-mxfp4.gguf"
SHARD = "model-00001-of-00001.safetensors"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def records(path: Path) -> dict[str, dict[str, str]]:
    """File name -> what is recorded of it, as verify found it; the sums must be right."""
    found = verify(path).checksums
    assert all(one.found == sha256(one.file) for one in found)
    return {one.file.name: dict(one.recorded) for one in found}


def problems(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        verify(path)
    return caught.value.problems


@pytest.fixture
def hf(tmp_path) -> Path:
    return shutil.copytree(HF, tmp_path / "hf")


def flip_mantissa(file: Path) -> None:
    """Change the last tensor's last bit: a value that is as good as any."""
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def test_nothing_recorded():
    assert records(GGUF) == {GGUF.name: {}}
    assert records(HF) == {file.name: {} for file in HF.glob("*.safetensors")}


def test_conversions_record_what_they_write(tmp_path):
    convert(HF, tmp_path / "folder")
    written = {path.name for path in (tmp_path / "folder").iterdir()} - {"SHA256SUMS"}
    found = records(tmp_path / "folder")
    assert set(found) == written
    assert "config.json" in written
    for name, recorded in found.items():
        assert recorded == {"SHA256SUMS": sha256(tmp_path / "folder" / name)}

    convert(HF, tmp_path / "a.gguf")
    assert records(tmp_path / "a.gguf") == {
        "a.gguf": {"a.gguf.sha256": sha256(tmp_path / "a.gguf")}
    }


def test_sha256sum_reads_what_is_written(tmp_path):
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    convert(HF, tmp_path / "folder")
    convert(HF, tmp_path / "a.gguf")
    for folder, file in ((tmp_path / "folder", "SHA256SUMS"), (tmp_path, "a.gguf.sha256")):
        done = subprocess.run(
            ["sha256sum", "--check", "--strict", file], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(": OK\n") == len((folder / file).read_text().splitlines())


def test_files_that_have_changed(hf):
    record_checksums(hf)
    before = sha256(hf / SHARD)
    flip_mantissa(hf / SHARD)
    (hf / "config.json").write_text((hf / "config.json").read_text() + "\n")
    changed = problems(hf)
    assert len(changed) == 2
    assert changed[0].startswith("config.json: expected SHA-256 ")
    after = sha256(hf / SHARD)
    assert changed[1] == f"{SHARD}: expected SHA-256 {before} as in SHA256SUMS, found {after}"


def test_a_file_that_is_missing(hf):
    record_checksums(hf)
    (hf / "generation_config.json").unlink()
    assert problems(hf) == ("generation_config.json: missing file, listed in SHA256SUMS",)


@pytest.mark.parametrize("form", ["{sum}  {name}", "{sum} *{name}", "SHA256 ({name}) = {sum}"])
def test_other_forms_of_lists(hf, form):
    text = form.format(sum=sha256(hf / SHARD).upper(), name=SHARD)
    (hf / "SHA256SUMS").write_text(f"# made by hand\n\n{text}\n")
    assert records(hf)[SHARD] == {"SHA256SUMS": sha256(hf / SHARD)}
    assert records(hf)[SHARD.replace("00001-of", "00000-of")] == {}


@pytest.mark.parametrize(
    "line",
    [
        "no checksum",
        f"{'0' * 63}  {SHARD}",
        f"{'g' * 64}  {SHARD}",
        f"{'0' * 64}  ../hf/{SHARD}",
        f"{'0' * 64}  /etc/passwd",
        f"{'0' * 64}  a/../../b",
        f"{'0' * 64}  a\x1b[2J",
    ],
)
def test_damaged_lists(hf, line):
    (hf / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n{line}\n")
    (problem,) = problems(hf)
    assert problem.startswith("SHA256SUMS: line 2: expected a SHA-256 and the name of a file in")
    assert problem.isprintable()


def test_a_list_without_end(hf):
    with (hf / "SHA256SUMS").open("wb") as file:
        file.truncate(2**40)
    assert problems(hf) == ("SHA256SUMS: expected at most 16777216 bytes, found 1099511627776",)


def test_a_record_beside_one_file(hf, tmp_path):
    side = hf / f"{SHARD}.sha256"
    side.write_text(f"{sha256(hf / SHARD)}  {SHARD}\n")
    assert records(hf)[SHARD] == {side.name: sha256(hf / SHARD)}
    side.write_text(f"{'0' * 64}  another\n")
    assert problems(hf) == (f"{side.name}: expected the checksum of {SHARD}",)

    file = Path(shutil.copy(GGUF, tmp_path / "a.gguf"))
    (tmp_path / "SHA256SUMS").write_text(f"{sha256(file)}  a.gguf\n{'0' * 64}  something-else\n")
    assert records(file) == {"a.gguf": {"SHA256SUMS": sha256(file)}}


def test_what_the_hub_knows_of_downloaded_files(hf):
    folder = hf / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    metadata = folder / f"{SHARD}.metadata"
    metadata.write_text(f"{'a' * 40}\n{sha256(hf / SHARD)}\n1732270000.0\n")
    # Of small files the second line is no SHA-256.
    (folder / "model-00000-of-00001.safetensors.metadata").write_text(
        f"{'a' * 40}\n{'b' * 40}\n0\n"
    )
    found = records(hf)
    assert found[SHARD] == {metadata.name: sha256(hf / SHARD)}
    assert sum(map(bool, found.values())) == 1
    metadata.write_text(f"{'a' * 40}\n{'0' * 64}\n1732270000.0\n")
    (problem,) = problems(hf)
    assert problem.startswith(f"{SHARD}: expected SHA-256 {'0' * 64} as in {metadata.name}, found")


def test_files_in_the_cache_of_the_hub(hf, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in sorted(hf.iterdir()):
        digest = sha256(file) if file.suffix == ".safetensors" else "c" * 40
        blob = file.rename(blobs / f"{digest}{'' if len(digest) == 64 else file.name}")
        file.symlink_to(blob)
    found = records(hf)
    assert found[SHARD] == {"the name of its blob": sha256(hf / SHARD)}
    flip_mantissa(hf / SHARD)
    assert "as in the name of its blob" in problems(hf)[0]


def test_all_faults_are_listed(hf):
    record_checksums(hf)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config))
    content = bytearray((hf / SHARD).read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = "model.layers.3.mlp.experts.down_proj_scales"
    start = 8 + size + header[name]["data_offsets"][0]
    content[start] = 255
    (hf / SHARD).write_bytes(content)
    found = problems(hf)
    assert found[0].startswith("'layers.3.mlp.down': 1 of 1536 scales are NaN")
    assert [problem.split(":")[0] for problem in found[1:]] == ["config.json", SHARD]
