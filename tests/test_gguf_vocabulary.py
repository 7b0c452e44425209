"""The vocabulary that llama.cpp reads, made of a tokenizer.json and made into one."""

import copy
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from jax_mxfp4.checkpoints import CheckpointError, GgufFile
from jax_mxfp4.checkpoints.gguf_vocabulary import (
    UnsupportedVocabularyError,
    tokenizer_from_metadata,
    vocabulary_metadata,
)
from jax_mxfp4.convert import convert
from jax_mxfp4.models.gpt_oss import load_tokenizer, mini_path, read_config

MINI = json.loads((mini_path() / "tokenizer.json").read_text())
VOCABULARY = vocabulary_metadata(MINI, {}, 1024)
TEXT = "Once upon a time, there was\n\n  naïve 日本 text: it's 2026!<|endoftext|> ABCdef"
FILE = Path("some.gguf")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# As in the tokenizer.json of openai/gpt-oss-20b.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": O200K}, "behavior": "Isolated", "invert": False}


def as_read(metadata: dict) -> dict:
    """Metadata as a reader returns it."""
    key = "tokenizer.ggml.token_type"
    return metadata | {key: np.array(metadata[key], np.int32)}


def with_rule(rule: str) -> dict:
    """The tokenizer with the steps that `rule` stands for."""
    steps = {"gpt-4o": [SPLIT, BYTE_LEVEL | {"use_regex": False}], "smollm": [DIGITS, BYTE_LEVEL]}
    return MINI | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps[rule]}}


def foreign(target: Path, metadata: dict | None = None) -> Path:
    """Write the model mini as another program would: with a vocabulary, no tokenizer.json."""
    convert(mini_path(), target.with_suffix(".own.gguf"))
    source = gguf.GGUFReader(target.with_suffix(".own.gguf"))
    writer = gguf.GGUFWriter(target, "gpt-oss")
    for key, field in source.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "jax_mxfp4.", "tokenizer.")):
            writer.add_key_value(key, field.contents(), field.types[0])
    for key, value in (VOCABULARY if metadata is None else metadata).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kind = (
                gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
            )
            writer.add_key_value(key, value, kind)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_what_llama_cpp_reads_is_in_the_file(tmp_path):
    source = shutil.copytree(mini_path(), tmp_path / "mini")
    names = {"bos_token": "<|endoftext|>", "pad_token": {"content": "!"}, "eos_token": None}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    convert(source, tmp_path / "mini.gguf")
    fields = {
        key: field.contents()
        for key, field in gguf.GGUFReader(tmp_path / "mini.gguf").fields.items()
    }
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens = sorted(MINI["model"]["vocab"], key=MINI["model"]["vocab"].get)
    assert fields["tokenizer.ggml.tokens"] == tokens
    assert fields["tokenizer.ggml.token_type"] == [3] + [1] * 1023
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MINI["model"]["merges"]]
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 0  # of the configuration
    assert fields["tokenizer.ggml.padding_token_id"] == MINI["model"]["vocab"]["!"]
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    convert(tmp_path / "mini.gguf", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_ids_without_a_token_and_added_tokens():
    changed = copy.deepcopy(MINI)
    changed["added_tokens"].append({"id": 1025, "content": "<extra>", "special": False})
    metadata = vocabulary_metadata(changed, {}, 1027)
    assert metadata["tokenizer.ggml.tokens"][1024:] == ["[PAD1024]", "<extra>", "[PAD1026]"]
    assert metadata["tokenizer.ggml.token_type"][1023:] == [1, 5, 4, 5]
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_from_metadata(FILE, as_read(metadata))))
    assert tokenizer.encode("a<extra>[PAD1024]").ids[1] == 1025
    assert tokenizer.token_to_id("[PAD1024]") is None


@pytest.mark.parametrize("rule", ["gpt-2", "gpt-4o", "smollm"])
def test_a_tokenizer_made_of_the_vocabulary_gives_the_same_tokens(rule):
    original = MINI if rule == "gpt-2" else with_rule(rule)
    metadata = vocabulary_metadata(original, {}, 1024)
    assert metadata["tokenizer.ggml.pre"] == rule
    made = Tokenizer.from_str(json.dumps(tokenizer_from_metadata(FILE, as_read(metadata))))
    wanted = Tokenizer.from_str(json.dumps(original)).encode(TEXT)
    assert made.encode(TEXT).ids == wanted.ids
    assert made.decode(wanted.ids) == TEXT.replace("<|endoftext|>", "")
    assert (made.encode(TEXT).ids == Tokenizer.from_str(json.dumps(MINI)).encode(TEXT).ids) == (
        rule == "gpt-2"
    )


def test_the_rule_of_gpt_oss_splits_as_tiktoken_documents():
    pre_tokenizer = pre_tokenizers.Split(Regex(O200K), "isolated")
    pieces = [
        piece for piece, _ in pre_tokenizer.pre_tokenize_str("I'm HelloWORLD 12345\n\n  x ...")
    ]
    assert pieces == ["I'm", " Hello", "WORLD", " ", "123", "45", "\n\n", " ", " x", " ..."]


def test_a_foreign_file_gets_a_tokenizer(tmp_path):
    file = foreign(tmp_path / "a.gguf", VOCABULARY | {"tokenizer.ggml.eos_token_id": 0})
    tokenizer = Tokenizer.from_file(str(mini_path() / "tokenizer.json"))
    assert load_tokenizer(file).encode(TEXT).ids == tokenizer.encode(TEXT).ids
    convert(file, tmp_path / "hf")
    assert load_tokenizer(tmp_path / "hf").encode(TEXT).ids == tokenizer.encode(TEXT).ids
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|endoftext|>"
    assert read_config(tmp_path / "hf").eos_token_ids == (0,)


def test_a_vocabulary_that_is_not_understood(tmp_path):
    file = foreign(tmp_path / "a.gguf", VOCABULARY | {"tokenizer.ggml.pre": "llama-bpe"})
    with pytest.raises(CheckpointError, match=r"a\.gguf: has no tokenizer\.json; .* 'llama-bpe'"):
        load_tokenizer(file)
    with pytest.warns(UserWarning, match=r"no tokenizer\.json is written: .*'llama-bpe'"):
        convert(file, tmp_path / "hf")
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_a_tokenizer_that_llama_cpp_does_not_have(tmp_path):
    source = shutil.copytree(mini_path(), tmp_path / "mini")
    (source / "tokenizer.json").write_text(json.dumps(MINI | {"normalizer": {"type": "NFC"}}))
    with pytest.warns(
        UserWarning, match="no vocabulary for llama.cpp, .* normalizer {'type': 'NFC'}"
    ):
        convert(source, tmp_path / "a.gguf")
    metadata = GgufFile(tmp_path / "a.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "none"
    assert load_tokenizer(tmp_path / "a.gguf").to_str() == load_tokenizer(source).to_str()


UNSUPPORTED = {
    "model": ({"model": {"type": "Unigram", "vocab": []}}, "expected byte-level BPE"),
    "no model": ({"model": None}, "expected byte-level BPE"),
    "bytes": ({"model": MINI["model"] | {"byte_fallback": True}}, "expected byte-level BPE"),
    "ids": ({"model": MINI["model"] | {"vocab": {"a": "b"}}}, "expected byte-level BPE"),
    "merges": ({"model": MINI["model"] | {"merges": [["a"]]}}, "expected byte-level BPE"),
    "unknown": ({"model": MINI["model"] | {"unk_token": "?"}}, r"unk_token '\?'"),
    "prefix": ({"pre_tokenizer": None}, "pre_tokenizer None"),
    "space": (
        {"pre_tokenizer": MINI["pre_tokenizer"] | {"add_prefix_space": True}},
        "pre_tokenizer {'add_prefix_space': True",
    ),
    "added": ({"added_tokens": [{"id": 5}]}, "expected added tokens"),
    "outside": ({"added_tokens": [{"id": 1024, "content": "x"}]}, r"1 tokens outside .* \['x'\]"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(case):
    changes, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedVocabularyError, match=message):
        vocabulary_metadata(MINI | changes, {}, 1024)


TOKENS = VOCABULARY["tokenizer.ggml.tokens"]
DAMAGED = {
    "tokens": ({"tokens": 5}, "'tokenizer.ggml.tokens': expected a list of strings, found 5"),
    "merges": ({"merges": None}, "'tokenizer.ggml.merges': expected a list of strings"),
    "merge": ({"merges": ["a b c"]}, "expected two tokens each, found 'a b c'"),
    "types": ({"token_type": np.zeros(3, np.int32)}, "expected a number for each of 1024 tokens"),
    "twice": ({"tokens": [*TOKENS[:-1], TOKENS[0]]}, "two tokens are the same"),
    "bytes": ({"tokens": [*TOKENS[:-1], "\udcff"]}, r"expected UTF-8, found '\\udcff'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_vocabulary(case):
    changes, message = DAMAGED[case]
    damage = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError, match=f"some.gguf: .*{message}"):
        tokenizer_from_metadata(FILE, as_read(VOCABULARY) | damage)
