"""Moves all the small arrays of a step to the device in one transfer, which the host does not wait for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_ALIGN = 16


@dataclass(frozen=True)
class Packing:
    """Where arrays of known types and shapes are in one run of bytes."""

    shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]

    @staticmethod
    def of(arrays: Mapping[str, Array]) -> Packing:
        return Packing({name: (array.dtype, array.shape) for name, array in arrays.items()})

    @cached_property
    def offsets(self) -> dict[str, int]:
        offsets, at = {}, 0
        for name, (dtype, shape) in self.shapes.items():
            offsets[name] = at
            at += -(-dtype.itemsize * prod(shape) // _ALIGN) * _ALIGN
        return offsets

    @property
    def size_bytes(self) -> int:
        return sum(-(-d.itemsize * prod(shape) // _ALIGN) * _ALIGN for d, shape in self.shapes.values())

    def arrays(self, bytes_B: Tensor) -> dict[str, Array]:
        """Return views of a run of bytes in host memory."""
        whole = bytes_B.numpy()
        return {
            name: whole[at : at + dtype.itemsize * prod(shape)].view(dtype).reshape(shape)
            for (name, at), (dtype, shape) in zip(self.offsets.items(), self.shapes.values(), strict=True)
        }

    def tensors(self, bytes_B: Tensor) -> dict[str, Tensor]:
        """Return views of a run of bytes on any device."""
        return {
            name: bytes_B[at : at + dtype.itemsize * prod(shape)].view(_TORCH[dtype.str]).view(shape)
            for (name, at), (dtype, shape) in zip(self.offsets.items(), self.shapes.values(), strict=True)
        }


def host_bytes(size: int, device: torch.device) -> Tensor:
    """Allocate host memory from which `device` can copy asynchronously.

    A GPU's is page-locked, from torch's cache, which reuses no memory before copies from it are done.
    """
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def stage(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Copy arrays to tensors on `device`, in one transfer."""
    return stage_groups([arrays], device)[0]


def stage_groups(groups: Sequence[Mapping[str, Array]], device: torch.device) -> list[dict[str, Tensor]]:
    """Copy several groups of arrays to tensors on `device`, in one transfer."""
    packings = [Packing.of(group) for group in groups]
    sizes = [packing.size_bytes for packing in packings]
    host_B = host_bytes(sum(sizes), device)
    for group, packing, part_B in zip(groups, packings, host_B.split(sizes), strict=True):
        for name, view in packing.arrays(part_B).items():
            view[...] = group[name]
    parts = host_B.to(device, non_blocking=True).split(sizes)
    return [packing.tensors(part_B) for packing, part_B in zip(packings, parts, strict=True)]


_TORCH = {
    np.dtype(np_type).str: torch_type
    for np_type, torch_type in (
        (np.int64, torch.int64),
        (np.int32, torch.int32),
        (np.float64, torch.float64),
        (np.float32, torch.float32),
    )
}
