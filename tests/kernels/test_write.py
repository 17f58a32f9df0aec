"""The write kernel against the reference, byte by byte, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from paged_cases import Case, make_step

from quire.kernels.ref.paged import write_kv_ref
from quire.kernels.write import launch_write

CASES = [
    Case("bf16", "bf16", [37, 5], [1, 1], page_tokens=16),
    Case("int8", "int8", [17, 1, 34], [1, 1, 1], page_tokens=32),
    Case("int4", "int4", [33, 7], [1, 1], page_tokens=64, head_dim=128),
    Case("int4g32", "int4g64", [33, 7], [1, 1], head_dim=128),
    Case("fp8", "fp8", [33, 7], [1, 1]),
    Case("int8c", "int8c", [33, 7], [1, 1]),
    Case("int4c", "int4c", [33, 7], [1, 1]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case):
    expected, step = make_step(case), make_step(case, written=False)
    launch_write(step.cache, step.k_LHD, step.v_LHD, step.slots_L)
    wrong = step.cache.pool_NB != expected.cache.pool_NB
    assert wrong.float().mean() < 0.002
