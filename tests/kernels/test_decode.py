"""The decode kernel against the reference in fp64, in the interpreter; and how it plans its splits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_cases import Case, Step, make_step, relative_error

from quire.kernels.decode import decode_attention, launch_decode, plan_decode
from quire.kernels.formats import Codes, FormatError, KVFormat, Scales, Transform
from quire.kernels.paged import AttentionSpec
from quire.kernels.ref.paged import write_kv_ref
from quire.kernels.transform import SideTransform

INT8_G32 = KVFormat(Codes.INT8, Scales.TOKEN, group=32)
FP8_TOKEN = KVFormat(Codes.FP8, Scales.TOKEN)
INT4_PLAIN = KVFormat(Codes.INT4, Scales.TOKEN, group=16)

CASES = [
    # every format on both sides
    Case("bf16", "bf16", [37, 5, 64], [1, 1, 1]),
    Case("fp8", "fp8", [77, 1, 64], [1, 1, 1], page_tokens=32, head_dim=128),
    Case(FP8_TOKEN, FP8_TOKEN, [33, 100], [1, 1], group=1),
    Case("int8", "int8", [77, 1, 64], [1, 1, 1], page_tokens=32, group=1, head_dim=128),
    Case(INT8_G32, INT8_G32, [77, 1], [1, 1], page_tokens=64, group=5),
    Case("int8c", "int8c", [77, 1], [1, 1], page_tokens=64, head_dim=128),
    Case("int4", "int4", [33, 130], [1, 1], page_tokens=64, group=3, head_dim=128),
    Case("int4g64", "int4g64", [33, 130], [1, 1], page_tokens=32, group=8, head_dim=128),
    Case("int4g32", "int4g32", [33, 130], [1, 1], page_tokens=64, group=7, head_dim=128),
    Case("int4g32", "int4g32", [33, 70], [1, 1], page_tokens=64, head_dim=64),
    Case(INT4_PLAIN, INT4_PLAIN, [33], [1], page_tokens=16, head_dim=64),
    Case("int4c", "int4c", [33, 130], [1, 1], page_tokens=32, group=4, head_dim=128),
    # mixed sides, other types of q
    Case("int8", "int4", [63, 130], [1, 1], page_tokens=64, dtype=torch.float16),
    Case("bf16", "int4", [63, 30], [1, 1], page_tokens=16, dtype=torch.float32),
    Case("int4", "bf16", [63, 30], [1, 1], page_tokens=32, group=4),
    Case("int4c", "fp8", [63, 30], [1, 1], page_tokens=64, group=4, head_dim=128),
    # several query rows, row tiles, windows, soft-caps
    Case("int4", "int4", [40, 3, 129], [5, 3, 2], page_tokens=64, group=2),
    Case("int8", "int8", [40, 3, 129], [5, 1, 4], page_tokens=16, group=7),
    Case("bf16", "fp8", [70, 3], [5, 3], page_tokens=32, group=8),
    Case("int8", "int8", [200, 9, 17], [1, 1, 1], page_tokens=16, window=17),
    Case("int4", "int4", [200, 9, 65], [4, 1, 3], page_tokens=16, window=30, softcap=20.0),
    Case("int8c", "int8c", [100, 9], [2, 1], page_tokens=32, softcap=5.0),
]


def decode(step: Step, multiprocessors: int = 1) -> torch.Tensor:
    tiling = plan_decode(step.cache, step.q_TQD.shape[1], step.batch, step.spec, multiprocessors)
    return launch_decode(step.cache, step.q_TQD, step.batch, step.spec, tiling)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_agrees_with_the_reference(case, multiprocessors):
    step = make_step(case)
    out = decode(step, multiprocessors)
    assert out.dtype == step.q_TQD.dtype
    assert relative_error(out, step.expected()) < (8e-3 if "bf16" in str(case) else 3e-3)


def test_reads_queries_that_are_not_contiguous():
    step = make_step(Case("int8", "int8", [50, 20], [2, 1]))
    q_QTD = step.q_TQD.transpose(0, 1).contiguous()
    out = decode(replace(step, q_TQD=q_QTD.transpose(0, 1)))
    assert relative_error(out, step.expected()) < 3e-3


def test_small_values_keep_their_precision():
    step = make_step(Case("int8", "int8", [60], [1]), written=False)
    write_kv_ref(step.cache, step.k_LHD * 0.1, step.v_LHD * 0.03, step.slots_L)
    out = decode(step)
    assert relative_error(out, step.expected()) < 3e-3


def test_a_split_without_visible_tokens_leaves_no_trace():
    case = Case("int8", "int8", [16 * 9, 3], [1, 1])  # the short sequence has nothing for most splits
    step = make_step(case)
    tiling = plan_decode(step.cache, 4, step.batch, step.spec, 64)
    assert tiling.splits > 1
    out = decode(step, 64)
    assert relative_error(out, step.expected()) < 3e-3


def test_a_plan_for_longer_sequences_serves_shorter_ones():
    """As a CUDA graph does, whose grid is fixed when it is captured."""
    step = make_step(Case("int8", "int8", [70, 300], [1, 1]))
    captured = replace(step, batch=replace(step.batch, max_kv_tokens=5000))
    assert relative_error(decode(captured, 8), step.expected()) < 3e-3


@pytest.mark.parametrize(("sequences", "few"), [(1, False), (3, True)])
def test_splits_are_combined_and_transformed_in_one_launch_or_two(sequences, few):
    case = Case("int4", "int4", [16 * 40 + 3] * sequences, [1] * sequences, kv_heads=1)
    step = make_step(case)
    assert (plan_decode(step.cache, 2, step.batch, step.spec, 3).splits <= 8) is few
    assert relative_error(decode(step, 3), step.expected()) < 3e-3


def test_rows_that_no_sequence_owns_are_not_touched():
    step = make_step(Case("int4", "int4", [30, 40], [2, 3]))
    start = torch.tensor([0, 0, 3], dtype=torch.int32)  # the first sequence is idle this step
    batch = replace(step.batch, query_start_S1=start)
    out = decode(replace(step, q_TQD=step.q_TQD[2:], batch=batch))
    assert relative_error(out, step.expected()[2:]) < 3e-3


def test_refuses_what_it_cannot_serve():
    step = make_step(Case("int8", "int8", [30], [1], softcap=3.0))
    shifted = replace(step.cache, k_transform=SideTransform(shift_HD=torch.ones(2, 64)))
    with pytest.raises(FormatError, match="soft-cap"):
        decode_attention(shifted, step.q_TQD, step.batch, step.spec)
    odd = make_step(Case("int8", "int8", [30], [1], head_dim=80))
    with pytest.raises(FormatError, match="head_dim"):
        decode(odd)
    fine = KVFormat(Codes.INT8, Scales.TOKEN, group=8, transform=Transform.IDENTITY)
    narrow = make_step(Case(fine, "int8", [30], [1]))
    with pytest.raises(FormatError, match="16 channels"):
        decode(narrow)


def plan(kv_tokens, sequences, *, window=None, multiprocessors=132, query_tokens=1):
    step = make_step(Case("int8", "int8", [1], [1], page_tokens=64))
    batch = replace(
        step.batch,
        kv_tokens_S=torch.full((sequences,), kv_tokens),
        max_kv_tokens=kv_tokens,
        max_query_tokens=query_tokens,
    )
    return plan_decode(step.cache, 8, batch, AttentionSpec(1.0, window), multiprocessors)


def test_splits_fill_the_device_and_cover_every_page():
    for kv_tokens in (1, 64, 65, 1000, 8192, 131072):
        for sequences in (1, 3, 64, 600):
            tiling = plan(kv_tokens, sequences)
            pages = -(-kv_tokens // 64)
            assert tiling.splits * tiling.pages_per_split >= pages
            assert (tiling.splits - 1) * tiling.pages_per_split < pages
            assert tiling.splits == 1 or tiling.pages_per_split >= 2
            assert tiling.splits == 1 or tiling.splits * sequences * 2 <= 132 * 8
    assert plan(8192, 600).splits == 1  # enough sequences fill the device
    assert plan(8192, 64).splits > 4
    assert plan(131072, 9, multiprocessors=16).splits < plan(131072, 9).splits


def test_a_window_bounds_the_pages_of_a_plan():
    tiling = plan(131072, 1, window=256)
    assert tiling.splits * tiling.pages_per_split <= 6


def test_more_query_rows_leave_less_to_split():
    assert plan(131072, 30, query_tokens=5).splits < plan(131072, 30).splits
