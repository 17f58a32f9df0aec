"""Makes a model's arithmetic on a CPU independent of what else is in the step.

A token's logits must be bit-identical alone and in any company, or cached blocks and recomputed ones would
differ. Measured (torch 2.13, MKL and oneDNN, fp32 and bf16, 1 to 4 threads): matrix products have that
property for row counts that are multiples of 16, norms and soft-max always; activations lose it where torch
divides a large tensor among threads at odd places, because the vectors' tails use another exp().
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 16
"""Steps and wanted rows of logits are padded to a multiple of this."""

_ONE_THREAD = 32768
"""Elements of a tensor that torch never divides among threads (at::internal::GRAIN_SIZE)."""


def padded(rows: int) -> int:
    """The next multiple of `ROWS`."""
    return -(-rows // ROWS) * ROWS


class OneThreadAtATime(nn.Module):
    """An element-wise module applied to pieces that torch does not divide any further."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(x.reshape(-1), _ONE_THREAD)
        return torch.cat([self.activation(piece) for piece in pieces]).view(x.shape)


def make_invariant(model: nn.Module) -> None:
    """Wrap the activations of `model`: the element-wise modules that transformers' ACT2FN or torch name."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if _is_activation(child):
                setattr(module, name, OneThreadAtATime(child))


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    return home in ("transformers.activations", "torch.nn.modules.activation") and not list(module.children())
