"""The decode kernel against the reference in fp64, in the interpreter; and its split heuristic."""

from __future__ import annotations

import pytest
from paged_cases import Case, make_step, relative_error

from quire.kernels.decode import launch_decode
from quire.kernels.formats import Codes, KVFormat, Scales

INT8_G32 = KVFormat(Codes.INT8, Scales.TOKEN, group=32)
FP8_TOKEN = KVFormat(Codes.FP8, Scales.TOKEN)

CASES = [
    Case("bf16", "bf16", [37, 5], [1, 1], page_tokens=16),
    Case("int8", "int8", [77, 1, 64], [1, 1, 1], page_tokens=32, group=1),
    Case("int4", "int4", [33, 130], [1, 1], page_tokens=64, group=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case):
    step = make_step(case)
    out = launch_decode(step.cache, step.q_TQD, step.batch, step.spec, 1)
    assert out.dtype == step.q_TQD.dtype
    assert relative_error(out, step.expected()) < 6e-3
