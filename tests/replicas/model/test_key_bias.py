"""Layers whose K bias a low-bit format could not hold keep K in bf16, on every rank alike."""

from __future__ import annotations

import logging

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import Ranks, make_model, reference_logits, some_tokens, tiny_config

from quire.kernels.formats import Codes, layer_formats
from quire.replicas.model.checkpoint import Checkpoint
from quire.replicas.model.key_bias import bias_ratio, risky_key_layers


@pytest.fixture
def biased(tmp_path):
    """A model whose second layer adds a bias of 200 to two channels of one kv head's keys."""
    folder = make_model("qwen2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    bias = tensors["model.layers.1.self_attn.k_proj.bias"]
    bias[40], bias[41] = 200.0, -200.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_ratio_is_the_bias_over_a_typical_key(biased):
    with Checkpoint.open(biased) as checkpoint:
        assert bias_ratio(checkpoint, 0, 32) < 1
        assert 10 < bias_ratio(checkpoint, 1, 32) < 1000


@pytest.mark.parametrize(("kv", "layers"), [("int8", {1}), ("int4", {1}), ("fp8", {1}), ("bf16", set())])
def test_only_low_bit_keys_are_at_risk(biased, kv, layers):
    with Checkpoint.open(biased) as checkpoint:
        assert set(risky_key_layers(checkpoint, layer_formats(kv, 2), 32)) == layers


def test_models_without_bias_are_not_at_risk(tmp_path):
    with Checkpoint.open(make_model("llama", tmp_path)) as checkpoint:
        assert risky_key_layers(checkpoint, layer_formats("int4", 2), 32) == {}


def test_the_layout_changes_on_all_ranks_and_the_log_says_so(biased, caplog):
    ids = some_tokens(40)
    with caplog.at_level(logging.WARNING), Ranks(tiny_config(biased, "int8", tp=2)) as ranks:
        got = ranks.run(ids, [40], [1, 2, 3])
        for shard in ranks.shards:
            assert [f.k.codes for f in shard.layout.layers] == [Codes.INT8, Codes.BF16]
            assert [f.v.codes for f in shard.layout.layers] == [Codes.INT8, Codes.INT8]
        assert ranks.shards[0].info.kv_formats[1] == ("bf16", "int8")
    assert "layers 1 keep K in bf16" in caplog.text
    assert (got - reference_logits(biased, ids)).abs().mean() < 0.1
