"""Random weights: a config is enough, and all ranks cut the same model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, Ranks, make_model, some_tokens, tiny_config
from transformers import AutoConfig

from quire.replicas.errors import ModelNotServable
from quire.replicas.llm import LLM
from quire.replicas.model.checkpoint import load_config
from quire.replicas.model.loading import load_model
from quire.replicas.model.random_weights import RandomWeights
from quire.replicas.request import SamplingParams

IDS = some_tokens(50)
CHUNKS = [37, 1, 12]
PAGES = [3, 1, 6, 2]


def only_config(name, folder):
    """What `make_model` saves, without the weights."""
    make_model(name, folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return folder


def random_weights(folder, dtype=torch.float32):
    return RandomWeights.of(folder, load_config(folder), dtype, torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama_tied_bias", "qwen2", "phi3", "gemma2", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_config_alone_computes_and_shards_agree(name, tp, tmp_path):
    folder = only_config(name, tmp_path)
    logits = []
    for ranks_of in {1, tp}:
        with Ranks(tiny_config(folder, tp=ranks_of, weights="random")) as ranks:
            logits.append(ranks.run(IDS, CHUNKS, PAGES))
    assert logits[0].isfinite().all()
    assert logits[0].std() > 0
    torch.testing.assert_close(logits[0], logits[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["apertus", "qwen3_moe", "gpt_neox", "starcoder2"])
def test_other_names_and_shapes_are_found(name, tmp_path):
    folder = only_config(name, tmp_path)
    with Ranks(tiny_config(folder, weights="random")) as ranks:
        assert ranks.run(IDS, [len(IDS)], PAGES).isfinite().all()


def test_a_part_is_a_part_of_the_same_numbers(tmp_path):
    weights = random_weights(only_config("llama", tmp_path), torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    whole = weights.read(name)
    assert (tuple(whole.shape), whole.dtype) == (weights.shape(name), torch.bfloat16)
    part = weights.read(name, (slice(None), slice(40, 80)))
    assert torch.equal(part, whole[:, 40:])
    assert part.untyped_storage().nbytes() == part.nbytes
    assert not torch.equal(whole, weights.read(name.replace("1", "0")))
    assert "model.layers.2.mlp.down_proj.weight" not in weights


def test_norms_stand_around_one_and_the_rest_around_zero(tmp_path):
    weights = random_weights(only_config("qwen2", tmp_path))
    for name in weights.shapes:
        assert abs(weights.read(name).mean() - int("norm" in name)) < 0.02
        assert weights.read(name).std() < 0.03


def test_a_tied_head_is_the_table(tmp_path):
    folder = only_config("llama_tied_bias", tmp_path)
    weights = random_weights(folder)
    assert "lm_head.weight" not in weights
    model = load_model(
        weights,
        load_config(folder),
        rank=0,
        tp=1,
        group=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    ).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_fingerprint_is_the_configs(tmp_path):
    folder = only_config("llama", tmp_path)
    before = random_weights(folder).fingerprint
    assert random_weights(folder).fingerprint == before
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters["rope_theta"] = 77.0
    config.save_pretrained(folder)
    assert random_weights(folder).fingerprint != before


def test_an_llm_of_random_weights_needs_no_tokenizer(tmp_path):
    folder = only_config("llama", tmp_path)
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    with LLM(str(folder), weights="random", device="cpu") as llm:
        (done,) = llm.generate([IDS], sampling)
    assert len(done.outputs[0].token_ids) == 5
    assert all(0 <= token < VOCAB for token in done.outputs[0].token_ids)


def test_weights_come_from_files_unless_asked_otherwise(tmp_path):
    with pytest.raises(ModelNotServable, match=r"holds no model\.safetensors"):
        LLM(str(only_config("llama", tmp_path)), device="cpu")
