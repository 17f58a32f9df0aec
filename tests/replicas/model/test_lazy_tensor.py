"""Tensors that are read when asked for: the same numbers as at once, and no more of them read than needed."""

from __future__ import annotations

import pytest
import torch

from quire.replicas.model.lazy_tensor import LazyTensor


class Stored:
    """Tensors on a disk of sorts, which counts the numbers that are read."""

    def __init__(self) -> None:
        self.numbers = 0

    def unread(self, tensor: torch.Tensor) -> LazyTensor:
        def read(index):
            part = tensor[index]
            self.numbers += part.numel()
            return part

        return LazyTensor.of(tensor.shape, tensor.dtype, read)


A, B = torch.arange(24.0).view(4, 6), torch.arange(100.0, 124.0).view(4, 6)

OPERATIONS = {
    "cat": lambda a, b: torch.cat([a, b]),
    "cat along the last": lambda a, b: torch.cat([a, b], dim=-1),
    "stack": lambda a, b: torch.stack([a, b]),
    "stack in the middle": lambda a, b: torch.stack([a, b], dim=1),
    "experts": lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "chunk": lambda a, b: torch.chunk(a, 2, dim=1)[1].contiguous(),
    "split": lambda a, b: torch.split(torch.cat([a, b]), [1, 4, 3])[1],
    "turn": lambda a, b: torch.cat([a, b]).transpose(0, 1).contiguous(),
    "reshape": lambda a, b: torch.cat([a, b]).reshape(2, 2, 12).transpose(0, 1).reshape(4, 12),
    "arithmetic": lambda a, b: a * 2 + b,
}

LOOKED_THROUGH = [
    "cat",
    "cat along the last",
    "stack",
    "stack in the middle",
    "experts",
    "chunk",
    "split",
    "turn",
]


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_part_of_a_result_has_the_numbers_of_the_whole(name):
    want, stored = OPERATIONS[name](A, B), Stored()
    got = OPERATIONS[name](stored.unread(A), stored.unread(B))
    assert (got.shape, got.dtype, stored.numbers) == (want.shape, want.dtype, 0)
    assert torch.equal(got.whole(), want)
    for dim, size in enumerate(want.shape):
        for start in range(size):
            for stop in range(start + 1, size + 1):
                index = tuple(
                    slice(start, stop) if d == dim else slice(0, n) for d, n in enumerate(want.shape)
                )
                assert torch.equal(got.read(index), want[index])


@pytest.mark.parametrize("name", LOOKED_THROUGH)
def test_only_the_part_is_read(name):
    stored = Stored()
    got = OPERATIONS[name](stored.unread(A), stored.unread(B))
    index = tuple(slice(n // 2, n // 2 + 1) for n in got.shape)
    assert got.read(index).numel() == stored.numbers == 1


def test_a_scalar_is_a_tensor_too():
    stored = Stored()
    assert stored.unread(torch.tensor(3.0)).whole() == 3
