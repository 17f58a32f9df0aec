"""Checkpoints: finding a model, reading parts of tensors, telling weights apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from transformers import AutoConfig

from quire.replicas.errors import UnknownModel
from quire.replicas.model.checkpoint import Checkpoint, eos_token_ids, find_model, load_config


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


@pytest.mark.parametrize("source", ["../no/such/folder", "a//b", "/no/such/folder"])
def test_a_name_that_is_nothing_is_unknown(source):
    with pytest.raises(UnknownModel, match='neither a local folder nor "demo"'):
        find_model(source)


def test_a_hub_that_does_not_answer_is_told(monkeypatch):
    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr("quire.replicas.model.checkpoint.snapshot_download", offline)
    with pytest.raises(UnknownModel, match=r"hub did not give it: no route to the hub$"):
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
