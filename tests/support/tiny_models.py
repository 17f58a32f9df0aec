"""Tiny random checkpoints of many architectures, and the steps and shards to run them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quire.kvstore.wire.groups import host_store, join_store
from quire.replicas.config import EngineConfig, PoolConfig
from quire.replicas.runner.collectives import TensorParallelGroup
from quire.replicas.runner.shard import Shard
from quire.replicas.step_batch import Ints, StepBatch

VOCAB = 130  # two shards divide it, four do not

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

_WINDOW = {"sliding_window": 24}
_EXPERTS = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied_bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", _WINDOW),
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {"head_dim": 96, **_WINDOW}),
    "gemma2": (
        "gemma2",
        {**_WINDOW, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0, "tie_word_embeddings": True},
    ),
    "gemma3": ("gemma3_text", {**_WINDOW, "sliding_window_pattern": 2, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", _EXPERTS),
    "qwen3_moe": (
        "qwen3_moe",
        {**_EXPERTS, "moe_intermediate_size": 48, "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}),
    "starcoder2": ("starcoder2", _WINDOW),
    "gpt_neox": ("gpt_neox", {"hidden_size": 128}),
    "phi": ("phi", {"hidden_size": 128, "partial_rotary_factor": 0.5}),
    "cohere": ("cohere", {"hidden_size": 128, "logit_scale": 0.5}),
    "glm4": ("glm4", {}),
    "olmo": ("olmo", {"hidden_size": 128}),
    "stablelm": ("stablelm", {"hidden_size": 128}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_EXPERTS,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 64,
            "decoder_sparse_step": 1,
        },
    ),
    "gpt_oss": ("gpt_oss", _EXPERTS),
    "apertus": ("apertus", {}),  # it has parameters without dimensions
    "diffllama": ("diffllama", {"hidden_size": 128}),
    "gptj": ("gptj", {"hidden_size": 128}),
    "mpt": ("mpt", {"d_model": 128, "n_heads": 4, "n_layers": 2}),
    "smollm3": ("smollm3", {}),
    "gpt2": ("gpt2", {"hidden_size": 128}),
    "bloom": ("bloom", {"hidden_size": 128, "n_layer": 2, "n_head": 4}),
    "opt": ("opt", {"hidden_size": 128, "ffn_dim": 96, "word_embed_proj_dim": 128}),
    "gemma": ("gemma", {}),
    "granitemoe": ("granitemoe", {"hidden_size": 128, **_EXPERTS, "attention_multiplier": 0.1}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_layer_start_index": 1},
    ),
    "cohere2": ("cohere2", {"hidden_size": 128, **_WINDOW}),
    "glm": ("glm", {}),
    "exaone4": ("exaone4", {**_WINDOW, "sliding_window_pattern": 2}),
    "helium": ("helium", {"hidden_size": 128}),
    "arcee": ("arcee", {}),
    "seed_oss": ("seed_oss", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "gpt_bigcode": ("gpt_bigcode", {"hidden_size": 128}),
    "biogpt": ("biogpt", {"hidden_size": 128}),
    "persimmon": ("persimmon", {"hidden_size": 128}),
    "olmo3": ("olmo3", _WINDOW),
    "olmoe": ("olmoe", {"hidden_size": 128, **_EXPERTS}),
    "glm4_moe": (
        "glm4_moe",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
        },
    ),
    "nemotron": ("nemotron", {"hidden_size": 128}),
    "codegen": ("codegen", {"hidden_size": 128, "rotary_dim": 32}),
    "bert": ("bert", {"hidden_size": 128}),
}
"""What a tiny model is called here → its model type and what its config says besides `_BASE`."""


def make_model(name: str, folder: Path, **changes: Any) -> Path:
    """Save a random checkpoint of an entry of ARCHITECTURES in `folder`.

    Norms and biases are random too: what is one or zero after initialization cannot go wrong.
    """
    model_type, special = ARCHITECTURES[name]
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**_BASE, **special, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def reference_logits(folder: Path, ids: Sequence[int], attention: str = "eager") -> Tensor:
    """transformers' own forward of the whole sequence: fp32 [T, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCAB, count)]


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence in a step."""

    ids: Sequence[int]
    start: int
    """Tokens of the sequence that lie in its pages already."""
    pages: Sequence[int]


def step_of(chunks: Sequence[Chunk], page_tokens: int, rows: Sequence[int] | None = None) -> StepBatch:
    """A step of these chunks; logits of all its tokens, or of `rows`."""
    table_SM = np.zeros((len(chunks), max(len(c.pages) for c in chunks)), dtype=np.int64)
    positions: list[Ints] = []
    slots: list[Ints] = []
    for row, chunk in enumerate(chunks):
        table_SM[row, : len(chunk.pages)] = chunk.pages
        at = np.arange(chunk.start, chunk.start + len(chunk.ids))
        positions.append(at)
        slots.append(table_SM[row, at // page_tokens] * page_tokens + at % page_tokens)
    starts = np.cumsum([0, *(len(c.ids) for c in chunks)])
    return StepBatch(
        token_ids_T=np.array([t for c in chunks for t in c.ids]),
        positions_T=np.concatenate(positions),
        slots_T=np.concatenate(slots),
        query_start_S1=starts,
        kv_tokens_S=np.array([c.start + len(c.ids) for c in chunks]),
        page_table_SM=table_SM,
        logit_rows_R=np.arange(starts[-1]) if rows is None else np.array(rows, dtype=np.int64),
    )


def tiny_config(model: Path | str, kv: str = "fp32", **changes: Any) -> EngineConfig:
    """An engine of small pages and a pool of 20 or more of them."""
    pool = PoolConfig(bytes=4 << 20, page_tokens=changes.pop("page_tokens", 16))
    return EngineConfig(model=str(model), kv=kv, device="cpu", pool=pool, **changes)


class Ranks:
    """All shards of a replica as threads of this process. A context."""

    def __init__(self, config: EngineConfig) -> None:
        self._threads = ThreadPoolExecutor(config.tp)
        self._store = host_store("127.0.0.1", 30)
        self.shards = list(self._threads.map(lambda rank: self._load(config, rank), range(config.tp)))
        for shard in self.shards:
            shard.pool.fill_(0xFF)  # fp32 and fp16 NaN: what is read must have been written

    def _load(self, config: EngineConfig, rank: int) -> Shard:
        if config.tp == 1:
            return Shard(config)
        store = join_store("127.0.0.1", self._store.port, 30)
        group = TensorParallelGroup(
            store, rank=rank, size=config.tp, host="127.0.0.1", timeout_s=30, device=torch.device("cpu")
        )
        return Shard(config, rank, group)

    def each(self, call: Callable[[Shard], Tensor]) -> list[Tensor]:
        """What a call that joins all ranks returns on each."""
        return list(self._threads.map(call, self.shards))

    def forward(self, batch: StepBatch) -> Tensor:
        """Rank 0's logits, which must be every rank's."""
        logits = self.each(lambda shard: shard.forward(batch))
        assert all(torch.equal(logits[0], other) for other in logits)
        return logits[0]

    def run(self, ids: Sequence[int], chunks: Sequence[int], pages: Sequence[int]) -> Tensor:
        """One sequence alone in chunks of these sizes: logits of all its tokens."""
        tokens, out, start = self.shards[0].layout.page_tokens, [], 0
        for size in chunks:
            out.append(self.forward(step_of([Chunk(ids[start : start + size], start, pages)], tokens)))
            start += size
        assert start == len(ids)
        return torch.cat(out)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
