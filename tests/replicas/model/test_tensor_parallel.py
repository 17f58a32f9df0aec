"""Tensor parallelism: shards together compute what one computes, and each reads only its part."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Ranks, make_model, reference_logits, some_tokens, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from quire.replicas.errors import ConfigError, ModelNotServable
from quire.replicas.model.checkpoint import Checkpoint
from quire.replicas.model.loading import load_model
from quire.replicas.model.named_weights import NamedWeights
from quire.replicas.model.tensor_parallel import ShardPlan, shard_config

IDS = some_tokens(61)
CHUNKS = [37, 1, 1, 9, 13]
PAGES = [3, 1, 6, 2]

SHARDED = [
    ("llama", 2),
    ("llama", 4),  # two kv heads: each on two ranks; a vocabulary that four do not divide
    ("llama_tied_bias", 2),
    ("mistral", 2),
    ("qwen2", 2),
    ("qwen3", 2),
    ("phi3", 2),
    ("gemma2", 2),
    ("mixtral", 2),
    ("qwen2_moe", 2),  # an MLP whose shared expert the plan leaves whole
]


@pytest.mark.parametrize(("name", "tp"), SHARDED)
def test_shards_together_give_the_logits_of_transformers(name, tp, tmp_path):
    folder = make_model(name, tmp_path)
    with Ranks(tiny_config(folder, tp=tp)) as ranks:
        got = ranks.run(IDS, CHUNKS, PAGES)
        assert ranks.shards[0].layout.kv_heads == max(2 // tp, 1)
    torch.testing.assert_close(got, reference_logits(folder, IDS), atol=1e-4, rtol=0)


def test_bf16_arithmetic_is_summed_over_the_ranks(tmp_path):
    folder = make_model("llama", tmp_path)
    with Ranks(tiny_config(folder, tp=2, dtype="bfloat16")) as ranks:
        got = ranks.run(IDS, CHUNKS, PAGES)
    assert (got - reference_logits(folder, IDS)).abs().max() < 0.3


@pytest.mark.parametrize(
    ("changes", "tp", "reason"),
    [
        ({}, 3, "does not fit 4 query heads and 2 kv heads"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 96},
            6,
            "possible are 1, 2, 4, 12",
        ),
        ({"intermediate_size": 81}, 2, r"does not divide the model's intermediate_size \(81\)"),
    ],
)
def test_a_tp_that_does_not_fit_is_refused_with_the_numbers(changes, tp, reason):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80, "hidden_size": 96}
    with pytest.raises(ConfigError, match=reason):
        shard_config(AutoConfig.for_model("llama", **{**sizes, **changes}), tp)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("olmo2", r"q_norm.weight has shape \(128,\) .* set tp to 1"),
        ("gpt_neox", "set tp to 1"),
        ("opt", "no tensor-parallel plan for opt models; set tp to 1"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(name, reason, tmp_path):
    folder = make_model(name, tmp_path)
    with pytest.raises(ModelNotServable, match=reason):
        load(folder, rank=1, tp=2)


def load(folder, rank, tp):
    config = AutoConfig.from_pretrained(folder)
    with NamedWeights.open(folder, config) as weights:
        return load_model(
            weights,
            config,
            rank=rank,
            tp=tp,
            group=None,
            dtype=torch.float32,
            device=torch.device("cpu"),
        ).model


def plan_of(model_type: str, rank: int, tp: int, **sizes: int) -> ShardPlan:
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shard_config(config, tp))
    return ShardPlan.of(model, config, rank, tp)


SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}


@pytest.mark.parametrize(("rank", "start"), [(0, 0), (1, 0), (2, 16), (3, 16)])
def test_a_kv_head_goes_to_the_ranks_of_its_queries(rank, start):
    plan = plan_of("llama", rank, 4, **SIZES)
    name = "model.layers.0.self_attn.{}_proj.weight"
    assert plan.ranges(name.format("k"), (32, 64), (16, 64)) == (0, (slice(start, start + 16),))
    assert plan.ranges(name.format("q"), (128, 64), (32, 64)) == (0, (slice(32 * rank, 32 * rank + 32),))
    assert plan.ranges(name.format("o"), (64, 128), (64, 32)) == (1, (slice(32 * rank, 32 * rank + 32),))


def test_a_fused_projection_is_cut_segment_by_segment():
    plan = plan_of("phi3", 1, 2, pad_token_id=0, **SIZES)
    qkv = plan.ranges("model.layers.0.self_attn.qkv_proj.weight", (192, 64), (96, 64))
    assert qkv == (0, (slice(64, 128), slice(144, 160), slice(176, 192)))
    gate_up = plan.ranges("model.layers.0.mlp.gate_up_proj.weight", (192, 64), (96, 64))
    assert gate_up == (0, (slice(48, 96), slice(144, 192)))


def test_a_rank_reads_only_its_part(tmp_path, monkeypatch):
    folder = make_model("llama", tmp_path)
    numbers: dict[str, int] = {}
    read = Checkpoint.read

    def counted(self, name, index=()):
        part = read(self, name, index)
        numbers[name] = part.numel()
        return part

    monkeypatch.setattr(Checkpoint, "read", counted)
    load(folder, rank=1, tp=2)
    layer = "model.layers.1."
    assert numbers[layer + "self_attn.q_proj.weight"] == 128 * 48 // 2
    assert numbers[layer + "self_attn.o_proj.weight"] == 128 * 48 // 2
    assert numbers[layer + "mlp.down_proj.weight"] == 80 * 48 // 2
    assert numbers["lm_head.weight"] == 130 * 48 // 2


def test_the_bias_of_a_summed_layer_is_kept_by_one_rank(tmp_path):
    folder = make_model("llama_tied_bias", tmp_path)
    first, second = (load(folder, rank, 2).model.layers[0] for rank in (0, 1))
    assert first.self_attn.o_proj.bias.abs().min() > 0
    assert second.self_attn.o_proj.bias.abs().max() == 0
    assert second.self_attn.q_proj.bias.abs().min() > 0
    assert second.mlp.up_proj.bias.shape == (40,)
