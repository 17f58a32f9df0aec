"""Well-known models by their shapes alone: a config.json, and what a step must read and compute at least.

Their weights are random numbers: figures of them are of speed and memory, and every row says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Shape

_BF16_BYTES = 2


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder of the Llama family in bf16: gated MLP, grouped queries, an output head of its own."""

    name: str
    config: Mapping[str, Any]
    """What config.json holds."""

    def __str__(self) -> str:
        return f"{self.name}(random weights)"

    def save(self, folder: str) -> str:
        """Write config.json there; returns the folder."""
        (Path(folder) / "config.json").write_text(json.dumps(dict(self.config)))
        return folder

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        c = self.config
        attention = 2 * c["head_dim"] * (c["num_attention_heads"] + c["num_key_value_heads"])
        one: int = c["hidden_size"] * (attention + 3 * c["intermediate_size"])
        return one * self.config["num_hidden_layers"]

    @property
    def step_weight_bytes(self) -> int:
        """Weights that a decode step reads: layers and output head; of the embedding next to nothing."""
        head: int = self.config["hidden_size"] * self.config["vocab_size"]
        return _BF16_BYTES * (self.layer_weights + head)

    def kv_bytes(self, policy: str, tokens: int) -> int:
        """Bytes of K and V that attention to `tokens` reads in all layers."""
        c = self.config
        heads = c["num_key_value_heads"]
        shape = Shape(1, tokens, H=heads, G=c["num_attention_heads"] // heads, D=c["head_dim"])
        layers: int = c["num_hidden_layers"]
        return shape.kv_bytes(policy) * layers

    def prefill_flop(self, tokens: int) -> float:
        """Arithmetic of a prompt from its first token on: matrices and causal attention."""
        c = self.config
        pairs = tokens * tokens / 2
        attention = 4 * c["num_attention_heads"] * c["head_dim"] * pairs * c["num_hidden_layers"]
        return 2.0 * self.layer_weights * tokens + float(attention)


LLAMA_8B = Model(
    "Llama-3.1-8B",
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
)
QWEN3_8B = Model(
    "Qwen3-8B",
    {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
)
