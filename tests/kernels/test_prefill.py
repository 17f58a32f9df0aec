"""The prefill kernel against the reference in fp64, in the interpreter."""

from __future__ import annotations

import pytest
from paged_cases import Case, make_step, relative_error

from quire.kernels.prefill import launch_prefill

CASES = [
    Case("bf16", "bf16", [37, 5], [37, 2], page_tokens=16),
    Case("int8", "int8", [77, 1, 64], [30, 1, 40], page_tokens=32, group=1),
    Case("int4", "int4", [33, 130], [12, 63], page_tokens=64, group=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case):
    step = make_step(case)
    out = launch_prefill(step.cache, step.q_TQD, step.batch, step.spec, rows=32)
    assert out.dtype == step.q_TQD.dtype
    assert relative_error(out, step.expected()) < 6e-3
