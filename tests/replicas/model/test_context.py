"""How long a sequence may be: by RoPE's scaling, under whatever key a config gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from quire.replicas.errors import ModelNotServable
from quire.replicas.model.checkpoint import load_config
from quire.replicas.model.context import context_length

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def lengths(folder: Path, **values: Any) -> tuple[int | None, int | None]:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "head_dim": 32, **values}))
    length = context_length(load_config(folder))
    return length.usual, length.most


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("given", "rope", "usual", "most"),
    [
        (64, {"rope_type": "default"}, 64, 64),
        (64, {**YARN, "original_max_position_embeddings": 64}, 256, 256),
        (64, YARN, 256, 256),  # transformers, too, then takes the length given for the one before
        (256, {**YARN, "original_max_position_embeddings": 64}, 256, 256),  # counted in already
        (80, {**YARN, "original_max_position_embeddings": 64}, 256, 256),
        (300, {**YARN, "original_max_position_embeddings": 64}, 300, 300),
        (64, {**YARN, "factor": 1.5}, 96, 96),
        (64, {"rope_type": "linear", "factor": 4.0}, 64, 256),  # published either way: who knows may ask
        (64, {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256),
        (512, {**LLAMA3, "original_max_position_embeddings": 64}, 512, 512),
    ],
)
def test_the_length_that_a_rope_scaling_reaches_is_served(key, given, rope, usual, most, tmp_path):
    theta = {"rope_theta": 1e4} if key == "rope_parameters" else {}
    assert lengths(tmp_path, max_position_embeddings=given, **{key: {**rope, **theta}}) == (usual, most)


def test_the_old_name_of_a_rope_type_is_known(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert lengths(tmp_path, max_position_embeddings=64, rope_scaling=scaling) == (256, 256)


def test_layers_with_rope_of_their_own_count_with_the_longest(tmp_path):
    rope = {
        "full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    values = {"model_type": "gemma3_text", "max_position_embeddings": 64, "rope_parameters": rope}
    assert lengths(tmp_path, **values) == (256, 256)


@pytest.mark.parametrize(("model_type", "key"), [("gpt2", "n_positions"), ("codegen", "n_positions")])
def test_a_length_under_another_key_is_found(model_type, key):
    assert context_length(AutoConfig.for_model(model_type, **{key: 77})).most == 77


def test_a_model_without_positions_has_no_length_of_its_own():
    assert context_length(AutoConfig.for_model("bloom")).most is None


@pytest.mark.parametrize("given", [0, -4])
def test_a_length_that_is_none_is_refused(given):
    config = AutoConfig.for_model("llama")
    config.max_position_embeddings = given
    with pytest.raises(ModelNotServable, match=f"max_position_embeddings {given}, which is no length"):
        context_length(config)


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 0.0, -2.0])
def test_a_factor_that_is_no_scaling_is_refused(factor, tmp_path):
    rope = {"rope_type": "linear", "factor": factor}
    with pytest.raises(ModelNotServable, match="factor"):
        lengths(tmp_path, max_position_embeddings=64, rope_parameters=rope)
