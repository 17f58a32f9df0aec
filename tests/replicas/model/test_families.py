"""Families of models, saved in the ways in which checkpoints are found: the same weights as transformers'.

Every family is saved in one of the ways in turn; a few that differ most in names and ties in all of them.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Ranks, make_model, reference_logits, some_tokens, tiny_config
from transformers import AutoModelForCausalLM

from quire.replicas.errors import ModelNotServable
from quire.replicas.runner.shard import Shard

IDS = some_tokens(23)
CHUNKS = [14, 1, 8]
PAGES = [3, 1]

FAMILIES = [
    "arcee",
    "biogpt",
    "cohere",
    "cohere2",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "starcoder2",
]

MOST_DIFFERENT = ["gpt2", "gpt_neox", "llama", "mixtral", "opt"]


@dataclass(frozen=True)
class Way:
    """How a checkpoint is saved."""

    prefix: bool
    """Whether names begin as in the model with its head: `transformer.h.0...`, not `h.0...`."""
    tied: bool
    sharded: bool
    """In several files, with an index."""

    def __str__(self) -> str:
        words = ("" if self.prefix else "no-") + "prefix", "tied" if self.tied else "untied"
        return "-".join((*words, "sharded" if self.sharded else "whole"))


WAYS = [Way(*flags) for flags in itertools.product((False, True), repeat=3)]
ONE_WAY = [(family, WAYS[i % len(WAYS)]) for i, family in enumerate(FAMILIES)]
ALL_WAYS = [pair for pair in itertools.product(MOST_DIFFERENT, WAYS) if pair not in ONE_WAY]


def saved(family: str, way: Way, folder: Path) -> Path:
    """A checkpoint with others' files beside it, any of which would change the logits."""
    make_model(family, folder, tie_word_embeddings=way.tied)
    tensors = load_file(folder / "model.safetensors")
    if not way.prefix:
        prefix = AutoModelForCausalLM.from_pretrained(folder).base_model_prefix + "."
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    others = {name: t + 1 for name, t in tensors.items()}
    for stray in ("model_old", "optimizer", "consolidated", "model-00007-of-00009", "zzz"):
        save_file(others, folder / f"{stray}.safetensors")
    index = folder / "model.safetensors.index.json"
    if not way.sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        stale = dict.fromkeys(tensors, "model-00007-of-00009.safetensors")
        index.write_text(json.dumps({"metadata": {}, "weight_map": stale}))
        return folder
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@pytest.mark.parametrize(("family", "way"), [*ONE_WAY, *ALL_WAYS], ids=str)
def test_logits_are_those_of_transformers_own_loading(family, way, tmp_path):
    folder = saved(family, way, tmp_path)
    with Ranks(tiny_config(folder, threads_per_shard=1)) as ranks:
        got = ranks.run(IDS, CHUNKS, PAGES)
    torch.testing.assert_close(got, reference_logits(folder, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "tp"), [("llama", 4), ("mixtral", 2), ("qwen2_moe", 2), ("phi3", 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_take_their_parts_of_the_same_weights(family, tp, tied, tmp_path):
    folder = saved(family, Way(prefix=False, tied=tied, sharded=True), tmp_path)
    with Ranks(tiny_config(folder, tp=tp, threads_per_shard=1)) as ranks:
        got = ranks.run(IDS, CHUNKS, PAGES)
    torch.testing.assert_close(got, reference_logits(folder, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bert", "the attention of BertSelfAttention is not causal"),
        ("bloom", "keep no K and V that reach paged attention"),
        ("codegen", "keep no K and V that reach paged attention"),
        ("gptj", "cannot build GPTJForCausalLM"),
        ("nemotron", "does not pass keyword arguments to its attention"),
        ("stablelm", "does not pass keyword arguments to its attention"),
    ],
)
def test_a_family_that_is_not_served_is_refused_in_plain_words(family, reason, tmp_path):
    with pytest.raises(ModelNotServable, match=reason):
        Shard(tiny_config(make_model(family, tmp_path)))
