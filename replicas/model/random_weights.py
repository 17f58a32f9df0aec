"""Random weights, for timing a model of which there is only config.json.

A tensor's numbers depend on its name alone, so that all ranks shard the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from quire.replicas.model.checkpoint import config_digest
from quire.replicas.model.meta import meta_model

_STD = 0.02
"""Standard deviation, as models are initialized: logits stay finite at any width and depth we serve."""


@dataclass(frozen=True)
class RandomWeights:
    """A source of random tensors in the shapes that the model's code needs."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> RandomWeights:
        """Take shapes from the model. Raises ModelNotServable where transformers cannot build it."""
        model = meta_model(config)
        own = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
        shapes = {name: tuple(t.shape) for name, t in own.items()}
        return RandomWeights(folder, shapes, dtype, device)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """Generate the part at `index`: normal numbers around 0, or around 1 for the weights of norms."""
        seed = hashlib.blake2b(name.encode(), digest_size=7).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(seed))
        whole = torch.empty(self.shapes[name], dtype=self.dtype, device=self.device)
        mean = 1.0 if whole.dim() == 1 and name.endswith("weight") else 0.0
        whole.normal_(mean, _STD, generator=generator)
        part = whole[index]
        return part if part.numel() == whole.numel() else part.clone()  # a view would keep the whole tensor

    @property
    def fingerprint(self) -> bytes:
        """Return 32 bytes that depend on the config and the device's random generator."""
        digest = config_digest(self.folder)
        digest.update(f"random on {self.device.type}".encode())
        return digest.digest()
