"""The prefill kernel against the reference in fp64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from paged_cases import Case, make_scaled_step, make_step, relative_error

from quire.kernels.formats import Codes, KVFormat, Scales
from quire.kernels.prefill import launch_prefill, prefill_attention
from quire.kernels.ref.paged import write_kv_ref

INT8_G32 = KVFormat(Codes.INT8, Scales.TOKEN, group=32)
FP8_TOKEN = KVFormat(Codes.FP8, Scales.TOKEN)

CASES = [
    # every format on both sides; a whole prompt, a later chunk and a single token
    Case("bf16", "bf16", [37, 5], [37, 2]),
    Case("fp8", "fp8", [77, 1, 64], [30, 1, 64], page_tokens=32, head_dim=128),
    Case(FP8_TOKEN, FP8_TOKEN, [33], [20], group=1),
    Case("int8", "int8", [77, 1, 64], [30, 1, 40], page_tokens=32, group=1, head_dim=128),
    Case(INT8_G32, INT8_G32, [77, 1], [33, 1], page_tokens=64, group=5),
    Case("int8c", "int8c", [77, 1], [33, 1], page_tokens=64, head_dim=128),
    Case("int4", "int4", [33, 130], [12, 63], page_tokens=64, group=3),
    Case("int4g64", "int4g64", [33, 70], [12, 13], page_tokens=32, head_dim=128),
    Case("int4g32", "int4g32", [70], [13], page_tokens=64, group=7, head_dim=128),
    Case("int4c", "int4c", [33, 70], [33, 31], page_tokens=32, group=4),
    # mixed sides, other types of q, windows, soft-caps
    Case("int8", "int4", [63, 80], [20, 1], page_tokens=64, dtype=torch.float16),
    Case("bf16", "int4", [63, 30], [20, 17], dtype=torch.float32),
    Case("int4", "bf16", [63, 30], [20, 17], page_tokens=32, group=4),
    Case("int8", "int8", [100, 9, 17], [60, 9, 1], window=17),
    Case("int4", "int4", [100, 65], [64, 30], window=30, softcap=20.0),
    Case("int8c", "fp8", [90, 9], [60, 1], page_tokens=32, softcap=5.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case):
    step = make_step(case)
    out = launch_prefill(step.cache, step.q_TQD, step.batch, step.spec, rows=32)
    assert out.dtype == step.q_TQD.dtype
    assert relative_error(out, step.expected()) < (8e-3 if "bf16" in str(case) else 3e-3)


def test_a_chunk_at_a_time_gives_the_same_as_all_at_once():
    whole = make_step(Case("int8", "int4", [80], [80], page_tokens=16))
    last = make_step(Case("int8", "int4", [80], [23], page_tokens=16))
    q_TQD = whole.q_TQD[-23:]
    once = launch_prefill(whole.cache, whole.q_TQD, whole.batch, whole.spec, rows=64)[-23:]
    chunk = launch_prefill(last.cache, q_TQD, last.batch, last.spec, rows=16)
    assert relative_error(chunk, once) < 3e-3


def test_rows_that_are_masked_everywhere_in_a_page_stay_finite():
    step = make_step(Case("int8", "int8", [50], [50], window=2))
    out = launch_prefill(step.cache, step.q_TQD, step.batch, step.spec, rows=128)
    assert relative_error(out, step.expected()) < 3e-3


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int4g32"])
def test_static_scales_bring_any_magnitude_into_range(name):
    step = make_scaled_step(Case(name, name, [63, 30], [20, 17]))
    out = launch_prefill(step.cache, step.q_TQD, step.batch, step.spec, rows=32)
    assert relative_error(out, step.expected()) < 3e-3


@pytest.mark.parametrize("name", ["int8", "int4", "int4g32"])
def test_values_with_the_smallest_scales_keep_their_precision(name):
    step = make_step(Case(name, name, [60], [20], dtype=torch.float32), written=False)
    write_kv_ref(step.cache, step.k_LHD, step.v_LHD * 2.0**-14, step.slots_L)
    out = launch_prefill(step.cache, step.q_TQD, step.batch, step.spec, rows=32)
    assert relative_error(out, step.expected()) < 3e-3


def test_the_public_operation_serves_cpu_tensors():
    step = make_step(Case("int8", "int4", [50], [7]))
    out = prefill_attention(step.cache, step.q_TQD, step.batch, step.spec)
    assert relative_error(out, step.expected()) < 1e-2
