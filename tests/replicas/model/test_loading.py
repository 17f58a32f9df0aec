"""Loading: every architecture computes what transformers computes, and what we cannot serve is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Ranks, make_model, reference_logits, some_tokens, tiny_config
from transformers import AutoConfig

from quire.replicas.errors import ModelNotServable, QuireError
from quire.replicas.model.loading import check_servable
from quire.replicas.runner.shard import Shard

IDS = some_tokens(61)
CHUNKS = [37, 1, 1, 9, 13]  # odd chunks of a prompt, with single tokens between them
PAGES = [3, 1, 6, 2]

ONE_SHARD = [
    "llama",
    "llama_tied_bias",
    "mistral",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3_moe",
    "olmo2",
    "gpt_neox",
    "starcoder2",
    "apertus",
]


@pytest.mark.parametrize("name", ONE_SHARD)
def test_logits_are_those_of_transformers(name, tmp_path):
    folder = make_model(name, tmp_path)
    with Ranks(tiny_config(folder)) as ranks:
        got = ranks.run(IDS, CHUNKS, PAGES)
    torch.testing.assert_close(got, reference_logits(folder, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt_oss", "s_aux"),
        ("diffllama", "layer 0 calls attention more than once"),
        ("gptj", "cannot build GPTJForCausalLM"),
        ("mpt", "MptForCausalLM fails without a mask and a cache of its own"),
        ("stablelm", "does not pass keyword arguments"),
        ("bloom", r"layers \[0, 1\] .* keep no K and V that reach paged attention"),
    ],
)
def test_attention_that_we_do_not_implement_is_found_by_the_probe(name, reason, tmp_path):
    with pytest.raises(ModelNotServable, match=reason):
        Shard(tiny_config(make_model(name, tmp_path)))


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("mamba", {}, "linear_attention"),
        ("jamba", {}, "linear_attention"),
        ("qwen3_next", {}, "linear_attention"),
        ("llama4_text", {}, "chunked_attention"),
        ("deepseek_v3", {}, "multi-head latent attention"),
        ("t5", {}, "encoder-decoder"),
        ("bart", {}, "encoder-decoder"),
        ("gemma3", {}, "more than text"),
        ("gemma4_text", {}, "layers differ"),
        ("llama", {"is_causal": False}, "not causal"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "weights are quantized"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_with_the_reason(model_type, changes, reason):
    config = AutoConfig.for_model(model_type, **changes)
    with pytest.raises(ModelNotServable, match=reason):
        check_servable(config, 512)


def test_longrope_is_served_up_to_where_it_changes():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = AutoConfig.for_model("phi3", rope_parameters=rope, original_max_position_embeddings=256)
    check_servable(config, 256)
    with pytest.raises(ModelNotServable, match="set max_model_tokens to 256 or less"):
        check_servable(config, 257)


def test_a_checkpoint_in_several_files_loads(tmp_path):
    whole, split = make_model("llama", tmp_path / "whole"), tmp_path / "split"
    tensors = load_file(whole / "model.safetensors")
    split.mkdir()
    (split / "config.json").write_text((whole / "config.json").read_text())
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, split / file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with Ranks(tiny_config(whole)) as one, Ranks(tiny_config(split)) as two:
        assert torch.equal(one.run(IDS, [61], PAGES), two.run(IDS, [61], PAGES))
    (split / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotServable, match=r"lacks model-00002-of-00002\.safetensors"):
        Shard(tiny_config(split))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def transpose_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].T.contiguous()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, "model.safetensors is damaged or incomplete .* download it again"),
        (drop_tensor, "has no tensor model.layers.1.mlp.up_proj.weight"),
        (transpose_tensor, r"up_proj.weight has shape \(48, 80\) in the checkpoint and \(80, 48\)"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "holds no model.safetensors and no .*index.json; convert",
        ),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "nope"}'), "cannot read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_plain_words(harm, reason, tmp_path):
    folder = make_model("llama", tmp_path)
    harm(folder)
    with pytest.raises(QuireError, match=reason):
        Shard(tiny_config(folder))


def test_progress_runs_from_none_to_all(tmp_path):
    seen: list[tuple[int, int]] = []
    Shard(tiny_config(make_model("llama", tmp_path)), progress=lambda *at: seen.append(at))
    total = seen[0][1]
    assert seen == [(done, total) for done in range(total + 1)]


def test_weights_and_arithmetic_take_the_asked_type(tmp_path):
    folder = make_model("llama", tmp_path)
    with Ranks(tiny_config(folder, dtype="bfloat16")) as ranks:
        got = ranks.run(IDS, CHUNKS, PAGES)
    want = reference_logits(folder, IDS)
    assert got.dtype == torch.float32
    assert 1e-4 < (got - want).abs().max() < 0.3
