"""Arrays of a step travel as one run of bytes and arrive as they were."""

from __future__ import annotations

import numpy as np
import torch

from quire.replicas.staging import Packing, stage

ARRAYS = {
    "ids": np.arange(-3, 4),
    "table": np.arange(15, dtype=np.int32).reshape(5, 3),
    "nothing": np.zeros((0, 4), dtype=np.int64),
    "share": np.array([0.25, 1 / 3]),
    "narrow": np.array([0.1], dtype=np.float32),
}


def test_arrays_arrive_with_their_types_and_shapes():
    for name, tensor in stage(ARRAYS, torch.device("cpu")).items():
        assert tensor.numpy().dtype == ARRAYS[name].dtype
        assert np.array_equal(tensor.numpy(), ARRAYS[name]), name


def test_arrays_do_not_overlap_and_begin_on_16_bytes():
    packing = Packing.of(ARRAYS)
    bytes_B = torch.zeros(packing.size_bytes, dtype=torch.uint8)
    views = packing.arrays(bytes_B)
    for name, view in views.items():
        view[...] = ARRAYS[name]
    assert all(at % 16 == 0 for at in packing.offsets.values())
    assert all(np.array_equal(views[name], ARRAYS[name]) for name in views)
    assert np.array_equal(packing.tensors(bytes_B)["table"].numpy(), ARRAYS["table"])
