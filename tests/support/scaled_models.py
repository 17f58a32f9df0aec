"""Checkpoints that compute the same function with keys and values of another magnitude."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Factors = Mapping[str, Sequence[float]]
"""k_proj or v_proj → what each kv head is multiplied with; what reads it is divided by the same."""


def write_scaled(source: Path, target: Path, factors: Factors) -> Path:
    """A copy in `target` of a checkpoint that has a k_proj, v_proj, q_proj and o_proj without biases."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    head_dim, group = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        for side, by_head in factors.items():
            factor_K = torch.tensor(by_head).repeat_interleave(head_dim).to(tensor.dtype)
            factor_Q = torch.tensor(by_head).repeat_interleave(head_dim * group).to(tensor.dtype)
            if side in name:
                tensor *= factor_K[:, None]
            if side == "k_proj" and "q_proj" in name:
                tensor /= factor_Q[:, None]
            if side == "v_proj" and "o_proj" in name:
                tensor /= factor_Q
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
