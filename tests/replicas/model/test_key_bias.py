"""Layers whose K bias a low-bit format could not hold get a transform of K, in any family and on any rank."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Ranks, make_model, reference_logits, some_tokens, tiny_config

from quire.kernels.formats import FORMATS, Transform
from quire.replicas.model.checkpoint import load_config
from quire.replicas.model.key_bias import AttentionCall, attention_calls, key_offset
from quire.replicas.model.loading import load_model
from quire.replicas.model.merged import merge_products
from quire.replicas.model.named_weights import NamedWeights

K_BIASES = {
    "qwen2": ("model.layers.1.self_attn.k_proj.bias", slice(None)),
    "llama_tied_bias": ("model.layers.1.self_attn.k_proj.bias", slice(None)),
    "starcoder2": ("model.layers.1.self_attn.k_proj.bias", slice(None)),
    "phi": ("model.layers.1.self_attn.k_proj.bias", slice(None)),
    "opt": ("model.decoder.layers.1.self_attn.k_proj.bias", slice(None)),
    "gpt2": ("transformer.h.1.attn.c_attn.bias", slice(128, 256)),  # Q, K and V in one, weights transposed
    "gpt_neox": ("gpt_neox.layers.1.attention.query_key_value.bias", slice(32, 64)),  # of the first head
}
"""Where a family keeps the bias of K, and K's rows of it."""


def with_k_bias(name: str, folder: Path, size: float = 200.0) -> Path:
    """A model whose second layer adds `size` to two channels of K heads, one up and one down."""
    make_model(name, folder)
    tensors = load_file(folder / "model.safetensors")
    tensor, rows = K_BIASES[name]
    bias = tensors[tensor][rows]
    bias[8], bias[9] = size, -size
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def offsets(folder: Path) -> list[float]:
    config = load_config(folder)
    with NamedWeights.open(folder, config) as weights:
        calls = calls_of(weights, config)
        return [key_offset(call, config, weights, 1) for call in calls]


def calls_of(weights, config) -> tuple[AttentionCall, ...]:
    loaded = load_model(
        weights, config, rank=0, tp=1, group=None, dtype=torch.float32, device=torch.device("cpu")
    )
    return loaded.calls


@pytest.mark.parametrize("name", K_BIASES)
def test_the_offset_is_the_bias_over_what_inputs_add(name, tmp_path):
    first, second = offsets(with_k_bias(name, tmp_path))
    assert first < 1
    assert 8 < second < 1000


@pytest.mark.parametrize("name", K_BIASES)
@pytest.mark.parametrize("kv", ["int8", "int4", "fp8", "fp32"])
def test_a_layer_that_a_format_would_not_resolve_is_shifted_and_scaled(name, kv, tmp_path):
    folder, ids = with_k_bias(name, tmp_path), some_tokens(40)
    with Ranks(tiny_config(folder, kv)) as ranks:
        got = ranks.run(ids, [40], [1, 2, 3]).log_softmax(-1)
        first, second = ranks.shards[0].layout.layers
    plain, stored = FORMATS[kv].k, Transform.IDENTITY if kv == "fp32" else Transform.AFFINE_HADAMARD
    assert (first.k, second.k) == (plain, replace(plain, transform=stored))
    assert (first.v, second.v) == (FORMATS[kv].v, FORMATS[kv].v)
    want = reference_logits(folder, ids).log_softmax(-1)
    assert (got - want).abs().mean() < {"int8": 0.1, "int4": 0.5, "fp8": 0.5, "fp32": 1e-4}[kv]


def test_small_biases_leave_the_format_alone(tmp_path):
    for name in K_BIASES:
        assert max(offsets(make_model(name, tmp_path / name))) < 1


def test_models_without_bias_are_not_even_probed(tmp_path):
    folder = make_model("llama", tmp_path)
    config = load_config(folder)
    with NamedWeights.open(folder, config) as weights:
        assert calls_of(weights, config) == ()


@pytest.mark.parametrize("name", ["qwen2", "starcoder2", "llama_tied_bias"])
@pytest.mark.parametrize("tp", [2, 4])
def test_every_rank_comes_to_the_same_layout_as_one_shard_alone(name, tp, tmp_path, caplog):
    folder, ids = with_k_bias(name, tmp_path), some_tokens(40)
    with caplog.at_level(logging.WARNING), Ranks(tiny_config(folder, "int8", tp=tp)) as ranks:
        ranks.run(ids, [40], [1, 2, 3])
        for shard in ranks.shards:
            assert [f.k.transform.affine for f in shard.layout.layers] == [False, True]
        assert len({shard.transforms_fingerprint for shard in ranks.shards}) == 1
        assert set(ranks.shards[0].info.kv_formats) == {("int8", "int8")}
    assert "keys of layers 1 have a large constant part" in caplog.text


def test_a_rank_of_several_reads_only_what_reaches_the_keys(tmp_path, monkeypatch):
    folder = with_k_bias("qwen2", tmp_path)
    config = load_config(folder)
    with NamedWeights.open(folder, config) as weights:
        loaded = load_model(
            weights, config, rank=1, tp=2, group=None, dtype=torch.float32, device=torch.device("cpu")
        )
        read: list[str] = []
        whole = NamedWeights.read
        monkeypatch.setattr(
            NamedWeights, "read", lambda self, name, *index: read.append(name) or whole(self, name, *index)
        )
        assert key_offset(loaded.calls[1], config, weights, 2) > 8
    assert sorted(read) == [f"model.layers.1.self_attn.k_proj.{leaf}" for leaf in ("bias", "weight")]


def test_the_probe_leaves_no_hooks(tmp_path):
    folder = make_model("opt", tmp_path)
    config = load_config(folder)
    with NamedWeights.open(folder, config) as weights:
        model = load_model(
            weights, config, rank=0, tp=1, group=None, dtype=torch.float32, device=torch.device("cpu")
        ).model
    assert attention_calls(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_merged_products_have_the_same_offset(tmp_path):
    folder = with_k_bias("qwen2", tmp_path)
    config = load_config(folder)
    with NamedWeights.open(folder, config) as weights:
        loaded = load_model(
            weights, config, rank=0, tp=1, group=None, dtype=torch.float32, device=torch.device("cpu")
        )
        before = key_offset(loaded.calls[1], config, weights, 1)
        merge_products(loaded.model)
        assert key_offset(loaded.calls[1], config, weights, 1) == pytest.approx(before, rel=1e-3)
