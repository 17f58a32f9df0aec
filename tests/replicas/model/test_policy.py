"""A policy's folder is read as it was written, and refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quire.kernels.formats import FORMATS, layer_formats
from quire.replicas.errors import ConfigError
from quire.replicas.model.calibration import calibrated_formats
from quire.replicas.model.policy import open_policy, save_policy

SHAPE = (2, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    formats = calibrated_formats(layer_formats("int4", 3), [0, 2])
    tensors = {
        "0.k.scale": torch.rand(SHAPE) + 0.5,
        "0.k.shift": torch.randn(SHAPE),
        "2.k.scale": torch.ones(SHAPE),
    }
    save_policy(tmp_path / "policy", formats, tensors, "abc", {"tokens": 7})
    return tmp_path / "policy"


def test_a_folder_is_read_as_it_was_written(folder: Path) -> None:
    policy = open_policy(str(folder), 3)
    assert policy.formats == calibrated_formats(layer_formats("int4", 3), [0, 2])
    assert sorted(policy.tensors) == ["0.k.scale", "0.k.shift", "2.k.scale"]
    policy.check(*SHAPE, "abc")


def test_a_policy_of_other_weights_or_other_heads_is_refused(folder: Path) -> None:
    policy = open_policy(str(folder), 3)
    with pytest.raises(ConfigError, match="calibrated on other weights"):
        policy.check(*SHAPE, "abd")
    with pytest.raises(ConfigError, match=r"kv heads of \(2, 32\), the model has \(4, 32\)"):
        policy.check(4, 32, "abc")


def test_a_name_a_mapping_and_a_json_file_are_policies_too(tmp_path: Path) -> None:
    sides = {"default": {"k": "int8", "v": "int4"}}
    (tmp_path / "mixed.json").write_text(json.dumps(sides))
    for kv in ("k8v4", sides, str(tmp_path / "mixed.json")):
        assert open_policy(kv, 2).formats == (FORMATS["k8v4"],) * 2


@pytest.mark.parametrize(
    ("kv", "message"),
    [("int3", "choose fp32, bf16.* or the path of a policy"), ("no/folder", "no KV policy at no/folder")],
)
def test_what_is_neither_a_format_nor_a_path_is_refused(kv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_policy(kv, 2)


def test_a_damaged_folder_is_refused_and_the_file_named(folder: Path) -> None:
    whole = (folder / "policy.json").read_text()
    for text, message in (
        ("{", "policy.json is not JSON"),
        ("[1]", "must hold a mapping"),
        ('{"version": 2, "weights": "", "formats": {}}', "of version 1; run `quire calibrate` again"),
        ('{"version": 1, "weights": "", "formats": 3}', '"formats" of'),
    ):
        (folder / "policy.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            open_policy(str(folder), 3)
    (folder / "policy.json").write_text(whole)
    for bad in (torch.zeros(SHAPE), torch.full(SHAPE, torch.nan), torch.ones(SHAPE).double()):
        save_file({"0.k.scale": bad}, folder / "transforms.safetensors")
        with pytest.raises(ConfigError, match=r"0\.k\.scale .* the file is damaged"):
            open_policy(str(folder), 3)
    (folder / "transforms.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"transforms\.safetensors cannot be read"):
        open_policy(str(folder), 3)
    (folder / "policy.json").unlink()
    with pytest.raises(ConfigError, match=r"policy\.json cannot be read: No such file"):
        open_policy(str(folder), 3)
