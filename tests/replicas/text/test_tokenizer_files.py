"""The files of a tokenizer: those and no others reach gateways, and a damaged one is named at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quire.replicas.engine.load import load_tokenizer
from quire.replicas.errors import ConfigError, ModelNotServable
from quire.replicas.model.checkpoint import find_model
from quire.replicas.text.tokenizer_files import has_tokenizer, open_tokenizer, read_tokenizer


@pytest.fixture
def demo(tmp_path) -> Path:
    return Path(shutil.copytree(find_model("demo"), tmp_path / "model"))


def test_the_files_of_a_tokenizer_make_the_same_tokenizer(demo, tmp_path):
    files = read_tokenizer(demo)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "config.json"}
    (copy := tmp_path / "copy").mkdir()
    for name, content in files.items():
        (copy / name).write_bytes(content)
    text = "The tokenizer of a gateway is the model's own."
    whole, made = load_tokenizer(str(demo)), AutoTokenizer.from_pretrained(copy)
    assert whole is not None
    assert made.encode(text) == whole.encode(text)
    assert made.chat_template == whole.chat_template


def test_what_trainers_leave_beside_is_not_taken(demo):
    before = read_tokenizer(demo)
    for name in ("trainer_state.json", "model.safetensors.index.json", "generation_config.json", "notes.txt"):
        (demo / name).write_text("{}" + " " * 1_000_000)
    (demo / "all_results.json").write_bytes(b" " * (70 << 20))
    (demo / "reward.model").write_bytes(b" ")
    assert read_tokenizer(demo) == before


@pytest.mark.parametrize(
    "name",
    [
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "vocab.json",
        "vocab.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
        "tokenizer.4.0.0.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ],
)
def test_whatever_transformers_reads_is_taken_with_its_place(name, demo):
    (demo / name).parent.mkdir(exist_ok=True)
    (demo / name).write_bytes(b"content")
    assert read_tokenizer(demo)[name] == b"content"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt", "spiece.model"])
def test_any_vocabulary_is_a_tokenizer(name, tmp_path):
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(b"")
    assert has_tokenizer(tmp_path)


def test_a_folder_without_one_is_told_what_gateways_need(tmp_path):
    assert open_tokenizer(tmp_path) is None
    with pytest.raises(ConfigError, match=r"holds no tokenizer\. Gateways need tokenizer\.json"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_that_no_message_holds_is_refused_with_its_largest_file(demo):
    (demo / "vocab.txt").write_bytes(b" " * (60 << 20))
    with pytest.raises(
        ConfigError, match=r"has 63,0\d\d,\d\d\d bytes, 62,914,560 of them in vocab\.txt; gateways"
    ):
        read_tokenizer(demo)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("tokenizer.json", cut, "tokenizer.json is damaged or cannot be read"),
        ("tokenizer.json", with_text(""), "tokenizer.json is damaged or cannot be read"),
        ("tokenizer.json", with_text("[1]"), "tokenizer.json holds no JSON object"),
        ("tokenizer.json", with_text("{}"), "tokenizer.json is no tokenizer"),
        (
            "tokenizer.json",
            with_text('{"model": {"type": "BPE", "vocab": [1]}}'),
            "tokenizer.json is no tokenizer",
        ),
        ("tokenizer_config.json", cut, "tokenizer_config.json is damaged or cannot be read"),
        ("tokenizer_config.json", with_text("[1]"), "tokenizer_config.json holds no JSON object"),
        ("tokenizer_config.json", with_text('{"eos_token": [1]}'), "cannot make a tokenizer of .* eos_token"),
        (
            "chat_template.jinja",
            lambda path: path.write_bytes(b"\xff\xfe"),
            "chat_template.jinja is damaged or cannot be read",
        ),
    ],
)
def test_a_damaged_file_is_named(name, harm, reason, demo):
    harm(demo / name)
    with pytest.raises(ModelNotServable, match=reason):
        load_tokenizer(str(demo))


def test_a_tokenizer_config_may_say_nothing(demo):
    (demo / "tokenizer_config.json").write_text(json.dumps({}))
    assert open_tokenizer(demo) is not None
