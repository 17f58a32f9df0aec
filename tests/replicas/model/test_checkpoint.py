"""Checkpoints: finding a model, reading parts of tensors, telling weights apart."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from transformers import AutoConfig

from quire.replicas.errors import ModelNotServable, UnknownModel
from quire.replicas.model.checkpoint import (
    Checkpoint,
    eos_token_ids,
    find_model,
    generation_values,
    load_config,
    read_json,
)


def test_the_demo_model_is_part_of_the_package():
    folder = find_model("demo")
    config = load_config(folder)
    assert (config.model_type, config.num_hidden_layers) == ("llama", 6)
    assert eos_token_ids(folder, config) == (2, 6)
    assert (folder / "README.md").is_file()


def test_a_folder_is_found_by_its_path(tmp_path):
    make_model("llama", tmp_path)
    assert find_model(str(tmp_path)) == tmp_path


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(UnknownModel, match=r"holds no config\.json"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("source", ["../no/such/folder", "a//b", "/no/such", "~/no/such", "./nothing"])
def test_a_path_that_leads_nowhere_is_no_such_folder(source):
    with pytest.raises(UnknownModel, match=r"no such folder: /"):
        find_model(source)


def test_a_hub_that_does_not_answer_is_told(monkeypatch):
    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr("quire.replicas.model.checkpoint.snapshot_download", offline)
    with pytest.raises(UnknownModel, match=r"no folder 'some/model' here, .*: no route to the hub$"):
        find_model("some/model")


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError])
def test_a_gated_or_private_model_asks_for_a_token(monkeypatch, kind):
    def refused(*args: object, **kwargs: object) -> str:
        raise kind("401", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("quire.replicas.model.checkpoint.snapshot_download", refused)
    with pytest.raises(UnknownModel, match=r"accept its terms at https://\S+/some/model and set HF_TOKEN"):
        find_model("some/model")


def test_only_the_files_we_use_are_downloaded(monkeypatch, tmp_path):
    asked: dict[str, object] = {}

    def download(source: str, **kwargs: object) -> str:
        asked.update(kwargs)
        return str(tmp_path)

    monkeypatch.setattr("quire.replicas.model.checkpoint.snapshot_download", download)
    assert find_model("some/model") == tmp_path
    assert not [p for p in asked["allow_patterns"] if p.endswith(("bin", "py", "pt"))]


def test_a_part_of_a_tensor_is_that_part(tmp_path):
    x = torch.arange(35.0).view(5, 7)
    save_file({"x": x, "scalar": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert "x" in checkpoint
        assert "y" not in checkpoint
        assert checkpoint.shape("x") == (5, 7)
        assert torch.equal(checkpoint.read("x"), x)
        assert torch.equal(checkpoint.read("x", (slice(1, 4),)), x[1:4])
        assert torch.equal(checkpoint.read("x", (slice(None), slice(2, 3))), x[:, 2:3])
        assert checkpoint.read("scalar") == 3


def tensors_of(folder: Path, named: object = None) -> set[str]:
    with Checkpoint.open(folder, named) as checkpoint:
        return set(checkpoint.slices)


def save(folder: Path, file: str, *names: str) -> None:
    save_file({name: torch.ones(2) for name in names}, folder / file)


def index(folder: Path, files: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_one_file_goes_before_an_index(tmp_path):
    save(tmp_path, "model.safetensors", "new")
    save(tmp_path, "model-00001-of-00001.safetensors", "old")
    index(tmp_path, {"old": "model-00001-of-00001.safetensors"})
    assert tensors_of(tmp_path) == {"new"}


def test_files_that_nobody_names_are_left_alone(tmp_path):
    for name in ("one", "two", "optimizer", "model_old"):
        save(tmp_path, f"{name}.safetensors", name)
    index(tmp_path, {"one": "one.safetensors", "two": "two.safetensors"})
    assert tensors_of(tmp_path) == {"one", "two"}


def test_the_file_that_the_config_names_is_read(tmp_path):
    save(tmp_path, "model.safetensors", "usual")
    save(tmp_path, "other.safetensors", "named")
    assert tensors_of(tmp_path, "other.safetensors") == {"named"}
    index(tmp_path, {"named": "other.safetensors"})
    assert tensors_of(tmp_path, "model.safetensors.index.json") == {"named"}


def test_a_folder_of_other_files_is_told_that_they_are_not_read(tmp_path):
    save(tmp_path, "consolidated.safetensors", "x")
    reason = r"holds no model\.safetensors and no .*index\.json \(transformers reads none of consol"
    with pytest.raises(ModelNotServable, match=reason):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"x": "../model.safetensors"},
            r"index\.json names the file \.\./model\.safetensors, which is outside",
        ),
        ({"x": "/etc/hostname"}, "names the file /etc/hostname, which is outside"),
        ({"x": "gone.safetensors"}, r"lacks gone\.safetensors, which model\.safetensors\.index\.json names"),
        ({"x": 5}, "lacks 5, which"),
        ({}, "holds no weight_map of tensors and files"),
        (["x"], "holds no weight_map of tensors and files"),
    ],
)
def test_an_index_that_names_no_files_of_the_folder_is_refused(files, reason, tmp_path):
    index(tmp_path, files)
    with pytest.raises(ModelNotServable, match=reason):
        Checkpoint.open(tmp_path)


def test_a_name_in_the_config_that_leaves_the_folder_is_refused(tmp_path):
    with pytest.raises(ModelNotServable, match=r"config\.json names the file \.\./x\.safetensors"):
        Checkpoint.open(tmp_path, "../x.safetensors")


DAMAGED = [b"", b"{", b"[1, 2]", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_damaged_file_is_named(name, content, tmp_path):
    make_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    readers = {"config.json": load_config, "generation_config.json": generation_values}
    with pytest.raises(ModelNotServable, match=f"{name} (is damaged|holds no JSON object)"):
        readers.get(name, Checkpoint.open)(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelNotServable, match=r"config\.json is damaged or cannot be read \(.*directory"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "many"},
        {"layer_types": 5},
        {"rope_scaling": "yarn"},
        {"quantization_config": 3},
    ],
    ids=str,
)
def test_a_config_of_wrong_kinds_is_refused_by_its_name(values, tmp_path):
    path = make_model("llama", tmp_path) / "config.json"
    path.write_text(json.dumps(read_json(path) | values))
    with pytest.raises(ModelNotServable, match=r"transformers cannot read .*config\.json"):
        load_config(tmp_path)


def fingerprint(folder: Path) -> bytes:
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.fingerprint


def test_the_fingerprint_tells_weights_and_configs_apart(tmp_path):
    one = make_model("llama", tmp_path / "one")
    shutil.copytree(one, tmp_path / "same")
    assert fingerprint(tmp_path / "same") == fingerprint(one)

    shutil.copytree(one, tmp_path / "tuned")
    tensors = load_file(one / "model.safetensors")
    save_file({n: t * 1.01 for n, t in tensors.items()}, tmp_path / "tuned" / "model.safetensors")
    assert fingerprint(tmp_path / "tuned") != fingerprint(one)

    shutil.copytree(one, tmp_path / "other_rope")
    config = AutoConfig.from_pretrained(one)
    config.rope_parameters["rope_theta"] = 77.0
    config.save_pretrained(tmp_path / "other_rope")
    assert fingerprint(tmp_path / "other_rope") != fingerprint(one)


def test_end_tokens_fall_back_to_the_config(tmp_path):
    config = AutoConfig.for_model("llama", eos_token_id=5)
    assert eos_token_ids(tmp_path, config) == (5,)
    config.eos_token_id = None
    assert eos_token_ids(tmp_path, config) == ()


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        ([2, 5000], (2,)),
        ([2, -1, 129, 130], (2, 129)),
        (5000, (7,)),
        (-1, (7,)),
        ("2", (7,)),
        (True, (7,)),
        ([True, 2, None, "3", [4], 5.0], (2,)),
        ({"a": 2}, (7,)),
    ],
    ids=str,
)
def test_end_tokens_that_are_none_are_left_out_with_a_warning(said, tokens, tmp_path, caplog):
    config = AutoConfig.for_model("llama", vocab_size=130, eos_token_id=7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    with caplog.at_level(logging.WARNING):
        assert eos_token_ids(tmp_path, config) == tokens
    assert f"{tmp_path / 'generation_config.json'}: eos_token_id is" in caplog.text
    assert "in the vocabulary of 130" in caplog.text


def test_end_tokens_of_the_config_are_looked_at_likewise(tmp_path, caplog):
    config = AutoConfig.for_model("llama", vocab_size=130, eos_token_id=[2, 5000])
    with caplog.at_level(logging.WARNING):
        assert eos_token_ids(tmp_path, config) == (2,)
    assert f"{tmp_path / 'config.json'}: eos_token_id is" in caplog.text


def test_end_tokens_that_are_right_are_taken_in_silence(tmp_path, caplog):
    config = AutoConfig.for_model("llama", vocab_size=130, eos_token_id=7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 129]}))
    assert eos_token_ids(tmp_path, config) == (2, 129)
    assert caplog.text == ""


def test_a_generation_config_that_is_a_broken_link_is_damage(tmp_path):
    (tmp_path / "generation_config.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelNotServable, match=r"generation_config\.json is damaged or cannot be read"):
        eos_token_ids(tmp_path, AutoConfig.for_model("llama", eos_token_id=5))


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    index = {"weight_map": {"a": "x" * 300 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotServable, match="names a file of 312 characters"):
        Checkpoint.open(tmp_path)
