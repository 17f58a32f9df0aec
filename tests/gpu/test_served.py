"""Ray Serve on GPUs: shards of a model on two of them, and blocks that go from one to the other."""

import pytest
import torch
from recall import mixed_prompts, recall_prompt

pytest.importorskip("ray", reason="needs Ray")

from served_app import quire_serve

from quire.cluster import Client, SamplingParams, collect
from quire.replicas.engine.load import load_tokenizer

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

ENGINE = {"device": "cuda", "pool": {"bytes": 256 << 20}, "shard_timeout_s": 60.0}
REPLICAS = {"health_check_timeout_s": 60.0}
TOKENIZER = load_tokenizer("demo")


def test_a_model_whose_shards_are_on_two_gpus_recalls_facts(tmp_path):
    engine = {**ENGINE, "tp": 2}
    with quire_serve(tmp_path, engine=engine, replicas=REPLICAS) as served, Client(served.address) as client:
        for seed in range(4):
            prompt, fact = recall_prompt(TOKENIZER, seed, distance=400)
            assert fact in collect(client.generate(prompt, SamplingParams(max_tokens=7))).outputs[0].text


def test_blocks_that_one_gpu_computed_are_read_by_another(tmp_path):
    asked = [recall_prompt(TOKENIZER, seed, distance=900) for seed in range(4)]
    asked += [(prompt, "") for prompt in mixed_prompts(TOKENIZER, [700])]
    changes = {
        "engine": {**ENGINE, "tp": 1},
        "replicas": REPLICAS,
        "prefill": {"count": 1, "least_tokens": 300},
    }
    with quire_serve(tmp_path, **changes) as served, Client(served.address) as client:
        for prompt, fact in asked:
            answer = collect(client.generate(prompt, SamplingParams(max_tokens=7)))
            assert fact in answer.outputs[0].text
            assert answer.usage.cached_tokens == (len(prompt) - 1) // 64 * 64
        (replica,) = client.stats().replicas  # that decodes
    print(f"{replica.bytes_received / 1e6:.1f} MB came over NCCL, {replica.bytes_saved / 1e6:.1f} saved")
    assert replica.fetched_blocks == sum((len(prompt) - 1) // 64 for prompt, _ in asked)
    assert replica.failed_fetches == 0
