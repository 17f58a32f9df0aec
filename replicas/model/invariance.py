"""Makes a model's arithmetic on a CPU independent of what else is in the step.

A token's logits must be bit-identical in any batch, or cached blocks and recomputed ones would
differ. Measured (torch 2.13, MKL and oneDNN, fp32 and bf16, 1 to 4 threads): matrix products have that
property for row counts that are multiples of 16, norms and soft-max always; activations lose it where torch
divides a large tensor among threads at odd places, because vector tails use another exp(); experts lose it
because their number of rows varies with routing.

Names: T tokens, C chosen experts per token, I model dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ExpertsInterface

from quire.replicas.errors import ModelNotServable

EXPERTS = "quire_experts"
"""The name under which transformers finds `invariant_experts`."""

ROWS = 16
"""Steps and rows of logits are padded to a multiple of this."""

_CHUNK_ELEMENTS = 16384
"""The most elements that torch does not divide among threads in any activation (GELU's is the lowest)."""


def padded(rows: int) -> int:
    """Round up to a multiple of `ROWS`."""
    return -(-rows // ROWS) * ROWS


class ChunkedActivation(nn.Module):
    """Applies an element-wise module to chunks that torch does not divide any further."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(x.reshape(-1), _CHUNK_ELEMENTS)
        done = [self.activation(piece) for piece in pieces]
        return (done[0] if len(done) == 1 else torch.cat(done)).view(x.shape)


def make_invariant(model: nn.Module) -> None:
    """Wrap the activations of `model` (element-wise modules of transformers' ACT2FN or torch)."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if _is_activation(child):
                setattr(module, name, ChunkedActivation(child))


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    return home in ("transformers.activations", "torch.nn.modules.activation") and not list(module.children())


def invariant_experts(experts: Any, x_TI: Tensor, chosen_TC: Tensor, weight_TC: Tensor) -> Tensor:
    """Compute experts with padded rows, summed in the order of each token's choice (transformers' signature).

    Raises: ModelNotServable for experts that are not gate, up and down projections without bias.
    """
    normed = getattr(experts, "has_post_expert_norm", False)  # unknown to older transformers
    if experts.is_transposed or experts.has_bias or normed or not experts.has_gate:
        raise ModelNotServable(
            f"{type(experts).__name__} holds experts other than gate, up and down projections; it "
            "is not servable on a CPU"
        )
    out_TCI = x_TI.new_zeros(*chosen_TC.shape, x_TI.shape[1])
    for expert in torch.unique(chosen_TC).tolist():
        token, choice = torch.where(chosen_TC == expert)
        rows = functional.pad(x_TI[token], (0, 0, 0, padded(len(token)) - len(token)))
        hidden = experts._apply_gate(functional.linear(rows, experts.gate_up_proj[expert]))
        out_TCI[token, choice] = functional.linear(hidden, experts.down_proj[expert])[: len(token)]
    total_TI = torch.zeros_like(x_TI)
    for out_TI, weight_T in zip(out_TCI.unbind(1), weight_TC.unbind(1), strict=True):
        total_TI = total_TI + out_TI * weight_T[:, None].to(x_TI.dtype)
    return total_TI


ExpertsInterface.register(EXPERTS, invariant_experts)
