"""What the benchmarks of steps and engines are made of: models, decode steps, floors. Needs no GPU."""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire.replicas.config import EngineConfig, PoolConfig
from quire.replicas.model.checkpoint import load_config
from quire.replicas.runner.shard import Shard, check_config

ROOT = Path(__file__).parents[2]


class Bench:
    """The modules of benchmarks/gpu by name."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.gpu.{name}")


@pytest.fixture
def bench(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    return Bench()


@pytest.mark.parametrize("name", ["LLAMA_8B", "QWEN3_8B"])
def test_sizes_of_a_model_are_those_of_transformers(bench, name, tmp_path):
    model = getattr(bench.models, name)
    config = load_config(Path(model.save(str(tmp_path))))
    assert config.max_position_embeddings == model.config["max_position_embeddings"]
    assert config.dtype == torch.bfloat16
    check_config(EngineConfig(model=str(tmp_path), weights="random"))
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    matrices = sum(p.numel() for p in whole.parameters() if p.dim() == 2)
    assert matrices - whole.get_input_embeddings().weight.numel() == model.step_weight_bytes // 2
    assert 8.0e9 < matrices < 8.2e9


def test_kv_bytes_count_every_scale(bench):
    tokens, numbers = 100, 32 * 2 * 8 * 128
    read = {kv: bench.models.LLAMA_8B.kv_bytes(kv, tokens) / tokens for kv in ("bf16", "int8", "int4")}
    assert read == {"bf16": 2 * numbers, "int8": numbers * 8.125 / 8, "int4": numbers * 4.25 / 8}


def test_a_prompts_arithmetic_is_matrices_and_half_a_square(bench):
    model = bench.models.LLAMA_8B
    assert model.prefill_flop(1) == pytest.approx(2 * 6.98e9, rel=0.01)
    square = model.prefill_flop(16384) - 2 * model.layer_weights * 16384
    assert square == 4 * 4096 * (16384**2 / 2) * 32


def test_decode_steps_read_pages_of_their_own_and_write_the_next_slot(bench):
    steps = bench.shards.decode_steps(100, 16, sequences=5, tokens=130, steps=4, vocabulary=7)
    assert [int(step.kv_tokens_S[0]) for step in steps] == [127, 128, 129, 130]
    assert [step.page_table_SM.shape for step in steps] == [(5, 8), (5, 8), (5, 9), (5, 9)]
    pages = steps[-1].page_table_SM.flatten().tolist()
    assert len(set(pages)) == len(pages)
    assert set(pages) <= set(range(100))
    assert pages != sorted(pages)
    for step in steps:
        at = int(step.positions_T[0])
        assert at == step.kv_tokens_S[0] - 1
        assert step.slots_T.tolist() == (step.page_table_SM[:, at // 16] * 16 + at % 16).tolist()
        assert max(step.token_ids_T) < 7


def test_steps_that_do_not_fit_the_pool_are_refused_with_the_numbers(bench):
    with pytest.raises(ValueError, match="3 x 4 pages are needed, the pool has 11"):
        bench.shards.decode_steps(11, 16, sequences=3, tokens=64, steps=1, vocabulary=7)


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
def test_a_filled_pool_gives_finite_logits_wherever_a_step_looks(bench, kv, tmp_path):
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    model = bench.models.Model("tiny", {**bench.models.LLAMA_8B.config, **tiny, **heads, **ends})
    shard = Shard(
        EngineConfig(
            model=model.save(str(tmp_path)),
            weights="random",
            kv=kv,
            device="cpu",
            pool=PoolConfig(bytes=3 << 20),
        )
    )
    shard.pool.fill_(0xFF)  # NaN
    bench.shards.fill_pages(shard.pool, shard.layout)
    tokens = shard.num_pages // 3 * 64
    for call in bench.shards.forwards(
        shard, bench.shards.decode_steps(shard.num_pages, 64, 3, tokens, 2, 50)
    ):
        logits = call()
        assert logits.isfinite().all()
        assert logits.std() > 0


def test_a_fresh_process_has_the_environment_it_is_given(bench):
    assert bench.shards.in_fresh_process(os.getenv, "QUIRE_TEST", environment={"QUIRE_TEST": "x"}) == "x"
    assert os.getenv("QUIRE_TEST") is None


def test_overlapping_activities_count_once(bench):
    assert bench.timing.covered([(5, 7), (0, 2), (1, 3), (1, 2), (6, 9)]) == 3 + 4
    assert bench.timing.covered([]) == 0


def test_the_floor_of_a_step_is_its_bytes(bench):
    ceilings = bench.ceilings.Ceilings(copy_bytes_s=4e12, matmul_flop_s=7e14)
    time = bench.step.StepTime(sequences=64, tokens=8192, steps=1, wall_s=1.0, device_s=None)
    assert bench.step.floor_seconds("bf16", time, ceilings) == pytest.approx(
        (15.0e9 + 2**36) / 4e12, rel=0.01
    )
    assert bench.step.StepTime(10, 100, 5, 1.0, None).kv_tokens == 980


def test_the_floor_of_an_engine_counts_prompts_once_and_steps_by_how_many_fit(bench):
    ceilings = bench.ceilings.Ceilings(copy_bytes_s=4e12, matmul_flop_s=7e14)
    load = bench.engine.LOADS[0]
    one = bench.engine.floor("bf16", load, 64, ceilings)
    half = bench.engine.floor("bf16", load, 32, ceilings)
    weights_s = bench.engine.MODEL.step_weight_bytes / 4e12
    assert half.prefill_s == one.prefill_s
    assert half.decode_s - one.decode_s == pytest.approx(1024 * weights_s)
    int4 = bench.engine.floor("int4", load, 64, ceilings)
    kv_s = one.decode_s - 1024 * weights_s
    assert int4.decode_s - 1024 * weights_s == pytest.approx(kv_s * 4.25 / 16)
    alone = bench.engine.floor("bf16", replace(load, requests=32), 32, ceilings)
    assert math.isclose(2 * alone.decode_s, half.decode_s)


def test_every_part_of_the_command_is_there(bench):
    main = importlib.import_module("benchmarks.gpu.__main__")
    assert set(main.PARTS) == {"attention", "write", "prefill", "layout", "model", "startup", "links"}
    assert all(name in main.__doc__ for name in main.PARTS)
