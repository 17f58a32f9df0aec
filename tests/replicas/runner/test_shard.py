"""One shard: what it says about itself, its pool, and the configurations it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import Chunk, Ranks, make_model, reference_logits, some_tokens, step_of, tiny_config

from quire.replicas.config import EngineConfig, PoolConfig
from quire.replicas.errors import ConfigError, ModelNotServable
from quire.replicas.model.checkpoint import Checkpoint, find_model
from quire.replicas.runner.shard import Shard, check_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


def test_the_pool_is_what_was_asked_for_and_all_zeros(llama):
    shard = Shard(tiny_config(llama, "int8"))
    assert shard.pool.shape == (shard.num_pages, shard.layout.page_bytes)
    assert shard.pool.numel() <= 4 << 20 < shard.pool.numel() + shard.layout.page_bytes
    assert not shard.pool.any()


def test_a_cpu_pool_has_256_mib_unless_told(llama):
    shard = Shard(EngineConfig(model=str(llama), device="cpu"))
    assert shard.num_pages == (256 << 20) // shard.layout.page_bytes
    assert shard.dtype == torch.float32


def test_it_describes_the_model(llama):
    with Ranks(tiny_config(llama, "k8v4", tp=2)) as ranks:
        info, one = ranks.shards[0].info, ranks.shards[0].layout
        assert ranks.shards[1].info == info
        assert ranks.shards[1].weights_fingerprint == ranks.shards[0].weights_fingerprint
        assert ranks.shards[1].transforms_fingerprint == ranks.shards[0].transforms_fingerprint
    assert (info.architecture, info.vocab_size, info.max_model_tokens) == ("LlamaForCausalLM", 130, 512)
    assert (info.tp, info.page_tokens, info.kv_formats) == (2, 16, (("int8", "int4"),) * 2)
    assert info.eos_token_ids == (2,)
    assert info.bytes_per_token == 2 * one.bytes_per_token
    assert info.bf16_bytes_per_token == 2 * 2 * 2 * 2 * 32  # layers, sides, bytes, kv heads, head_dim


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_it_knows_the_whole_models_kv_heads(llama, tp):
    with Ranks(tiny_config(llama, tp=tp)) as ranks:
        assert [shard.kv_heads for shard in ranks.shards] == [2] * tp
        assert [shard.layout.kv_heads for shard in ranks.shards] == [max(2 // tp, 1)] * tp


def test_fingerprints_do_not_depend_on_the_number_of_shards(llama):
    with Ranks(tiny_config(llama, "int4", tp=2)) as two, Ranks(tiny_config(llama, "int4")) as one:
        a, b = two.shards[1], one.shards[0]
        assert (a.weights_fingerprint, a.transforms_fingerprint) == (
            b.weights_fingerprint,
            b.transforms_fingerprint,
        )
        assert a.layout.fingerprint == b.layout.fingerprint


def test_shards_pages_are_slices_of_the_whole_models_page(llama):
    """Head-major pages: rank r's page is the r-th part of the bytes one shard would hold."""
    step = step_of([Chunk(range(5, 42), 0, [2, 0, 1])], 16)
    with Ranks(tiny_config(llama, "int8", tp=2)) as two, Ranks(tiny_config(llama, "int8")) as one:
        for ranks in (two, one):
            for shard in ranks.shards:
                shard.pool.zero_()
            ranks.forward(step)
        whole = one.shards[0].pool[:3]
        halves = torch.cat([shard.pool[:3] for shard in two.shards], 1)
        assert whole.any()
        assert (whole != halves).float().mean() < 0.01  # sums of two halves may round to another code


def test_only_the_steps_slots_are_written(llama):
    with Ranks(tiny_config(llama)) as ranks:
        pool = ranks.shards[0].pool
        ranks.forward(step_of([Chunk([5, 6, 7], 0, [4])], 16))
        assert (pool[:4] == 0xFF).all()
        assert (pool[5:] == 0xFF).all()
        assert (pool[4] != 0xFF).sum() >= 3 * 2 * 2 * 2 * 32 * 3  # most bytes of three tokens of fp32


UNCALIBRATED = {"codes": "int8", "scales": "token", "transform": "affine"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pool": PoolConfig(bytes=1000)}, r"a pool of 1000 bytes holds no page of \d+; raise pool.bytes"),
        ({"kv": "int5"}, "unknown KV format 'int5'"),
        ({"kv": {"default": {"k": UNCALIBRATED, "v": "int8"}}}, "needs calibrated shifts"),
        (
            {"kv": {"default": {"k": "int8", "v": "int8"}, "layers": {"7": {"k": "bf16", "v": "bf16"}}}},
            "layers 0..1",
        ),
        ({"max_model_tokens": 513}, "max_model_tokens is 513, the model allows 512"),
        ({"tp": 3}, "tp=3 does not fit 4 query heads and 2 kv heads"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(llama, changes, reason):
    config = EngineConfig(**{"model": str(llama), "device": "cpu", **changes})
    with pytest.raises(ConfigError, match=reason):
        Shard(config, 0, None if config.tp == 1 else object())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(llama):
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        Shard(EngineConfig(model=str(llama), device="cuda"))


def test_a_policy_per_layer_is_kept(llama):
    sides = {"k": "int8", "v": "int4"}
    kv = {"default": sides, "layers": {"1": {"k": "bf16", "v": "fp8"}}}
    assert Shard(tiny_config(llama, kv)).info.kv_formats == (("int8", "int4"), ("bf16", "fp8"))


def test_head_sizes_that_pages_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="head_dim 24 is not a multiple of 16"):
        Shard(tiny_config(make_model("llama", tmp_path, head_dim=24)))


def yarn(folder: Path) -> Path:
    """A model of 64 tokens whose RoPE is scaled by four, as people add it to a config."""
    make_model("qwen2", folder, max_position_embeddings=64)
    values = json.loads((folder / "config.json").read_text())
    values.pop("rope_parameters")
    values["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_model_is_served_as_far_as_its_rope_reaches(tmp_path):
    folder = yarn(tmp_path)
    assert Shard(tiny_config(folder)).info.max_model_tokens == 256
    assert Shard(tiny_config(folder, max_model_tokens=200)).info.max_model_tokens == 200
    with pytest.raises(ConfigError, match="max_model_tokens is 257, the model allows 256"):
        Shard(tiny_config(folder, max_model_tokens=257))
    ids = some_tokens(200)
    with Ranks(tiny_config(folder)) as ranks:
        got = ranks.run(ids, [200], range(13))
    torch.testing.assert_close(got, reference_logits(folder, ids), atol=1e-4, rtol=0)


def test_end_tokens_outside_the_vocabulary_are_none_of_the_models(tmp_path):
    folder = make_model("llama", tmp_path, eos_token_id=[2, 5000])
    assert Shard(tiny_config(folder)).info.eos_token_ids == (2,)


def damaged_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model_old.safetensors")
    (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 100), "model.safetensors"),
        (damaged_index, "model.safetensors.index.json"),
    ],
)
def test_a_damaged_file_is_found_before_any_weights_are_read(harm, file, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(find_model("demo"), tmp_path / "model"))
    monkeypatch.delattr(Checkpoint, "read")
    check_config(EngineConfig(model=str(folder)))
    harm(folder)
    with pytest.raises(ModelNotServable, match=f"{folder / file} is damaged"):
        check_config(EngineConfig(model=str(folder)))


def test_weights_of_another_model_are_found_before_they_are_read(tmp_path, monkeypatch):
    folder = make_model("llama", tmp_path)
    make_model("llama", tmp_path / "other", intermediate_size=96)
    shutil.copy(tmp_path / "other" / "config.json", folder)
    monkeypatch.delattr(Checkpoint, "read")
    with pytest.raises(ModelNotServable, match=r"has shape .* in the checkpoint and .* by .*config\.json"):
        check_config(tiny_config(folder))
