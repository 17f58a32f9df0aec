"""A checkpoint by the model's names: transformers' conversions and ties, and what does not fit is said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Ranks, make_model, reference_logits, some_tokens, tiny_config
from transformers import AutoConfig, PreTrainedModel

from quire.replicas.errors import ModelNotServable
from quire.replicas.model.checkpoint import Checkpoint, load_config
from quire.replicas.model.loading import load_model
from quire.replicas.model.named_weights import NamedWeights
from quire.replicas.runner.shard import Shard

IDS = some_tokens(23)


def change(folder: Path, by) -> Path:
    tensors = load_file(folder / "model.safetensors")
    by(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def say_tied(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    config.save_pretrained(folder)


def load(folder: Path, rank: int, tp: int) -> PreTrainedModel:
    config = load_config(folder)
    with NamedWeights.open(folder, config) as weights:
        return load_model(
            weights, config, rank=rank, tp=tp, group=None, dtype=torch.float32, device=torch.device("cpu")
        ).model


def logits(folder: Path, tp: int = 1) -> torch.Tensor:
    with Ranks(tiny_config(folder, tp=tp)) as ranks:
        return ranks.run(IDS, [len(IDS)], [3, 1])


@pytest.mark.parametrize("tp", [1, 2])
def test_a_head_of_its_own_is_used_though_the_config_says_tied(tp, tmp_path, caplog):
    folder = make_model("llama", tmp_path)
    say_tied(folder)
    with caplog.at_level(logging.WARNING):
        got = logits(folder, tp)
    torch.testing.assert_close(got, reference_logits(folder, IDS), atol=1e-4, rtol=0)
    told = [record.message for record in caplog.records if "a lm_head.weight of its own" in record.message]
    assert len(told) == 1
    assert str(folder / "config.json") in told[0]


@pytest.mark.parametrize(("rank", "tp"), [(0, 1), (1, 2)])
def test_a_head_like_the_table_is_the_table(rank, tp, tmp_path, caplog):
    folder = make_model("llama", tmp_path)
    say_tied(folder)
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    with caplog.at_level(logging.WARNING):
        model = load(folder, rank, tp)
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    assert torch.equal(head, table[-len(head) :])
    assert head.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
    assert "of its own" not in caplog.text


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tied_table_that_is_saved_as_the_head_is_found(tp, tmp_path):
    folder = make_model("llama", tmp_path, tie_word_embeddings=True)
    change(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    got = logits(folder, tp)
    torch.testing.assert_close(got, reference_logits(folder, IDS), atol=1e-4, rtol=0)


def test_an_untied_head_that_is_not_there_is_missing(tmp_path):
    folder = change(make_model("llama", tmp_path), lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ModelNotServable, match=r"has no tensor lm_head\.weight; its weights do not belong"):
        Shard(tiny_config(folder))


def test_a_tied_pair_that_is_not_there_is_missing(tmp_path):
    folder = make_model("llama", tmp_path, tie_word_embeddings=True)
    change(folder, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(
        ModelNotServable, match=r"has no tensor lm_head\.weight, model\.embed_tokens\.weight;"
    ):
        Shard(tiny_config(folder))


def test_many_missing_tensors_are_counted(tmp_path):
    folder = change(make_model("llama", tmp_path), lambda t: [t.pop(n) for n in list(t) if "layers.1." in n])
    with pytest.raises(ModelNotServable, match=r"layers\.1\.\S+, \S+, \S+ and 6 more; its weights do not"):
        Shard(tiny_config(folder))


def test_an_expert_that_is_not_there_is_said(tmp_path):
    folder = make_model("mixtral", tmp_path)
    change(folder, lambda t: t.pop(next(n for n in t if "layers.0" in n and "experts.3.w1" in n)))
    with pytest.raises(ModelNotServable, match=r"layers\.0\.mlp\.experts\.gate_up_proj"):
        Shard(tiny_config(folder))


def test_tensors_without_use_are_told_and_left(tmp_path, caplog):
    folder = make_model("llama", tmp_path)
    want = reference_logits(folder, IDS)
    rope = "model.layers.0.self_attn.rotary_emb.inv_freq"  # as very old checkpoints have it
    change(folder, lambda t: t.update({"score.weight": torch.ones(2), rope: torch.ones(2)}))
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(logits(folder), want, atol=1e-4, rtol=0)
    assert "LlamaForCausalLM does not use the tensors score.weight in" in caplog.text
    assert rope not in caplog.text


def test_a_rank_reads_its_part_of_every_expert(tmp_path, monkeypatch):
    folder = make_model("mixtral", tmp_path)
    numbers: dict[str, int] = {}
    read = Checkpoint.read

    def counted(self, name, index=()):
        part = read(self, name, index)
        numbers[name] = numbers.get(name, 0) + part.numel()
        return part

    monkeypatch.setattr(Checkpoint, "read", counted)
    with NamedWeights.open(folder, load_config(folder)):
        assert numbers == {}
    load(folder, rank=1, tp=2)
    experts = {name: n for name, n in numbers.items() if ".experts." in name}
    assert len(experts) == 2 * 5 * 3
    assert set(experts.values()) == {80 * 48 // 2}


def test_the_fingerprint_is_the_checkpoints(tmp_path):
    folder = make_model("mixtral", tmp_path)
    with NamedWeights.open(folder, load_config(folder)) as weights, Checkpoint.open(folder) as checkpoint:
        assert weights.fingerprint == checkpoint.fingerprint
        assert weights.folder == folder
